#include "bench/harness/flush.h"

#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <numeric>
#include <vector>

#include "device/memory_stream.h"
#include "replay/stats.h"

namespace diffkv::bench {
namespace {

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

std::vector<Timing> time_cold(Flush& flush, const Repetitions& repetitions,
                              const std::vector<std::function<void()>>& calls) {
  using Clock = std::chrono::steady_clock;
  using Seconds = std::chrono::duration<double>;
  const double limit = repetitions.seconds * static_cast<double>(calls.size());
  std::vector<std::vector<double>> times(calls.size());
  std::vector<std::int64_t> preempted(calls.size(), 0);
  const auto start = Clock::now();
  for (int round = 0; round < repetitions.most; ++round) {
    if (round >= repetitions.least && Seconds(Clock::now() - start).count() >= limit) break;
    for (std::size_t i = 0; i < calls.size(); ++i) {
      flush();
      const std::int64_t preempted_before = preemptions();
      const auto before = Clock::now();
      calls[i]();
      times[i].push_back(Seconds(Clock::now() - before).count());
      preempted[i] += preemptions() - preempted_before;
    }
  }
  std::vector<Timing> timings = summarize_rounds(times);
  for (std::size_t i = 0; i < calls.size(); ++i) {
    const double total = std::accumulate(times[i].begin(), times[i].end(), 0.0);
    if (total > 0.0) timings[i].preemptions_per_s = static_cast<double>(preempted[i]) / total;
  }
  return timings;
}

}  // namespace diffkv::bench
