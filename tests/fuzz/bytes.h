// A fuzzer's input as a source of choices. At its end every choice is the first one.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace diffkv::fuzz {

class Bytes {
 public:
  Bytes(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}

  template <class T>
  T take() {
    T value{};
    const std::size_t count = sizeof(T) < size_ ? sizeof(T) : size_;
    std::memcpy(&value, data_, count);
    data_ += count;
    size_ -= count;
    return value;
  }

  // low to high, both included.
  std::int64_t range(std::int64_t low, std::int64_t high) {
    const auto span = static_cast<std::uint64_t>(high) - static_cast<std::uint64_t>(low) + 1;
    const std::uint64_t draw = span <= 256 ? take<std::uint8_t>() : take<std::uint64_t>();
    return low + static_cast<std::int64_t>(span == 0 ? draw : draw % span);
  }

  // True once in `count`; false at the input's end.
  bool one_in(std::int64_t count) { return range(0, count - 1) == count - 1; }

  template <class T, std::size_t N>
  T pick(const std::array<T, N>& choices) {
    return choices[static_cast<std::size_t>(range(0, static_cast<std::int64_t>(N) - 1))];
  }

  // Mostly a small number around zero, at times an extreme one.
  std::int64_t odd_number() {
    if (!one_in(3)) return range(-3, 20);
    return pick(std::array<std::int64_t, 8>{INT32_MAX, INT32_MIN, INT64_MAX, INT64_MIN,
                                            std::int64_t{1} << 40, -(std::int64_t{1} << 40),
                                            std::int64_t{1} << 61, 1 << 20});
  }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
};

}  // namespace diffkv::fuzz
