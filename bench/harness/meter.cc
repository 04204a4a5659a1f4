#include "bench/harness/meter.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace diffkv::bench {
namespace {

class HostMeter final : public Meter {
 public:
  explicit HostMeter(Flush& flush) : flush_(flush) {}

  std::vector<Timing> time(const Repetitions& repetitions,
                           const std::vector<std::function<void()>>& works) override {
    return time_cold(flush_, repetitions, works);
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

  std::vector<Timing> time(const Repetitions& repetitions,
                           const std::vector<std::function<void()>>& works) override {
    std::vector<std::unique_ptr<device::Recording>> recordings;
    for (const auto& work : works) recordings.push_back(session_.record(work));
    Repetitions own = repetitions;
    own.least = std::max(own.least, kLeast);
    own.most = std::max(own.most, own.least);
    return time_rounds(own, kWarmUps, works.size(), [&](std::size_t i) {
      session_.cold_reads()->flush();
      marks_->set(0);
      recordings[i]->launch();
      marks_->set(1);
      return marks_->seconds(0, 1);
    });
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
