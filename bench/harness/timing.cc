#include "bench/harness/timing.h"

#include <cstddef>

#include "replay/stats.h"

namespace diffkv::bench {

Timing summarize(const std::vector<double>& seconds) {
  return {.repetitions = static_cast<std::int64_t>(seconds.size()),
          .median_s = replay::percentile(seconds, 50),
          .least_s = replay::percentile(seconds, 0),
          .p25_s = replay::percentile(seconds, 25),
          .p75_s = replay::percentile(seconds, 75)};
}

std::vector<Timing> summarize_rounds(const std::vector<std::vector<double>>& seconds) {
  std::vector<Timing> timings;
  for (const std::vector<double>& times : seconds) {
    std::vector<double> ratios;
    for (std::size_t i = 0; i < times.size(); ++i) ratios.push_back(times[i] / seconds[0][i]);
    timings.push_back(summarize(times));
    timings.back().to_first = replay::percentile(ratios, 50);
  }
  return timings;
}

Verdict judge(const Timing& now, const Timing& before) {
  constexpr double kLeastChange = 0.02;
  if (now.p75_s < before.p25_s && now.median_s < before.median_s * (1 - kLeastChange)) {
    return Verdict::kFaster;
  }
  if (now.p25_s > before.p75_s && now.median_s > before.median_s * (1 + kLeastChange)) {
    return Verdict::kSlower;
  }
  return Verdict::kWithinNoise;
}

}  // namespace diffkv::bench
