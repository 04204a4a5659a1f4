// Timing of work from cold caches, on the host or on a device.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "bench/harness/flush.h"
#include "bench/harness/timing.h"
#include "device/session.h"

namespace diffkv::bench {

class Meter {
 public:
  virtual ~Meter() = default;

  // Times each of `works`, which give the session's stream something to do, again and again, in
  // rounds of one repetition of each, each time from cold caches.
  virtual std::vector<Timing> time(const Repetitions& repetitions,
                                   const std::vector<std::function<void()>>& works) = 0;
  Timing time(const Repetitions& repetitions, const std::function<void()>& work) {
    return time(repetitions, std::vector<std::function<void()>>{work})[0];
  }
  // Bytes per second of reading memory in between, since last asked; 0 where it is not known.
  virtual double take_read_rate() = 0;
  // Seconds that one launch takes only to move the bytes; 0 where that is not measured for itself.
  virtual double floor_s(double read_bytes, double written_bytes) = 0;
};

// By the host's clock; all threads read `flush` in between.
std::unique_ptr<Meter> host_meter(Flush& flush);

// By the device's clock. The work is recorded first, so that launches cost the host nothing. The
// session must have cold reads and outlive it.
std::unique_ptr<Meter> device_meter(device::Session& session);

}  // namespace diffkv::bench
