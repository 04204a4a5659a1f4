#include "bench/harness/compare.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "diffkv/error.h"

namespace diffkv::bench {
namespace {

// Rates measured in two runs on one quiet machine are this close.
constexpr double kRateChange = 0.10;

void compare_rates(const char* name, double now, double before, std::vector<std::string>& notes) {
  if (now <= 0 || before <= 0) return;
  const double ratio = now / before;
  if (ratio > 1 + kRateChange || ratio < 1 / (1 + kRateChange)) {
    notes.push_back(fmt::format("the machine's {} differs: {:.1f} G/s now, {:.1f} before", name,
                                now / 1e9, before / 1e9));
  }
}

bool same_problem(const ScenarioResult& a, const ScenarioResult& b) {
  return a.bytes == b.bytes && a.flops == b.flops && a.soft_cap == b.soft_cap &&
         a.alibi == b.alibi && a.layout == b.layout;
}

std::string describe_problem(const ScenarioResult& result) {
  std::string text = fmt::format("{:.0f} bytes and {:.0f} flops", result.bytes, result.flops);
  if (result.soft_cap > 0) text += fmt::format(", soft cap {}", result.soft_cap);
  if (result.alibi) text += ", ALiBi";
  return fmt::format("{}, {}", text, result.layout);
}

// Whether `a` is to be shown rather than `b`: mistakes first, then what was timed, then the faster.
bool goes_before(const ScenarioResult& a, const ScenarioResult& b) {
  if (a.verification.ok() != b.verification.ok()) return !a.verification.ok();
  if (a.attend.repetitions == 0 || b.attend.repetitions == 0) return b.attend.repetitions == 0;
  return a.attend.median_s < b.attend.median_s;
}

}  // namespace

RunResult best_of(const std::vector<RunResult>& runs) {
  if (runs.empty()) throw Error(ErrorCode::kInvalidArgument, "there is no result to show");
  RunResult best = runs.front();
  best.in_turn = best.in_turn && runs.size() == 1;  // least medians are of different minutes
  for (std::size_t i = 1; i < runs.size(); ++i) {
    best.read_rate = std::max(best.read_rate, runs[i].read_rate);
    best.gemm_rate_before = std::max(best.gemm_rate_before, runs[i].gemm_rate());
    best.gemm_rate_after = std::max(best.gemm_rate_after, runs[i].gemm_rate());
    for (const ScenarioResult& scenario : runs[i].scenarios) {
      const auto it =
          std::find_if(best.scenarios.begin(), best.scenarios.end(),
                       [&](const ScenarioResult& other) { return other.name == scenario.name; });
      if (it == best.scenarios.end()) {
        best.scenarios.push_back(scenario);
      } else if (!same_problem(*it, scenario)) {
        throw Error(ErrorCode::kInvalidArgument,
                    fmt::format("{} is not the same problem in all results", scenario.name));
      } else if (goes_before(scenario, *it)) {
        *it = scenario;
      }
    }
  }
  return best;
}

ComparisonResult compare(const RunResult& now, const RunResult& before) {
  ComparisonResult result;
  std::vector<std::string> untimed;
  for (const ScenarioResult& scenario : now.scenarios) {
    if (scenario.attend.repetitions == 0) continue;
    const auto it =
        std::find_if(before.scenarios.begin(), before.scenarios.end(),
                     [&](const ScenarioResult& other) { return other.name == scenario.name; });
    if (it == before.scenarios.end() || it->attend.repetitions == 0) {
      untimed.push_back(scenario.name);
    } else if (!same_problem(*it, scenario)) {
      result.notes.push_back(fmt::format("{} is another problem: {} now; {} before", scenario.name,
                                         describe_problem(scenario), describe_problem(*it)));
    } else {
      result.scenarios.push_back(
          {scenario.name, scenario.attend, it->attend, judge(scenario.attend, it->attend)});
    }
  }
  if (result.scenarios.empty()) {
    throw Error(ErrorCode::kInvalidArgument,
                "the two results have no scenario that was timed in both");
  }
  if (!untimed.empty()) {
    result.notes.push_back(fmt::format("not timed before: {}", fmt::join(untimed, ", ")));
  }
  if (!before.machine.cpu.empty() &&
      (now.machine.cpu != before.machine.cpu || now.machine.threads != before.machine.threads)) {
    result.notes.push_back(fmt::format("another machine: {}, {} threads now; {}, {} threads before",
                                       now.machine.cpu, now.machine.threads, before.machine.cpu,
                                       before.machine.threads));
  }
  compare_rates("read rate (bytes)", now.read_rate, before.read_rate, result.notes);
  compare_rates("GEMM rate (flops)", now.gemm_rate(), before.gemm_rate(), result.notes);
  return result;
}

}  // namespace diffkv::bench
