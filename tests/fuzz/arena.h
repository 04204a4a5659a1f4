// Memory for tensors that a fuzzer makes up: every view gets a buffer of its own of exactly the
// bytes it spans, so that a sanitizer sees any access outside.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "bytes.h"
#include "diffkv/tensor.h"

namespace diffkv::fuzz {

// Lowest and highest element of a view, relative to its data.
struct Span {
  std::int64_t low = 0;
  std::int64_t high = -1;
  bool overflows = false;

  std::int64_t count() const { return high - low + 1; }
};

inline Span span_of(const TensorView& view) {
  Span span{0, 0, false};
  for (int i = 0; i < view.rank; ++i) {
    if (view.shape[i] <= 0) return {0, -1, false};
    std::int64_t reach = 0;
    std::int64_t& bound = view.strides[i] < 0 ? span.low : span.high;
    if (__builtin_mul_overflow(view.shape[i] - 1, view.strides[i], &reach) ||
        __builtin_add_overflow(bound, reach, &bound)) {
      return {0, -1, true};
    }
  }
  constexpr std::int64_t kFar = std::int64_t{1} << 58;
  if (span.high > kFar || span.low < -kFar) return {0, -1, true};
  return span;
}

class Arena {
 public:
  // Gives the view memory, filled from `bytes`, and sometimes an odd address. False where the view
  // spans more than a fuzzer can afford; a view whose span overflows keeps a small buffer, for no
  // call may get as far as using it.
  bool place(Bytes& bytes, TensorView& view) {
    const Span span = span_of(view);
    constexpr std::int64_t kMaxBytes = 1 << 20;
    const std::int64_t size = size_of(view.dtype);
    if (!span.overflows && span.count() > kMaxBytes / size) return false;
    const std::int64_t offset = bytes.one_in(60) ? bytes.range(1, 15) : 0;
    const std::int64_t needed = (span.overflows ? 0 : span.count() * size) + offset;
    if (needed == 0) return true;
    std::byte* data = take(needed);
    const auto seed = bytes.take<std::uint32_t>();
    for (std::int64_t i = 0; i < needed; ++i) {
      data[i] = static_cast<std::byte>((seed >> (i % 4 * 8)) + static_cast<std::uint32_t>(i) * 37);
    }
    view.data = data + offset - span.low * size;
    return true;
  }

  // Uninitialised memory at a multiple of 64.
  std::byte* take(std::int64_t count) {
    const auto size = static_cast<std::size_t>(count);
    buffers_.push_back({std::unique_ptr<std::byte, Free>(
                            static_cast<std::byte*>(::operator new(size, kAlignment))),
                        size});
    return buffers_.back().data.get();
  }

  std::vector<std::byte> snapshot() const {
    std::vector<std::byte> all;
    for (const Buffer& buffer : buffers_) {
      all.insert(all.end(), buffer.data.get(), buffer.data.get() + buffer.size);
    }
    return all;
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(std::byte* data) const { ::operator delete(data, kAlignment); }
  };
  struct Buffer {
    std::unique_ptr<std::byte, Free> data;
    std::size_t size;
  };
  std::vector<Buffer> buffers_;
};

}  // namespace diffkv::fuzz
