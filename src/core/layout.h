// Laying arrays out in one piece of memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace diffkv::core {

// Hands out memory in pieces of 64 bytes; with a null base it only counts.
class Layout {
 public:
  explicit Layout(void* base) : base_(static_cast<std::byte*>(base)) {}

  template <class T>
  T* take(std::int64_t count) {
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + bytes_);
    const std::int64_t bytes = count * static_cast<std::int64_t>(sizeof(T));
    bytes_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return piece;
  }

  std::int64_t bytes() const { return bytes_; }

 private:
  static constexpr std::int64_t kAlignment = 64;

  std::byte* base_;
  std::int64_t bytes_ = 0;
};

}  // namespace diffkv::core
