#include "bench/harness/meter.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <vector>

namespace diffkv::bench {
namespace {

class HostMeter final : public Meter {
 public:
  explicit HostMeter(Flush& flush) : flush_(flush) {}

  Timing time(const Repetitions& repetitions, const std::function<void()>& work) override {
    return time_cold(flush_, repetitions, work);
  }
  double take_read_rate() override { return flush_.take_median_rate(); }
  double floor_s(double /*read_bytes*/, double /*written_bytes*/) override { return 0.0; }

 private:
  Flush& flush_;
};

class DeviceMeter final : public Meter {
 public:
  explicit DeviceMeter(device::Session& session)
      : session_(session), marks_(session.make_marks(2)) {}

  Timing time(const Repetitions& repetitions, const std::function<void()>& work) override {
    using Clock = std::chrono::steady_clock;
    const auto recording = session_.record(work);
    const int least = std::max(repetitions.least, kLeast);
    std::vector<double> times;
    const auto start = Clock::now();
    for (int i = -kWarmUps; i < std::max(repetitions.most, least); ++i) {
      const std::chrono::duration<double> elapsed = Clock::now() - start;
      if (i >= least && elapsed.count() >= repetitions.seconds) break;
      session_.cold_reads()->flush();
      marks_->set(0);
      recording->launch();
      marks_->set(1);
      const double seconds = marks_->seconds(0, 1);
      if (i >= 0) times.push_back(seconds);
    }
    return summarize(times);
  }
  double take_read_rate() override { return 0.0; }
  double floor_s(double read_bytes, double written_bytes) override {
    return session_.cold_reads()->seconds(static_cast<std::int64_t>(read_bytes),
                                          static_cast<std::int64_t>(written_bytes));
  }

 private:
  // A device's launches vary more than the host's calls, and take microseconds.
  static constexpr int kLeast = 20;
  static constexpr int kWarmUps = 3;

  device::Session& session_;
  std::unique_ptr<device::Marks> marks_;
};

}  // namespace

std::unique_ptr<Meter> host_meter(Flush& flush) { return std::make_unique<HostMeter>(flush); }

std::unique_ptr<Meter> device_meter(device::Session& session) {
  return std::make_unique<DeviceMeter>(session);
}

}  // namespace diffkv::bench
