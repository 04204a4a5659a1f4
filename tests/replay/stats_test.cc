#include "replay/stats.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "device/memory_stream.h"
#include "replay/progress.h"

namespace diffkv::replay {
namespace {

TEST(Percentile, IsTheNearestRank) {
  EXPECT_EQ(percentile({}, 50), 0.0);
  EXPECT_EQ(percentile({7}, 1), 7.0);
  EXPECT_EQ(percentile({7}, 99), 7.0);
  const std::vector<double> five = {50, 15, 40, 20, 35};
  EXPECT_EQ(percentile(five, 0), 15.0);
  EXPECT_EQ(percentile(five, 30), 20.0);
  EXPECT_EQ(percentile(five, 40), 20.0);
  EXPECT_EQ(percentile(five, 50), 35.0);
  EXPECT_EQ(percentile(five, 100), 50.0);
  std::vector<double> hundred;
  for (int i = 100; i >= 1; --i) hundred.push_back(i);
  EXPECT_EQ(percentile(hundred, 99), 99.0);
  EXPECT_EQ(percentile(hundred, 90), 90.0);
}

ReplayResult made_up() {
  ReplayResult result;
  // 1 s of prefill of 10 tokens, then 3 s of decode of 2, at twice the occupancy.
  result.steps.push_back({.start_s = 0.0,
                          .plan_s = 0.25,
                          .update_s = 0.25,
                          .attend_s = 0.5,
                          .prefill_tokens = 10,
                          .full_occupancy = 0.25,
                          .window_occupancy = 0.5,
                          .kv_bytes = 100,
                          .flops = 1000});
  result.steps.push_back({.start_s = 5.0,
                          .attend_s = 3.0,
                          .decode_tokens = 2,
                          .num_preempted = 3,
                          .full_occupancy = 0.5,
                          .window_occupancy = 1.0,
                          .kv_bytes = 600,
                          .flops = 10});
  result.prompt_tokens = 10;
  result.generated_tokens = 2;
  result.requests = 2;
  result.requests_finished = 1;
  result.stopped = true;
  result.wall_s = 6.0;
  result.bandwidth = 400.0;
  return result;
}

TEST(Summary, AddsUp) {
  const Summary summary = summarize(made_up());
  EXPECT_DOUBLE_EQ(summary.tokens_per_s, 3.0);
  EXPECT_DOUBLE_EQ(summary.wall_tokens_per_s, 2.0);
  EXPECT_DOUBLE_EQ(summary.clock_s, 8.0);
  EXPECT_EQ(summary.preemptions, 3);
  EXPECT_DOUBLE_EQ(summary.full_occupancy_mean, (0.25 * 1 + 0.5 * 3) / 4);
  EXPECT_DOUBLE_EQ(summary.window_occupancy_peak, 1.0);
  const auto& [prefill, decode, mixed] = summary.kinds;
  EXPECT_EQ(prefill.steps, 1);
  EXPECT_DOUBLE_EQ(prefill.p50_s, 1.0);
  EXPECT_DOUBLE_EQ(prefill.peak_fraction, 0.5);
  EXPECT_DOUBLE_EQ(decode.peak_fraction, 0.5);
  EXPECT_DOUBLE_EQ(decode.p99_s, 3.0);
  EXPECT_EQ(mixed.steps, 0);
  EXPECT_EQ(summary.all.tokens, 12);
}

TEST(Summary, OfNothingIsZero) {
  const Summary summary = summarize({});
  EXPECT_EQ(summary.tokens_per_s, 0.0);
  EXPECT_EQ(summary.all.peak_fraction, 0.0);
  EXPECT_EQ(step_table(summary).size(), 2U);  // header and "all"
}

TEST(Summary, JsonHasTheFigures) {
  ReplayResult result = made_up();
  result.backend = "cpu \xff";  // not UTF-8
  const auto json = nlohmann::json::parse(to_json(result, summarize(result)));
  EXPECT_EQ(json["tokens_per_s"], 3.0);
  EXPECT_EQ(json["stopped"], true);
  EXPECT_EQ(json["steps"]["decode"]["latency_p99_s"], 3.0);
  EXPECT_EQ(json["verify"]["rows_wrong"], 0);
}

TEST(Bandwidth, IsThatOfAMachine) {
  const double bytes_per_s = device::measure_host_read_rate();
  EXPECT_GT(bytes_per_s, 1e8);
  EXPECT_LT(bytes_per_s, 1e14);
}

TEST(StepRecord, KindIsByItsTokens) {
  EXPECT_EQ(StepRecord{.prefill_tokens = 5}.kind(), StepKind::kPrefill);
  EXPECT_EQ(StepRecord{.decode_tokens = 5}.kind(), StepKind::kDecode);
  EXPECT_EQ((StepRecord{.prefill_tokens = 1, .decode_tokens = 5}.kind()), StepKind::kMixed);
}

TEST(ProgressLine, HasShareRateAndTimeLeft) {
  const Progress progress = {.tokens_done = 250,
                             .tokens_total = 1000,
                             .requests_finished = 3,
                             .requests = 12,
                             .elapsed_s = 50.0};
  EXPECT_EQ(progress_line(progress, 60),
            "[####............]   25 %  3/12 requests  5 tok/s  2:30 left");
  EXPECT_EQ(progress_line(progress, 10), " 25 %  3/1");
  for (int width = 0; width < 120; ++width) {
    EXPECT_LE(progress_line(progress, width).size(), static_cast<std::size_t>(width));
  }
  EXPECT_NE(progress_line({}, 79).find("? left"), std::string::npos);
}

}  // namespace
}  // namespace diffkv::replay
