// A session on a device of separate memory, with recordings and cold reads of a made-up speed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "device/session.h"
#include "tests/device/separate_memory.h"

namespace diffkv::testing {

class SeparateSession final : public device::Session, private device::ColdReads {
 public:
  static constexpr double kReadRate = 1e9;  // bytes per second

  explicit SeparateSession(const SeparateMemoryBackend& backend);

  std::int64_t recordings() const { return recordings_; }
  std::int64_t launches() const { return *launches_; }
  std::int64_t flushes() const { return flushes_; }

  Stream stream() const override { return {}; }
  std::unique_ptr<device::Marks> make_marks(std::size_t count) const override;
  std::string cannot_record() const override { return ""; }
  std::unique_ptr<device::Recording> record(const std::function<void()>& work) const override;
  void copy(void* to, const void* from, std::int64_t bytes) const override {
    separate_->copy_within(to, from, bytes);
  }
  double measure_read_rate() override { return kReadRate; }
  device::ColdReads* cold_reads() override { return this; }

 private:
  void flush() override { ++flushes_; }
  double seconds(std::int64_t read_bytes, std::int64_t written_bytes) override {
    return static_cast<double>(read_bytes + written_bytes) / kReadRate;
  }

  const SeparateMemoryBackend* separate_;
  std::unique_ptr<device::Session> host_;  // for its clock
  std::shared_ptr<std::int64_t> launches_ = std::make_shared<std::int64_t>(0);
  mutable std::int64_t recordings_ = 0;
  std::int64_t flushes_ = 0;
};

}  // namespace diffkv::testing
