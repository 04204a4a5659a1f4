#include "bench/harness/flush.h"

#include <sys/resource.h>

#include <algorithm>
#include <chrono>
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

Timing time_cold(Flush& flush, const Repetitions& repetitions, const std::function<void()>& call) {
  using Clock = std::chrono::steady_clock;
  using Seconds = std::chrono::duration<double>;
  std::vector<double> times;
  std::int64_t preempted = 0;
  double total = 0.0;
  const auto start = Clock::now();
  for (int i = 0; i < repetitions.most; ++i) {
    if (i >= repetitions.least && Seconds(Clock::now() - start).count() >= repetitions.seconds) {
      break;
    }
    flush();
    const std::int64_t preempted_before = preemptions();
    const auto before = Clock::now();
    call();
    times.push_back(Seconds(Clock::now() - before).count());
    preempted += preemptions() - preempted_before;
    total += times.back();
  }
  Timing timing = summarize(times);
  timing.preemptions_per_s = total > 0.0 ? static_cast<double>(preempted) / total : 0.0;
  return timing;
}

}  // namespace diffkv::bench
