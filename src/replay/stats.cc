#include "replay/stats.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

namespace diffkv::replay {
namespace {

KindSummary summarize_steps(const std::vector<const StepRecord*>& steps, double bandwidth) {
  KindSummary sum;
  std::vector<double> latencies;
  latencies.reserve(steps.size());
  for (const StepRecord* step : steps) {
    ++sum.steps;
    sum.tokens += step->tokens();
    sum.latency_s += step->latency_s();
    sum.attend_s += step->attend_s;
    sum.kv_bytes += step->kv_bytes;
    sum.flops += step->flops;
    latencies.push_back(step->latency_s());
  }
  sum.p50_s = percentile(latencies, 50);
  sum.p90_s = percentile(latencies, 90);
  sum.p99_s = percentile(latencies, 99);
  if (sum.attend_s > 0 && bandwidth > 0) {
    sum.peak_fraction = sum.kv_bytes / bandwidth / sum.attend_s;
  }
  return sum;
}

std::string milliseconds(double seconds) { return fmt::format("{:.3f}", seconds * 1e3); }

std::string occupancy(double mean, double peak) {
  return fmt::format("{:.1f} % mean, {:.1f} % peak", mean * 100, peak * 100);
}

std::vector<std::string> step_row(std::string_view name, const KindSummary& kind) {
  const double seconds = std::max(kind.attend_s, 1e-12);
  return {std::string(name),
          fmt::format("{}", kind.steps),
          fmt::format("{}", kind.tokens),
          milliseconds(kind.p50_s),
          milliseconds(kind.p90_s),
          milliseconds(kind.p99_s),
          fmt::format("{:.2f}", kind.kv_bytes / 1e9),
          fmt::format("{:.1f}", kind.kv_bytes / seconds / 1e9),
          fmt::format("{:.1f}", kind.peak_fraction * 100),
          fmt::format("{:.1f}", kind.flops / seconds / 1e9)};
}

nlohmann::json kind_json(const KindSummary& kind) {
  return {{"steps", kind.steps},           {"tokens", kind.tokens},
          {"latency_p50_s", kind.p50_s},   {"latency_p90_s", kind.p90_s},
          {"latency_p99_s", kind.p99_s},   {"latency_sum_s", kind.latency_s},
          {"attend_sum_s", kind.attend_s}, {"kv_bytes_read", kind.kv_bytes},
          {"flops", kind.flops},           {"fraction_of_peak_read_bandwidth", kind.peak_fraction}};
}

}  // namespace

std::string_view to_string(StepKind kind) {
  switch (kind) {
    case StepKind::kPrefill:
      return "prefill";
    case StepKind::kDecode:
      return "decode";
    case StepKind::kMixed:
      return "mixed";
  }
  return "?";
}

double percentile(std::vector<double> values, double percent) {
  if (values.empty()) return 0.0;
  const auto count = static_cast<double>(values.size());
  const double rank = std::clamp(std::ceil(percent / 100.0 * count), 1.0, count);
  const auto nth = values.begin() + static_cast<std::ptrdiff_t>(rank) - 1;
  std::nth_element(values.begin(), nth, values.end());
  return *nth;
}

Summary summarize(const ReplayResult& result) {
  Summary summary;
  std::vector<const StepRecord*> all;
  std::array<std::vector<const StepRecord*>, kNumStepKinds> by_kind;
  double occupied_s = 0.0;
  for (const StepRecord& step : result.steps) {
    all.push_back(&step);
    by_kind[static_cast<std::size_t>(step.kind())].push_back(&step);
    summary.preemptions += step.num_preempted;
    // Weighted by time: a long step holds its blocks longer.
    occupied_s += step.latency_s();
    summary.full_occupancy_mean += step.full_occupancy * step.latency_s();
    summary.window_occupancy_mean += step.window_occupancy * step.latency_s();
    summary.full_occupancy_peak = std::max(summary.full_occupancy_peak, step.full_occupancy);
    summary.window_occupancy_peak = std::max(summary.window_occupancy_peak, step.window_occupancy);
    summary.clock_s = step.start_s + step.latency_s();
  }
  if (occupied_s > 0) {
    summary.full_occupancy_mean /= occupied_s;
    summary.window_occupancy_mean /= occupied_s;
  }
  for (std::size_t k = 0; k < kNumStepKinds; ++k) {
    summary.kinds[k] = summarize_steps(by_kind[k], result.bandwidth);
  }
  summary.all = summarize_steps(all, result.bandwidth);
  const auto tokens = static_cast<double>(result.prompt_tokens + result.generated_tokens);
  if (summary.all.latency_s > 0) summary.tokens_per_s = tokens / summary.all.latency_s;
  if (result.wall_s > 0) summary.wall_tokens_per_s = tokens / result.wall_s;
  return summary;
}

Cells overall_table(const ReplayResult& result, const Summary& summary) {
  const VerifyResult& verify = result.verify;
  Cells rows = {
      {"backend", result.backend},
      {"requests finished", fmt::format("{} of {}{}", result.requests_finished, result.requests,
                                        result.stopped ? " (stopped early)" : "")},
      {"tokens", fmt::format("{} prompt (recomputed included) + {} generated", result.prompt_tokens,
                             result.generated_tokens)},
      {"tokens per second", fmt::format("{:.0f} by step latency, {:.0f} by wall time",
                                        summary.tokens_per_s, summary.wall_tokens_per_s)},
      {"time", fmt::format("{:.2f} s in steps, {:.2f} s on the replay's clock, {:.2f} s wall",
                           summary.all.latency_s, summary.clock_s, result.wall_s)},
      {"KV bytes read", fmt::format("{:.2f} GB in {:.2f} s of attention, {:.1f} % of peak",
                                    summary.all.kv_bytes / 1e9, summary.all.attend_s,
                                    summary.all.peak_fraction * 100)},
      {"peak read bandwidth", fmt::format("{:.1f} GB/s", result.bandwidth / 1e9)},
      {"cache", fmt::format("{:.1f} MiB; {} full-attention and {} window blocks a layer",
                            static_cast<double>(result.cache_bytes) / (1 << 20),
                            result.num_full_blocks, result.num_window_blocks)},
      {"full-attention occupancy",
       occupancy(summary.full_occupancy_mean, summary.full_occupancy_peak)},
      {"window occupancy", occupancy(summary.window_occupancy_mean, summary.window_occupancy_peak)},
      {"preemptions", fmt::format("{}", summary.preemptions)},
      {"rows verified",
       fmt::format("{} of {} asked ({} full-attention, {} window), {} wrong", verify.rows(),
                   verify.rows_asked, verify.rows_full, verify.rows_window, verify.rows_wrong)}};
  if (result.graphs > 0) {
    rows.push_back({"graphs", fmt::format("{} padded shapes recorded", result.graphs)});
  }
  if (verify.rows() > 0) {
    rows.push_back({"worst error", fmt::format("{:.2e} of {:.0e} allowed; lse {:.2e} of {:.0e}",
                                               verify.worst_error, verify.tolerance,
                                               verify.worst_lse_error, verify.lse_tolerance)});
  }
  if (!verify.first_wrong.empty()) rows.push_back({"first wrong row", verify.first_wrong});
  return rows;
}

Cells step_table(const Summary& summary) {
  Cells rows = {{"steps", "count", "tokens", "p50 ms", "p90 ms", "p99 ms", "KV GB", "GB/s",
                 "% of peak", "GFLOP/s"}};
  for (std::size_t k = 0; k < kNumStepKinds; ++k) {
    if (summary.kinds[k].steps == 0) continue;
    rows.push_back(step_row(to_string(static_cast<StepKind>(k)), summary.kinds[k]));
  }
  rows.push_back(step_row("all", summary.all));
  return rows;
}

std::string to_json(const ReplayResult& result, const Summary& summary) {
  const VerifyResult& verify = result.verify;
  nlohmann::json json = {{"backend", result.backend},
                         {"requests", result.requests},
                         {"requests_finished", result.requests_finished},
                         {"stopped", result.stopped},
                         {"prompt_tokens", result.prompt_tokens},
                         {"generated_tokens", result.generated_tokens},
                         {"tokens_per_s", summary.tokens_per_s},
                         {"wall_tokens_per_s", summary.wall_tokens_per_s},
                         {"wall_s", result.wall_s},
                         {"clock_s", summary.clock_s},
                         {"peak_read_bandwidth_bytes_per_s", result.bandwidth},
                         {"cache_bytes", result.cache_bytes},
                         {"num_full_blocks", result.num_full_blocks},
                         {"num_window_blocks", result.num_window_blocks},
                         {"full_occupancy_mean", summary.full_occupancy_mean},
                         {"full_occupancy_peak", summary.full_occupancy_peak},
                         {"window_occupancy_mean", summary.window_occupancy_mean},
                         {"window_occupancy_peak", summary.window_occupancy_peak},
                         {"preemptions", summary.preemptions},
                         {"graphs", result.graphs},
                         {"verify",
                          {{"rows_asked", verify.rows_asked},
                           {"rows_full", verify.rows_full},
                           {"rows_window", verify.rows_window},
                           {"rows_wrong", verify.rows_wrong},
                           {"worst_error", verify.worst_error},
                           {"tolerance", verify.tolerance},
                           {"worst_lse_error", verify.worst_lse_error},
                           {"lse_tolerance", verify.lse_tolerance},
                           {"first_wrong", verify.first_wrong}}}};
  json["steps"]["all"] = kind_json(summary.all);
  for (std::size_t k = 0; k < kNumStepKinds; ++k) {
    json["steps"][std::string(to_string(static_cast<StepKind>(k)))] = kind_json(summary.kinds[k]);
  }
  // Backend descriptions may hold any bytes; a replacement character beats an exception.
  return json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

}  // namespace diffkv::replay
