// Whole replays, small: that what the schedule and the library do together is right, and that a
// wrong cache or layer is found.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>

#include "diffkv/error.h"
#include "replay/layer_group.h"
#include "replay/replay.h"

namespace diffkv::replay {
namespace {

ReplayOptions small_options() {
  ReplayOptions options;
  options.model = choose_layers(divide_heads(find_model("mimo-v2-flash"), 8), "1:1");
  options.cache_bytes = 8 << 20;
  options.max_num_batched_tokens = 64;
  options.max_num_seqs = 8;
  options.verify_rows = 60;
  options.bandwidth = 1e10;  // measuring it would take longer than the replay
  return options;
}

std::vector<TraceRequest> small_trace() {
  return {{0.0, 200, 9}, {0.5, 3, 20}, {1.0, 70, 1}, {100.0, 1, 1}, {100.5, 31, 12}};
}

bool always(const Progress& /*progress*/) { return true; }
bool go_on() { return true; }

TEST(Replay, EveryTypeAndBlockSizeIsRight) {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const DType cache : {dtype, DType::kBF16, DType::kE4M3, DType::kE5M2}) {
      for (const std::int64_t block_size : {5, 16}) {
        SCOPED_TRACE(std::string(to_string(dtype)) + " " + std::string(to_string(cache)));
        ReplayOptions options = small_options();
        options.dtype = dtype;
        options.cache_dtype = cache;
        options.block_size = block_size;
        const ReplayResult result = replay(small_trace(), options, always);
        EXPECT_EQ(result.requests_finished, 5);
        EXPECT_FALSE(result.stopped);
        EXPECT_EQ(result.prompt_tokens, 305);
        EXPECT_EQ(result.generated_tokens, 43);
        EXPECT_EQ(result.verify.rows(), 60);
        EXPECT_EQ(result.verify.rows_full, 30);
        EXPECT_EQ(result.verify.rows_wrong, 0) << result.verify.first_wrong;
      }
    }
  }
}

TEST(Replay, PreemptionAndManyLayersAreRight) {
  ReplayOptions options = small_options();
  options.model = choose_layers(divide_heads(find_model("mimo-v2-flash"), 4), "2:3");
  std::vector<TraceRequest> trace;
  for (int i = 0; i < 12; ++i) trace.push_back({0.0, 40 + 7 * i, 30});
  options.cache_bytes = 2.4e6;  // 19 window blocks, two fifths of what eight requests ask for
  const ReplayResult result = replay(trace, options, always);
  EXPECT_EQ(result.requests_finished, 12);
  EXPECT_GT(summarize(result).preemptions, 0);
  EXPECT_GT(result.prompt_tokens, 12 * 40 + 7 * 66);  // some were computed again
  EXPECT_GT(result.verify.rows_full, 0);
  EXPECT_GT(result.verify.rows_window, 0);
  EXPECT_EQ(result.verify.rows_wrong, 0) << result.verify.first_wrong;
}

TEST(Replay, TheClockWaitsForArrivals) {
  ReplayOptions options = small_options();
  options.speed_up = 4.0;
  const ReplayResult timed = replay(small_trace(), options, always);
  EXPECT_EQ(timed.requests_finished, 5);
  EXPECT_GE(summarize(timed).clock_s, 100.5 / 4);
  EXPECT_LT(timed.wall_s, 20.0);  // and is not the wall's
  double last = 0.0;
  for (const StepRecord& step : timed.steps) {
    EXPECT_GE(step.start_s, last);
    last = step.start_s + step.latency_s();
  }
}

TEST(Replay, StopsWhenAsked) {
  int calls = 0;
  ReplayOptions options = small_options();
  options.verify_rows = 0;
  const ReplayResult result = replay(small_trace(), options, [&](const Progress& progress) {
    EXPECT_EQ(progress.tokens_total, 305 + 43);
    return ++calls < 3;
  });
  EXPECT_EQ(result.steps.size(), 3U);
  EXPECT_TRUE(result.stopped);
}

// One row more would be enough to make Ctrl-C wait for minutes where rows are long.
TEST(Replay, StopsBetweenTwoRowsToVerify) {
  ReplayOptions options = small_options();
  options.verify_rows = 1000;  // every row of the first step, 64 tokens
  int calls = 0;
  const ReplayResult result =
      replay(small_trace(), options, [&](const Progress&) { return ++calls < 5; });
  EXPECT_EQ(calls, 5);
  EXPECT_EQ(result.verify.rows(), 5);
  EXPECT_EQ(result.steps.size(), 1U);
  EXPECT_TRUE(result.stopped);
}

TEST(Replay, TimeEndsVerifyingToo) {
  ReplayOptions options = small_options();
  options.verify_rows = 1000;
  options.seconds = 1e-9;
  const ReplayResult result = replay(small_trace(), options, always);
  EXPECT_EQ(result.verify.rows(), 1);
  EXPECT_EQ(result.steps.size(), 1U);
}

