// New keys and values into their slots. Copies where the types agree, else converts row by row.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/dtype.h"
#include "cpu/kernels.h"
#include "cpu/row_io.h"
#include "cpu/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/update_cache.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// Highway's headers must come after foreach_target.h.
#include "cpu/codec-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace diffkv::cpu::HWY_NAMESPACE {
namespace {

// Writes the heads of one token of K or V at its slot.
void write_token(const ConstTensorView& src, std::int64_t token, const KvPlane& plane,
                 const ConstTensorView& scale, std::int64_t block, std::int64_t offset) {
  constexpr std::int64_t kMostHeadSize = 576;
  HWY_ALIGN float row[kMostHeadSize];
  const std::int64_t num_heads = src.shape[1];
  const std::int64_t head_size = src.shape[2];
  for (std::int64_t head = 0; head < num_heads; ++head) {
    const auto* from = static_cast<const std::byte*>(src.data) +
                       (token * src.strides[0] + head * src.strides[1]) * size_of(src.dtype);
    auto* to =
        static_cast<std::byte*>(plane.data) +
        (block * plane.stride_block + offset * plane.stride_token + head * plane.stride_head) *
            size_of(plane.dtype);
    if (src.dtype == plane.dtype) {
      std::memcpy(to, from, static_cast<std::size_t>(head_size * size_of(src.dtype)));
      continue;
    }
    with_dtype(src.dtype, [&](auto dtype)
                              HWY_ATTR { load_row<decltype(dtype)::value>(from, head_size, row); });
    // A division, not a product with the reciprocal: every backend must give the same bytes.
    if (scale.given()) {
      const float divisor = scale_of(scale, head);
      for (std::int64_t i = 0; i < head_size; ++i) row[i] /= divisor;
    }
    core::store_row(plane.dtype, row, head_size, to);
  }
}

void run_part(const UpdateCall& call, std::int64_t part, std::int64_t parts) {
  const auto* slots = static_cast<const std::int64_t*>(call.slot_mapping.data);
  for (std::int64_t t = 0; t < call.slot_mapping.shape[0]; ++t) {
    const std::int64_t slot = slots[t * call.slot_mapping.strides[0]];
    if (slot < 0) continue;
    const std::int64_t block = slot / call.cache.block_size;
    if (block % parts != part) continue;
    const std::int64_t offset = slot - block * call.cache.block_size;
    write_token(call.key, t, call.cache.key, call.cache.k_scale, block, offset);
    write_token(call.value, t, call.cache.value, call.cache.v_scale, block, offset);
  }
}

}  // namespace
// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace diffkv::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace diffkv::cpu {

HWY_EXPORT(run_part);

void update_cache_part(const UpdateCall& call, std::int64_t part, std::int64_t parts) {
  HWY_DYNAMIC_DISPATCH(run_part)(call, part, parts);
}

}  // namespace diffkv::cpu
#endif  // HWY_ONCE
