// Partials of a row, merged, and the row's end: what combine and the kernels that merge their own
// tiles share. Of numbers that are merged all weights are quicker than core's, and right to 2^-22.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numbers>

#include "core/dtype.h"
#include "core/softmax.h"
#include "cuda/generic/ptx.cuh"
#include "cuda/kv_codec.cuh"
#include "cuda/params.h"
#include "cuda/row_io.cuh"

namespace diffkv::cuda {

// exp(a - b), 0 where nothing is there.
__device__ inline float exp_difference(float a, float b) {
  return ptx::exp2((a - (b == core::kNegInf ? 0.0F : b)) * std::numbers::log2e_v<float>);
}

// A NaN score leaves the max alone but makes the sum NaN, also of a part whose max is -inf.
__device__ inline float scaled_sum(const core::SoftmaxState& state, float by) {
  return isnan(state.sum) ? state.sum : state.sum * by;
}

__device__ inline void scale(float4& x, float by) {
  x = make_float4(x.x * by, x.y * by, x.z * by, x.w * by);
}
__device__ inline void add_scaled(float4& x, float by, const float4& other) {
  x.x = fmaf(other.x, by, x.x);
  x.y = fmaf(other.y, by, x.y);
  x.z = fmaf(other.z, by, x.z);
  x.w = fmaf(other.w, by, x.w);
}

// Four results of fp8, which are the ones that have a scale. A call: its instructions are many, and
// seldom needed.
inline __device__ __noinline__ void store_fp8(DType dtype, float4 x, float by, std::byte* to) {
  *reinterpret_cast<std::uint32_t*>(to) = fp8_word(dtype, x.x / by, x.y / by, x.z / by, x.w / by);
}

// Where a row of the output is, and what its end needs; nowhere if it is not written.
struct MergedRow {
  std::byte* to = nullptr;
  std::int32_t token = 0;
  std::int32_t head = 0;
  RowScales scales{};

  MergedRow() = default;
  // Row `index` of a KV head of the sequence that starts at `first_token`.
  __device__ MergedRow(const AttendKernelParams& params, std::int32_t first_token,
                       std::int32_t kv_head, std::int32_t index) {
    const RowPlace place = row_place(first_token, kv_head, params.schedule.group, index);
    token = static_cast<std::int32_t>(place.token);
    head = place.head;
    if (place.token >= params.schedule.tables.num_tokens) return;
    to = row_at(params.output, place.token, head);
    scales = row_scales(params, head, kv_head);
  }

  // What the sums of the row are multiplied with, and whether they are of no key: core::finish to
  // 2^-22. Also writes the row's lse if it is this lane that `writes_lse`.
  __device__ float end(const AttendKernelParams& params, const core::SoftmaxState& state,
                       bool writes_lse, bool& empty) const {
    const float sink = scales.sink;
    empty = state.max == core::kNegInf && state.sum == 0.0F && !isnan(sink);
    const float max = fmaxf(state.max, sink);  // not of a NaN
    const float keep = exp_difference(state.max, max);
    // A sink of +inf takes all.
    const float of_sink = sink == -core::kNegInf ? 1.0F : exp_difference(sink, max);
    const float sum = fmaf(state.sum, keep, of_sink);
    if (writes_lse && params.lse != nullptr) {
      write_lse(params, token, head, max + std::log(sum));
    }
    return __fdividef(keep, sum) * scales.value;
  }

  // A lane writes its columns: four from `column` on, and so many of every kStep.
  template <int kStep, int kVectors>
  __device__ void write(const AttendKernelParams& params, const core::SoftmaxState& state,
                        std::int32_t column, const float4 (&acc)[kVectors]) const {
    bool empty;
    const bool writes = to != nullptr;
    const float factor = end(params, state, writes && column == 0, empty);
    if (!writes) return;
    const DType dtype = params.output.dtype;
    // As size_of says, without its jumps.
    const int bytes = dtype == DType::kF32 ? 4 : is_fp8(dtype) ? 1 : 2;
    std::byte* at = to + column * bytes;
#pragma unroll
    for (int v = 0; v < kVectors; ++v, column += kStep, at += kStep * bytes) {
      if (column >= params.head_size_v) break;
      float4 x = acc[v];
      scale(x, factor);
      if (empty) x = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
      if (is_fp8(dtype)) {
        store_fp8(dtype, x, scales.output, at);
      } else if (dtype == DType::kF32) {
        *reinterpret_cast<float4*>(at) = x;
      } else {
        const bool half = dtype == DType::kF16;
        *reinterpret_cast<uint2*>(at) =
            make_uint2(half ? ptx::pack<__half>(x.x, x.y) : ptx::pack<__nv_bfloat16>(x.x, x.y),
                       half ? ptx::pack<__half>(x.z, x.w) : ptx::pack<__nv_bfloat16>(x.z, x.w));
      }
    }
  }
};

}  // namespace diffkv::cuda
