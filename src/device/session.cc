#include "device/session.h"

#include <fmt/format.h>

#include <chrono>
#include <cstring>
#include <vector>

#include "device/cuda_session.h"
#include "device/memory_stream.h"
#include "diffkv/error.h"

namespace diffkv::device {
namespace {

using Clock = std::chrono::steady_clock;

class HostMarks final : public Marks {
 public:
  explicit HostMarks(std::size_t count) : times_(count) {}
  void set(std::size_t mark) override { times_.at(mark) = Clock::now(); }
  double seconds(std::size_t from, std::size_t to) override {
    return std::chrono::duration<double>(times_.at(to) - times_.at(from)).count();
  }

 private:
  std::vector<Clock::time_point> times_;
};

// Every call is done when it returns.
class HostSession final : public Session {
 public:
  using Session::Session;

  Stream stream() const override { return {}; }
  std::unique_ptr<Marks> make_marks(std::size_t count) const override {
    return std::make_unique<HostMarks>(count);
  }
  std::string cannot_record() const override {
    return fmt::format("backend {} computes on the host, where there are no graphs",
                       backend().name());
  }
  std::unique_ptr<Recording> record(const std::function<void()>& /*work*/) const override {
    throw Error(ErrorCode::kUnsupported, cannot_record());
  }
  void copy(void* to, const void* from, std::int64_t bytes) const override {
    if (bytes > 0) std::memcpy(to, from, static_cast<std::size_t>(bytes));
  }
  double measure_read_rate() override { return measure_host_read_rate(); }
};

}  // namespace

std::unique_ptr<Session> open_session(const Backend& backend) {
  if (const Support available = backend.available(); !available) {
    throw Error(ErrorCode::kUnavailable,
                fmt::format("backend {} is not available: {}", backend.name(), available.reason));
  }
  if (computes_on_host(backend)) return std::make_unique<HostSession>(backend);
  return open_cuda_session(backend);
}

}  // namespace diffkv::device
