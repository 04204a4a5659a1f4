#include "verify/buffer.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <utility>

namespace diffkv::verify {
namespace {

constexpr std::int64_t kAlignment = 64;

}  // namespace

// Differs from neighbour to neighbour, so that a shifted copy shows too.
std::byte GuardedBuffer::guard_byte(std::int64_t index) {
  return static_cast<std::byte>((0x5a + 37 * index) & 0xff);
}

GuardedBuffer::GuardedBuffer(std::string name, std::int64_t bytes, std::int64_t misalign)
    : name_(std::move(name)),
      bytes_(bytes),
      storage_(static_cast<std::size_t>(bytes + 2 * kGuardBytes + kAlignment + misalign)) {
  const auto address = reinterpret_cast<std::uintptr_t>(storage_.data());
  const auto past = static_cast<std::int64_t>(address % kAlignment);
  begin_ = kGuardBytes + (kAlignment - past) % kAlignment + misalign;
  for (std::int64_t i = 0; i < static_cast<std::int64_t>(storage_.size()); ++i) {
    storage_[static_cast<std::size_t>(i)] = guard_byte(i - begin_);
  }
  poison();
}

void GuardedBuffer::poison() {
  if (bytes_ > 0) std::memset(data(), 0xff, static_cast<std::size_t>(bytes_));
}

std::string GuardedBuffer::guard_damage() const {
  for (std::int64_t i = -begin_; i < static_cast<std::int64_t>(storage_.size()) - begin_; ++i) {
    if (i == 0) i = bytes_;
    if (storage_[static_cast<std::size_t>(i + begin_)] == guard_byte(i)) continue;
    return fmt::format("{}: byte {} {} was overwritten", name_, i < 0 ? -i : i - bytes_ + 1,
                       i < 0 ? "before its start" : "past its end");
  }
  return "";
}

std::string GuardedBuffer::changed() const {
  const auto [now, then] = std::mismatch(data(), data() + bytes_, frozen_.begin(), frozen_.end());
  if (now == data() + bytes_) return "";
  return fmt::format("{}: byte {} is {:#04x}, was {:#04x}", name_, now - data(),
                     static_cast<int>(*now), static_cast<int>(*then));
}

}  // namespace diffkv::verify
