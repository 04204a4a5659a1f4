#include "tests/device/separate_session.h"

#include <utility>

namespace diffkv::testing {
namespace {

using Mode = SeparateMemoryBackend::Mode;

class ModeScope {
 public:
  ModeScope(const SeparateMemoryBackend& backend, Mode mode) : backend_(backend) {
    backend_.set_mode(mode);
  }
  ~ModeScope() { backend_.set_mode(Mode::kNow); }
  ModeScope(const ModeScope&) = delete;
  ModeScope& operator=(const ModeScope&) = delete;

 private:
  const SeparateMemoryBackend& backend_;
};

// Recording sets no mark.
class SeparateMarks final : public device::Marks {
 public:
  SeparateMarks(const SeparateMemoryBackend& backend, std::unique_ptr<device::Marks> clock)
      : backend_(backend), clock_(std::move(clock)) {}
  void set(std::size_t mark) override {
    if (backend_.mode() != Mode::kRecording) clock_->set(mark);
  }
  double seconds(std::size_t from, std::size_t to) override { return clock_->seconds(from, to); }

 private:
  const SeparateMemoryBackend& backend_;
  std::unique_ptr<device::Marks> clock_;
};

class SeparateRecording final : public device::Recording {
 public:
  SeparateRecording(const SeparateMemoryBackend& backend, std::function<void()> work,
                    std::shared_ptr<std::int64_t> launches)
      : backend_(backend), work_(std::move(work)), launches_(std::move(launches)) {}
  void launch() override {
    const ModeScope scope(backend_, Mode::kLaunching);
    ++*launches_;
    work_();
  }

 private:
  const SeparateMemoryBackend& backend_;
  std::function<void()> work_;
  std::shared_ptr<std::int64_t> launches_;
};

}  // namespace

SeparateSession::SeparateSession(const SeparateMemoryBackend& backend)
    : Session(backend), separate_(&backend), host_(device::open_session(find_backend("cpu"))) {}

std::unique_ptr<device::Marks> SeparateSession::make_marks(std::size_t count) const {
  return std::make_unique<SeparateMarks>(*separate_, host_->make_marks(count));
}

std::unique_ptr<device::Recording> SeparateSession::record(
    const std::function<void()>& work) const {
  const ModeScope scope(*separate_, Mode::kRecording);
  ++recordings_;
  work();
  return std::make_unique<SeparateRecording>(*separate_, work, launches_);
}

}  // namespace diffkv::testing
