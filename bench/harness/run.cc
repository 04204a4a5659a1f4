#include "bench/harness/run.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "bench/harness/flush.h"
#include "bench/harness/meter.h"
#include "bench/harness/workload.h"

namespace diffkv::bench {
namespace {

// Of the plan and the cache update, which are short: no more and no less.
constexpr int kSideRepetitions = 9;
// Past these the run says that the machine was noisy.
constexpr double kSpread = 0.10;
constexpr double kReadRateLoss = 0.5;
constexpr double kPreemptionsPerS = 25;
constexpr double kGemmRateChange = 0.05;

std::string describe_layer(const Scenario& s) {
  std::string text = fmt::format("{}/{} heads, {}/{}, {}", s.num_heads, s.num_kv_heads,
                                 s.head_size_qk, s.head_size_v, to_string(s.dtype));
  if (s.kv_dtype != s.dtype) text += fmt::format(", {} cache", to_string(s.kv_dtype));
  text += s.block_size == 0 ? ", contiguous" : fmt::format(", pages of {}", s.block_size);
  if (s.layout != KvCacheLayout::kNHD) text += fmt::format(", {}", to_string(s.layout));
  if (s.window > 0) text += fmt::format(", window {}", s.window);
  if (s.sinks) text += ", sinks";
  if (s.soft_cap > 0) text += fmt::format(", soft cap {}", s.soft_cap);
  if (s.alibi) text += ", ALiBi";
  if (s.policy == SchedulePolicy::kBatchInvariant) text += ", batch_invariant";
  return text;
}

// A scenario's result so far and, if it is right and can be timed, what to time.
struct Prepared {
  ScenarioResult result;
  std::unique_ptr<Workload> workload;
};

// Verifies, and times everything but attention.
Prepared prepare(const device::Session& session, const Scenario& scenario, Meter& meter) {
  Prepared prepared;
  ScenarioResult& result = prepared.result;
  result.name = scenario.name;
  result.batch = describe_batch(scenario);
  result.layer = describe_layer(scenario);
  result.bytes = scenario.bytes();
  result.flops = scenario.flops();
  result.soft_cap = scenario.soft_cap;
  result.alibi = scenario.alibi;
  result.layout = to_string(scenario.layout);
  const Support support = session.backend().supports(Workload::problem_of(scenario));
  result.supported = support.ok;
  result.kernel = support.ok ? support.kernel : support.reason;
  if (!result.supported) return prepared;
  auto workload = std::make_unique<Workload>(session, scenario);
  result.verification = workload->verify();
  if (!result.verification.ok()) return prepared;
  const Repetitions side{.least = kSideRepetitions, .most = kSideRepetitions};
  result.plan = meter.time(side, [&] { workload->make_plan(); });
  result.update = meter.time(side, [&] { workload->update_cache(); });
  result.floor_s =
      meter.floor_s(scenario.bytes() - scenario.output_bytes(), scenario.output_bytes());
  prepared.workload = std::move(workload);
  return prepared;
}

// Times attention of those that can be timed, in turn.
void time_attention(std::vector<Prepared>& list, Meter& meter, const RunOptions& options) {
  std::vector<std::function<void()>> works;
  for (const Prepared& each : list) {
    if (each.workload) works.emplace_back([&each] { each.workload->attend(); });
  }
  if (works.empty()) return;
  meter.take_read_rate();
  const std::vector<Timing> timings = meter.time({.seconds = options.seconds}, works);
  const double read_rate = meter.take_read_rate();
  std::size_t next = 0;
  for (Prepared& each : list) {
    if (!each.workload) continue;
    each.result.attend = timings[next++];
    each.result.read_rate = read_rate;
  }
}

void run_scenarios(const device::Session& session, const std::vector<Scenario>& scenarios,
                   Meter& meter, const RunOptions& options, const OnScenario& on_scenario,
                   RunResult& result) {
  std::vector<Prepared> list;
  for (std::size_t i = 0; i < scenarios.size(); ++i) {
    on_scenario(i);
    list.push_back(prepare(session, scenarios[i], meter));
    if (options.in_turn && i + 1 < scenarios.size()) continue;
    time_attention(list, meter, options);
    for (Prepared& each : list) result.scenarios.push_back(std::move(each.result));
    list.clear();
  }
}

// With the rates of the host's memory and arithmetic beside.
void run_on_host(const device::Session& session, const std::vector<Scenario>& scenarios,
                 const RunOptions& options, const OnScenario& on_scenario, RunResult& result) {
  Flush flush(result.machine);
  const std::unique_ptr<Meter> meter = host_meter(flush);
  result.flush_bytes = flush.bytes();
  result.gemm_rate_before = measure_gemm_rate();
  run_scenarios(session, scenarios, *meter, options, on_scenario, result);
  result.read_rate = flush.best_rate();
  result.gemm_rate_after = measure_gemm_rate();
}

void run_on_device(device::Session& session, const std::vector<Scenario>& scenarios,
                   const RunOptions& options, const OnScenario& on_scenario, RunResult& result) {
  const std::unique_ptr<Meter> meter = device_meter(session);
  result.device = true;
  result.read_rate = session.measure_read_rate();
  run_scenarios(session, scenarios, *meter, options, on_scenario, result);
}

}  // namespace

bool RunResult::all_right() const {
  return std::all_of(scenarios.begin(), scenarios.end(), [](const ScenarioResult& result) {
    return !result.supported || result.verification.ok();
  });
}

double RunResult::read_floor_s(const ScenarioResult& result) const {
  if (result.floor_s > 0) return result.floor_s;
  return read_rate > 0 ? result.bytes / read_rate : 0.0;
}

double RunResult::gemm_floor_s(const ScenarioResult& result) const {
  return gemm_rate() > 0 ? result.flops / gemm_rate() : 0.0;
}

bool RunResult::read_was_slow(const ScenarioResult& result) const {
  return result.attend.repetitions > 0 && result.read_rate > 0 &&
         result.read_rate < read_rate * (1 - kReadRateLoss);
}

bool RunResult::is_noisy(const ScenarioResult& result) const {
  return result.attend.spread() > kSpread || read_was_slow(result) ||
         result.attend.preemptions_per_s > kPreemptionsPerS;
}

std::vector<std::string> RunResult::noise() const {
  std::vector<std::string> found;
  const double change = gemm_rate_after / gemm_rate_before - 1;
  if (gemm_rate_before > 0 && (change > kGemmRateChange || change < -kGemmRateChange)) {
    found.push_back(
        fmt::format("the fp32 GEMM rate was {:.0f} GFLOP/s before the run and {:.0f} after it",
                    gemm_rate_before / 1e9, gemm_rate_after / 1e9));
  }
  const ScenarioResult* widest = nullptr;
  const ScenarioResult* slowest = nullptr;
  const ScenarioResult* most = nullptr;
  int wide = 0;
  int preempted = 0;
  int slow = 0;
  for (const ScenarioResult& result : scenarios) {
    if (result.attend.spread() > kSpread) {
      ++wide;
      if (widest == nullptr || result.attend.spread() > widest->attend.spread()) widest = &result;
    }
    if (const double rate = result.attend.preemptions_per_s; rate > kPreemptionsPerS) {
      ++preempted;
      if (most == nullptr || rate > most->attend.preemptions_per_s) most = &result;
    }
    if (read_was_slow(result)) {
      ++slow;
      if (slowest == nullptr || result.read_rate < slowest->read_rate) slowest = &result;
    }
  }
  if (widest != nullptr) {
    found.push_back(fmt::format(
        "{} of {} scenarios: the middle half of the times spans more than {:.0f} % of the median, "
        "most of {}: {:.0f} %",
        wide, scenarios.size(), kSpread * 100, widest->name, widest->attend.spread() * 100));
  }
  if (most != nullptr) {
    found.push_back(fmt::format(
        "{} of {} scenarios: other processes took a processor more than {:.0f} times a second, "
        "most "
        "often from {}: {:.0f} times",
        preempted, scenarios.size(), kPreemptionsPerS, most->name, most->attend.preemptions_per_s));
  }
  if (slowest != nullptr) {
    found.push_back(fmt::format(
        "{} of {} scenarios: memory was read more than {:.0f} % slower meanwhile than at the best "
        "of the run, slowest with {}: {:.1f} GB/s of {:.1f}",
        slow, scenarios.size(), kReadRateLoss * 100, slowest->name, slowest->read_rate / 1e9,
        read_rate / 1e9));
  }
  return found;
}

RunResult run(device::Session& session, const std::vector<Scenario>& scenarios,
              const RunOptions& options, const OnScenario& on_scenario) {
  RunResult result;
  result.backend = session.backend().name();
  result.description = session.backend().description();
  result.machine = this_machine();
  result.date = utc_now();
  result.seconds = options.seconds;
  result.in_turn = options.in_turn;
  if (session.cold_reads() == nullptr) {
    run_on_host(session, scenarios, options, on_scenario, result);
  } else {
    run_on_device(session, scenarios, options, on_scenario, result);
  }
  return result;
}

RunResult run(const Backend& backend, const std::vector<Scenario>& scenarios,
              const RunOptions& options, const OnScenario& on_scenario) {
  return run(*device::open_session(backend), scenarios, options, on_scenario);
}

}  // namespace diffkv::bench
