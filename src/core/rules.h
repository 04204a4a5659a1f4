// What the rules about tensors are made of: each check throws Error(kInvalidArgument) that names
// the tensor, what was passed and what was expected. None of them reads a tensor's elements.
#pragma once

#include <fmt/format.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string_view>
#include <utility>

#include "diffkv/cache.h"
#include "diffkv/error.h"
#include "diffkv/tensor.h"

namespace diffkv::core {

// Counts and lengths that int32 arithmetic must hold.
inline constexpr std::int64_t kMaxInt32 = std::numeric_limits<std::int32_t>::max();

// Throws Error(kInvalidArgument) with the formatted message.
template <class... Args>
[[noreturn]] void refuse(fmt::format_string<Args...> format, Args&&... args) {
  throw Error(ErrorCode::kInvalidArgument, fmt::format(format, std::forward<Args>(args)...));
}

// One dimension of an expected shape.
struct Dim {
  enum class Rule : std::uint8_t { kAny, kExactly, kAtLeast, kAtMost };

  std::string_view name;
  Rule rule = Rule::kAny;
  std::int64_t extent = 0;
  // Says who expects the extent; the extent follows it in the message.
  std::string_view because = "expected";
};

constexpr Dim any_extent(std::string_view name) { return {name, Dim::Rule::kAny, 0, ""}; }
constexpr Dim exactly(std::string_view name, std::int64_t extent,
                      std::string_view because = "expected") {
  return {name, Dim::Rule::kExactly, extent, because};
}
constexpr Dim at_least(std::string_view name, std::int64_t extent,
                       std::string_view because = "expected at least") {
  return {name, Dim::Rule::kAtLeast, extent, because};
}
constexpr Dim at_most(std::string_view name, std::int64_t extent,
                      std::string_view because = "expected at most") {
  return {name, Dim::Rule::kAtMost, extent, because};
}

// The types that queries, and that stored keys and values, may have.
inline constexpr std::array kQueryDTypes = {DType::kF32, DType::kF16, DType::kBF16, DType::kE4M3};
inline constexpr std::array kKvDTypes = {DType::kF32, DType::kF16, DType::kBF16, DType::kE4M3,
                                         DType::kE5M2};
// What may be written into a cache: plain types, and fp8 as it is.
inline constexpr std::array kInputDTypes = kKvDTypes;
// Those that need no scale.
inline constexpr std::array kPlainDTypes = {DType::kF32, DType::kF16, DType::kBF16};

// A view of a list of dtypes.
class DTypes {
 public:
  template <std::size_t kCount>
  constexpr DTypes(const std::array<DType, kCount>& list)  // NOLINT(google-explicit-constructor)
      : first_(list.data()), count_(kCount) {}
  constexpr DTypes(const DType& one)  // NOLINT(google-explicit-constructor)
      : first_(&one) {}

  constexpr const DType* begin() const { return first_; }
  constexpr const DType* end() const { return first_ + count_; }

 private:
  const DType* first_;
  std::size_t count_ = 1;
};

// Refuses a dtype that is not in the list.
void check_dtype(std::string_view name, DType dtype, DTypes allowed);

// Refuses anything but 8, 16, .. 576.
void check_head_size(std::string_view name, std::int64_t size);

// What addresses and strides of rows of this dtype are multiples of, in bytes.
constexpr std::int64_t row_alignment(DType dtype) {
  return size_of(dtype) >= 2 ? 16 : 8;  // min(16, 8 x element bytes)
}

// True if some extent is 0: data may be null and strides mean nothing.
bool is_empty(const ConstTensorView& view);

// A tensor that must be given, of that dtype and shape; its element count and its span in bytes fit
// in int64; it has data if it has elements, at a multiple of the element's size.
void check_tensor(std::string_view name, const ConstTensorView& view, DTypes dtypes,
                  std::initializer_list<Dim> dims);

// Elements of the last dimension are neighbours.
void check_last_contiguous(std::string_view name, const ConstTensorView& view);

// Rows (the last dimension) are contiguous and start at multiples of min(16, 8 x element bytes)
// bytes, so that kernels may read and write them in vectors.
void check_rows(std::string_view name, const ConstTensorView& view);

// No two elements share memory. A view passes if each dimension steps over all faster ones, which
// holds for every slice and permutation of a dense tensor.
void check_no_overlap(std::string_view name, const ConstTensorView& view);

// What is written shares no memory with something else that the call uses; compared by the bytes
// that each reaches over. Views that are not given, or empty, are apart from everything.
void check_apart(std::string_view name, const ConstTensorView& written, std::string_view other_name,
                 const ConstTensorView& other);

// Two tensors of a call are on one device.
void check_device(std::string_view name, const Device& device, std::string_view other_name,
                  const Device& other);

// A plane of a cache as a tensor [num_blocks, block_size, num_kv_heads, head_size].
ConstTensorView plane_tensor(const KvCacheView& cache, const KvPlane& plane,
                             std::int64_t head_size);

}  // namespace diffkv::core
