// Timing from cold caches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "bench/harness/machine.h"
#include "bench/harness/timing.h"

namespace diffkv::bench {

// What pushes everything out of the caches and, by that, measures the rate of reading memory.
class Flush {
 public:
  // Allocates flush_bytes(machine).
  explicit Flush(const Machine& machine);
  ~Flush();
  Flush(const Flush&) = delete;
  Flush& operator=(const Flush&) = delete;

  std::int64_t bytes() const;
  // Bytes per second of the best read of a part, ever.
  double best_rate() const;

  // Reads the whole buffer with all threads.
  void operator()();

  // The median rate of the parts read since this was last asked for.
  double take_median_rate();

 private:
  struct Parts;
  std::unique_ptr<Parts> parts_;
};

// How often each call is repeated: until `seconds` for each have passed, flushes included, within
// bounds.
struct Repetitions {
  int least = 5;
  int most = 1000;
  double seconds = 0.0;
};

// Rounds of one repetition of each of so many calls; repeat(i) repeats call i and returns its
// seconds. Of the first rounds, `warm_ups`, nothing counts.
std::vector<Timing> time_rounds(const Repetitions& repetitions, int warm_ups, std::size_t calls,
                                const std::function<double(std::size_t)>& repeat);

// Flushes and times each call, again and again, in such rounds.
std::vector<Timing> time_cold(Flush& flush, const Repetitions& repetitions,
                              const std::vector<std::function<void()>>& calls);

}  // namespace diffkv::bench
