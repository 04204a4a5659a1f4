#include "bench/harness/compare.h"

#include <fmt/format.h>

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

}  // namespace

ComparisonResult compare(const RunResult& now, const RunResult& before) {
  ComparisonResult result;
  for (const ScenarioResult& scenario : now.scenarios) {
    if (scenario.attend.repetitions == 0) continue;
    const auto it =
        std::find_if(before.scenarios.begin(), before.scenarios.end(),
                     [&](const ScenarioResult& other) { return other.name == scenario.name; });
    if (it == before.scenarios.end() || it->attend.repetitions == 0) {
      result.notes.push_back(fmt::format("{} was not timed before", scenario.name));
    } else if (it->bytes != scenario.bytes || it->flops != scenario.flops) {
      result.notes.push_back(fmt::format(
          "{} is another problem: {:.0f} bytes and {:.0f} flops now, {:.0f} and {:.0f} before",
          scenario.name, scenario.bytes, scenario.flops, it->bytes, it->flops));
    } else {
      result.scenarios.push_back(
          {scenario.name, scenario.attend, it->attend, judge(scenario.attend, it->attend)});
    }
  }
  if (result.scenarios.empty()) {
    throw Error(ErrorCode::kInvalidArgument,
                "the two results have no scenario that was timed in both");
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