TEST(Replay, VerifiesEachTokenOnceAtMost) {
  ReplayOptions options = small_options();
  options.verify_rows = kMaxVerifyRows;
  const ReplayResult result = replay(small_trace(), options, always);
  EXPECT_EQ(result.verify.rows_asked, kMaxVerifyRows);
  EXPECT_EQ(result.verify.rows(), 305 + 35);  // 38 decode tokens but the last tenth
  EXPECT_EQ(result.verify.rows_wrong, 0) << result.verify.first_wrong;
}

TEST(Replay, ProgressEndsAtAllTokens) {
  ReplayOptions options = small_options();
  options.verify_rows = 0;
  Progress last;
  replay(small_trace(), options, [&](const Progress& progress) {
    EXPECT_GE(progress.tokens_done, last.tokens_done);
    last = progress;
    return true;
  });
  EXPECT_EQ(last.tokens_done, last.tokens_total);
  EXPECT_EQ(last.requests_finished, 5);
}

TEST(Replay, RefusesBadOptions) {
  const auto refused = [](const auto& change) {
    ReplayOptions options = small_options();
    change(options);
    EXPECT_THROW(replay(small_trace(), options, always), Error);
  };
  refused([](ReplayOptions& o) { o.block_size = 0; });
  refused([](ReplayOptions& o) { o.max_num_batched_tokens = 0; });
  refused([](ReplayOptions& o) { o.max_num_seqs = -1; });
  refused([](ReplayOptions& o) { o.seconds = -1; });
  refused([](ReplayOptions& o) { o.speed_up = std::numeric_limits<double>::quiet_NaN(); });
  refused([](ReplayOptions& o) { o.verify_rows = -1; });
  refused([](ReplayOptions& o) { o.verify_rows = kMaxVerifyRows + 1; });
  refused([](ReplayOptions& o) { o.cache_bytes = 1000; });
  refused([](ReplayOptions& o) { o.cache_bytes = 100000; });  // the longest request does not fit
  refused([](ReplayOptions& o) { o.backend = "abacus"; });
  EXPECT_THROW(replay({}, small_options(), always), Error);
}

TEST(LayerGroup, FindsAKeyThatIsNotWhatWasWritten) {
  const ReplayOptions options = small_options();
  const auto session = device::open_session(find_backend("cpu"));
  LayerGroup group(*session, {.model = options.model,
                              .kind = options.model.full,
                              .num_blocks = 10,
                              .max_tokens = 64,
                              .max_seqs = 2,
                              .max_seq_len = 64});
  Sequence first;
  Sequence second;
  second.id = 1;
  first.full_blocks = {1, 2};
  second.full_blocks = {3, 2};  // a block with two owners
  StepRecord record;
  VerifyResult verify;
  const Step fill = {.seqs = {{&first, 0, 32, false}}, .num_tokens = 32};
  group.run(fill, {{.token = 31}}, record, verify, go_on);
  EXPECT_EQ(verify.rows_wrong, 0) << verify.first_wrong;
  const Step overwrite = {.seqs = {{&second, 0, 32, false}}, .num_tokens = 32};
  group.run(overwrite, {{.token = 31}}, record, verify, go_on);
  EXPECT_EQ(verify.rows_wrong, 0) << verify.first_wrong;
  first.full_blocks.push_back(4);
  const Step decode = {.seqs = {{&first, 32, 1, true}}, .num_tokens = 1};
  group.run(decode, {{.token = 0}}, record, verify, go_on);
  EXPECT_EQ(verify.rows(), 3);
  EXPECT_EQ(verify.rows_wrong, 1);
  EXPECT_EQ(verify.first_wrong,
            "full-attention layer 0: the key of token 16 of request 0 is not in the cache as it "
            "was written");
}

TEST(LayerGroup, CountsBytesAndFlops) {
  const ReplayOptions options = small_options();
  const auto session = device::open_session(find_backend("cpu"));
  Sequence sequence;
  const auto counted = [&](const LayerKind& kind, std::int64_t context, std::int64_t query) {
    const LayerGroup group(*session, {.model = options.model,
                                      .kind = kind,
                                      .num_blocks = 2,
                                      .max_tokens = 512,
                                      .max_seqs = 1,
                                      .max_seq_len = 512});
    const Step step = {.seqs = {{&sequence, context, query, false}}, .num_tokens = query};
    return std::pair(group.kv_bytes(step) / (320 * 2), group.flops(step) / (2 * 320 * 8));
  };
  for (const auto& [context, query] : std::vector<std::pair<std::int64_t, std::int64_t>>{
           {0, 1}, {0, 300}, {100, 60}, {127, 1}, {128, 1}, {300, 1}, {250, 50}}) {
    for (const LayerKind& kind : {options.model.full, options.model.window}) {
      double pairs = 0.0;
      for (std::int64_t p = context; p < context + query; ++p) {
        for (std::int64_t j = 0; j <= p; ++j) pairs += kind.window == 0 || p - j < kind.window;
      }
      const std::int64_t first =
          kind.window == 0 ? 0 : std::max<std::int64_t>(0, context - kind.window + 1);
      const auto [keys, counted_pairs] = counted(kind, context, query);
      EXPECT_DOUBLE_EQ(keys, static_cast<double>(context + query - first));
      EXPECT_DOUBLE_EQ(counted_pairs, pairs) << context << "+" << query << " " << kind.window;
    }
  }
}

}  // namespace
}  // namespace diffkv::replay
