// Two results side by side.
#pragma once

#include <string>
#include <vector>

#include "bench/harness/run.h"

namespace diffkv::bench {

// The same scenarios run several times, as one run: of each scenario the result with the least
// median (a wrong one before all), and the best rates. What others do on a machine only makes times
// longer, so on a shared one the least of several medians is nearest to the truth. The rest is the
// first run's. Throws Error(kInvalidArgument) if there is no run, or a scenario is another problem
// in one of them.
RunResult best_of(const std::vector<RunResult>& runs);

struct Comparison {
  std::string name;
  Timing now;
  Timing before;
  Verdict verdict = Verdict::kWithinNoise;

  // How many times as fast as before.
  double speed_up() const { return before.median_s / now.median_s; }
};

struct ComparisonResult {
  std::vector<Comparison> scenarios;  // timed in both, in the order of `now`
  // What to know before believing the figures: scenarios that are not the same problem or were not
  // timed in both, machines or rates that differ. A sentence each.
  std::vector<std::string> notes;
};

// Throws Error(kInvalidArgument) if no scenario was timed in both.
ComparisonResult compare(const RunResult& now, const RunResult& before);

}  // namespace diffkv::bench
