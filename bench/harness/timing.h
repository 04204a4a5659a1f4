// What repetitions of one measurement say.
#pragma once

#include <cstdint>
#include <vector>

namespace diffkv::bench {

struct Timing {
  std::int64_t repetitions = 0;
  double median_s = 0.0;
  double least_s = 0.0;
  double p25_s = 0.0;
  double p75_s = 0.0;
  // How often other processes took a processor away, per second of the measured calls.
  double preemptions_per_s = 0.0;
  // Of calls timed in turn: the median of its time over the first call's of the same round.
  double to_first = 1.0;

  // The middle half's width as a share of the median: what another run may differ by.
  double spread() const { return median_s > 0.0 ? (p75_s - p25_s) / median_s : 0.0; }
};

// Of seconds each; all 0 of none.
Timing summarize(const std::vector<double>& seconds);

// Of rounds [calls, rounds] of seconds each: a timing a call.
std::vector<Timing> summarize_rounds(const std::vector<std::vector<double>>& seconds);

// How one timing stands to another.
enum class Verdict : std::uint8_t { kFaster, kSlower, kWithinNoise };

// Faster or slower if the medians differ by more than 2 % and the middle halves do not overlap.
Verdict judge(const Timing& now, const Timing& before);

}  // namespace diffkv::bench
