// The reference of what is not attention itself: cache update and merging.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "verify/codec.h"
#include "verify/reference.h"

namespace diffkv::verify {
namespace {

void write_row(const ConstTensorView& from, std::int64_t token, std::int64_t head,
               std::int64_t size, double scale, const KvPlane& plane, std::int64_t to) {
  const std::int64_t at = token * from.strides[0] + head * from.strides[1];
  for (std::int64_t d = 0; d < size; ++d) {
    // The same type is copied: it already is what the cache holds.
    const std::uint32_t bits =
        from.dtype == plane.dtype
            ? load_bits(from.data, from.dtype, at + d)
            : cache_bits(plane.dtype, load(from.data, from.dtype, at + d), scale);
    store_bits(plane.data, plane.dtype, to + d, bits);
  }
}

double part_lse(const AttnState& part, std::int64_t token, std::int64_t head) {
  const double lse =
      load(part.lse.data, part.lse.dtype, head * part.lse.strides[0] + token * part.lse.strides[1]);
  return lse == std::numeric_limits<double>::infinity() ? -lse : lse;
}

}  // namespace

std::uint32_t cache_bits(DType stored, double value, double scale) {
  if (!is_fp8(stored)) return encode(stored, value, Overflow::kInfinity);
  const float quotient = static_cast<float>(value) / static_cast<float>(scale);
  return encode(stored, quotient, Overflow::kSaturate);
}

void reference_update(const ConstTensorView& key, const ConstTensorView& value,
                      const KvCacheView& cache, const ConstTensorView& slot_mapping) {
  for (std::int64_t token = 0; token < slot_mapping.shape[0]; ++token) {
    const std::int64_t slot = index_at(slot_mapping, token);
    if (slot < 0) continue;
    const std::int64_t block = slot / cache.block_size;
    const std::int64_t offset = slot % cache.block_size;
    if (block >= cache.num_blocks) {
      throw Error(ErrorCode::kInvalidArgument,
                  fmt::format("reference_update: slot_mapping[{}] is {}, the cache has {} slots",
                              token, slot, cache.num_blocks * cache.block_size));
    }
    for (std::int64_t head = 0; head < cache.num_kv_heads; ++head) {
      const auto row_of = [&](const KvPlane& plane) {
        return block * plane.stride_block + offset * plane.stride_token + head * plane.stride_head;
      };
      write_row(key, token, head, cache.head_size_qk, scale_of(cache.k_scale, head), cache.key,
                row_of(cache.key));
      write_row(value, token, head, cache.head_size_v, scale_of(cache.v_scale, head), cache.value,
                row_of(cache.value));
    }
  }
}

RowRef reference_merge_row(const AttnState& a, const AttnState& b, const ConstTensorView& sinks,
                           std::int64_t token, std::int64_t head) {
  constexpr double kNone = -std::numeric_limits<double>::infinity();
  const double sink = sinks.given() ? load_at(sinks, head) : kNone;
  const AttnState* parts[] = {&a, &b};
  const double lses[] = {part_lse(a, token, head), part_lse(b, token, head)};

  RowRef result;
  result.output.assign(static_cast<std::size_t>(a.output.shape[2]), 0.0);
  result.lse = sink;
  if (lses[0] == kNone && lses[1] == kNone) return result;

  const double shift = std::max({lses[0], lses[1], sink});
  double denominator = sink == kNone ? 0 : std::exp(sink - shift);
  for (int i = 0; i < 2; ++i) {
    if (lses[i] == kNone) continue;
    const double weight = std::exp(lses[i] - shift);
    denominator += weight;
    const ConstTensorView& part = parts[i]->output;
    for (std::size_t d = 0; d < result.output.size(); ++d) {
      result.output[d] += weight * load(part.data, part.dtype,
                                        token * part.strides[0] + head * part.strides[1] +
                                            static_cast<std::int64_t>(d) * part.strides[2]);
    }
  }
  for (double& x : result.output) x /= denominator;
  result.lse = shift + std::log(denominator);
  return result;
}

}  // namespace diffkv::verify
