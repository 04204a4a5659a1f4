// Two results side by side.
#pragma once

#include <string>
#include <vector>

#include "bench/harness/run.h"

namespace diffkv::bench {

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
