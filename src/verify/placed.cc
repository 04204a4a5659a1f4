#include "verify/placed.h"

#include <fmt/format.h>

#include <array>
#include <utility>

namespace diffkv::verify {
namespace {

using Zone = std::array<std::byte, GuardedBuffer::kGuardBytes>;

// The zone whose first byte has this index, see GuardedBuffer::guard_byte.
Zone guard_zone(std::int64_t first) {
  Zone zone{};
  for (std::size_t i = 0; i < zone.size(); ++i) {
    zone[i] = GuardedBuffer::guard_byte(first + static_cast<std::int64_t>(i));
  }
  return zone;
}

}  // namespace

PlacedProblem::PlacedProblem(const Backend& backend, GeneratedProblem& problem,
                             const Device& device)
    : backend_(&backend), problem_(&problem), device_(device), mirror_(backend, device) {
  for (const auto& buffer : problem.buffers()) mirror_.add(buffer->whole(), buffer->whole_bytes());
  mirror_.upload();
  params_ = mirror_.on_device(problem.params());
  args_ = mirror_.on_device(problem.args());
  new_key_ = mirror_.on_device(problem.new_key());
  new_value_ = mirror_.on_device(problem.new_value());
  slot_mapping_ = mirror_.on_device(problem.slot_mapping());
}

void PlacedProblem::poison_outputs() {
  fetch();
  problem_->poison_outputs();
  mirror_.upload();
}

GuardedMemory::GuardedMemory(const Backend& backend, std::string name, std::int64_t bytes,
                             const Device& device)
    : backend_(&backend),
      name_(std::move(name)),
      bytes_(bytes),
      memory_(backend, bytes + 2 * GuardedBuffer::kGuardBytes, device) {
  const Zone before = guard_zone(-GuardedBuffer::kGuardBytes);
  const Zone behind = guard_zone(bytes_);
  memory_.fill(0xff);
  memory_.upload(before.data(), GuardedBuffer::kGuardBytes);
  memory_.upload(behind.data(), GuardedBuffer::kGuardBytes, GuardedBuffer::kGuardBytes + bytes_);
  backend_->synchronize(memory_.device(), {});
}

std::string GuardedMemory::guard_damage() const {
  Zone before{};
  Zone behind{};
  memory_.download(before.data(), GuardedBuffer::kGuardBytes);
  memory_.download(behind.data(), GuardedBuffer::kGuardBytes, GuardedBuffer::kGuardBytes + bytes_);
  backend_->synchronize(memory_.device(), {});
  const auto damage = [&](const Zone& zone, std::int64_t first) -> std::string {
    const Zone whole = guard_zone(first);
    for (std::size_t i = 0; i < zone.size(); ++i) {
      if (zone[i] == whole[i]) continue;
      const std::int64_t index = first + static_cast<std::int64_t>(i);
      return fmt::format("{}: byte {} {} was overwritten", name_,
                         index < 0 ? -index : index - bytes_ + 1,
                         index < 0 ? "before its start" : "past its end");
    }
    return "";
  };
  std::string what = damage(before, -GuardedBuffer::kGuardBytes);
  return what.empty() ? damage(behind, bytes_) : what;
}

}  // namespace diffkv::verify
