#include "bench/harness/flush.h"

#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <vector>

#include "device/memory_stream.h"
#include "replay/stats.h"

namespace diffkv::bench {
namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

// A pass over one part takes less than a millisecond: short enough that some are undisturbed on a
// machine that others use too.
constexpr std::int64_t kPartBytes = std::int64_t{16} << 20;

// Times that the system has taken the processor from a thread of this process that could have run.
std::int64_t preemptions() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_nivcsw;
}

}  // namespace

struct Flush::Parts {
  std::vector<device::MemoryStream> streams;
  std::vector<double> rates;
  double best_rate = 0.0;
};

Flush::Flush(const Machine& machine) : parts_(std::make_unique<Parts>()) {
  for (std::int64_t done = 0; done < flush_bytes(machine); done += kPartBytes) {
    parts_->streams.emplace_back(kPartBytes);
  }
}

Flush::~Flush() = default;

std::int64_t Flush::bytes() const {
  return static_cast<std::int64_t>(parts_->streams.size()) * kPartBytes;
}

double Flush::best_rate() const { return parts_->best_rate; }

void Flush::operator()() {
  for (device::MemoryStream& stream : parts_->streams) {
    parts_->rates.push_back(stream.read());
    parts_->best_rate = std::max(parts_->best_rate, parts_->rates.back());
  }
}

double Flush::take_median_rate() {
  const double median = replay::percentile(parts_->rates, 50);
  parts_->rates.clear();
  return median;
}

std::vector<Timing> time_rounds(const Repetitions& repetitions, int warm_ups, std::size_t calls,
                                const std::function<double(std::size_t)>& repeat) {
  const double limit = repetitions.seconds * static_cast<double>(calls);
  std::vector<std::vector<double>> times(calls);
  const auto start = Clock::now();
  for (int round = -warm_ups; round < repetitions.most; ++round) {
    if (round >= repetitions.least && Seconds(Clock::now() - start).count() >= limit) break;
    for (std::size_t i = 0; i < calls; ++i) {
      const double seconds = repeat(i);
      if (round >= 0) times[i].push_back(seconds);
    }
  }
  return summarize_rounds(times);
}

std::vector<Timing> time_cold(Flush& flush, const Repetitions& repetitions,
                              const std::vector<std::function<void()>>& calls) {
  std::vector<double> totals(calls.size(), 0.0);
  std::vector<std::int64_t> preempted(calls.size(), 0);
  std::vector<Timing> timings = time_rounds(repetitions, 0, calls.size(), [&](std::size_t i) {
    flush();
    const std::int64_t preempted_before = preemptions();
    const auto before = Clock::now();
    calls[i]();
    const double seconds = Seconds(Clock::now() - before).count();
    preempted[i] += preemptions() - preempted_before;
    totals[i] += seconds;
    return seconds;
  });
  for (std::size_t i = 0; i < calls.size(); ++i) {
    if (totals[i] > 0.0) {
      timings[i].preemptions_per_s = static_cast<double>(preempted[i]) / totals[i];
    }
  }
  return timings;
}

}  // namespace diffkv::bench
