// Two parts of a split attention into one, and the zeros of a profiling run: a warp a row.
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/dtype.h"
#include "core/softmax.h"
#include "cuda/device.h"
#include "cuda/kv_codec.cuh"
#include "cuda/row_io.cuh"
#include "cuda/stages.h"
#include "cuda/warp.cuh"

namespace diffkv::cuda {
namespace {

constexpr int kRowsPerBlock = 8;

struct LseParams {
  float* data;  // [num_heads, num_tokens] or null
  std::int64_t stride_head;
  std::int64_t stride_token;
};

struct MergeParams {
  RowsParams a;
  RowsParams b;
  RowsParams output;
  LseParams lse_a;
  LseParams lse_b;
  LseParams lse;
  VectorParams sinks;
  std::int64_t num_rows;  // num_tokens x num_heads
  std::int32_t num_heads;
  std::int32_t head_size;
};

__device__ float* lse_at(const LseParams& lse, std::int64_t token, std::int64_t head) {
  return lse.data + head * lse.stride_head + token * lse.stride_token;
}

__device__ float lse_of_part(const LseParams& lse, std::int64_t token, std::int64_t head) {
  const float x = *lse_at(lse, token, head);
  return x == std::numeric_limits<float>::infinity() ? core::kNegInf : x;
}

// The row of this warp, or false past the last.
__device__ bool own_row(std::int64_t num_rows, std::int32_t num_heads, std::int64_t& token,
                        std::int32_t& head) {
  const std::int64_t row = std::int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.x / kWarp;
  if (row >= num_rows) return false;
  token = row / num_heads;
  head = static_cast<std::int32_t>(row - token * num_heads);
  return true;
}

__global__ void __launch_bounds__(kWarp* kRowsPerBlock)
    merge_kernel(const __grid_constant__ MergeParams p) {
  std::int64_t token = 0;
  std::int32_t head = 0;
  if (!own_row(p.num_rows, p.num_heads, token, head)) return;
  const auto lane = static_cast<std::int32_t>(threadIdx.x) % kWarp;
  // exp(lse) is a sum of exps: as softmax states the parts have max = lse and sum = 1, and their
  // outputs are already divided by that sum.
  const float lse_a = lse_of_part(p.lse_a, token, head);
  const float lse_b = lse_of_part(p.lse_b, token, head);
  __syncwarp();  // the result's lse may lie over a part's
  core::SoftmaxState state{lse_a, lse_a == core::kNegInf ? 0.0F : 1.0F};
  const core::SoftmaxState other{lse_b, lse_b == core::kNegInf ? 0.0F : 1.0F};
  float keep = 0.0F;
  float add = 0.0F;
  core::merge(state, other, keep, add);
  if (std::isnan(lse_a) || std::isnan(lse_b)) state.sum = std::numeric_limits<float>::quiet_NaN();
  const float sink = p.sinks.data == nullptr
                         ? core::kNegInf
                         : core::load_element(p.sinks.dtype, p.sinks.data, head * p.sinks.stride);
  const core::SoftmaxEnd end = core::finish(state, sink);
  for (std::int32_t i = lane * kChunk; i < p.head_size; i += kWarp * kChunk) {
    float sum[kChunk] = {};
    float part[kChunk];
    // A part that saw nothing is left out: its rows may hold anything.
    if (lse_a != core::kNegInf) {
      load_chunk(p.a.dtype, row_at(p.a, token, head), i, part);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) sum[j] += keep * part[j];
    }
    if (lse_b != core::kNegInf) {
      load_chunk(p.b.dtype, row_at(p.b, token, head), i, part);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) sum[j] += add * part[j];
    }
#pragma unroll
    for (int j = 0; j < kChunk; ++j) sum[j] = end.empty ? 0.0F : sum[j] * end.factor;
    store_chunk(p.output.dtype, sum, row_at(p.output, token, head), i);
  }
  if (lane == 0 && p.lse.data != nullptr) *lse_at(p.lse, token, head) = end.lse;
}

__global__ void __launch_bounds__(kWarp* kRowsPerBlock)
    zero_kernel(RowsParams output, std::int64_t num_rows, std::int32_t num_heads,
                std::int32_t row_bytes) {
  std::int64_t token = 0;
  std::int32_t head = 0;
  if (!own_row(num_rows, num_heads, token, head)) return;
  std::byte* row = row_at(output, token, head);
  const auto lane = static_cast<std::int32_t>(threadIdx.x) % kWarp;
  const std::int32_t words = row_bytes / 8;
  for (std::int32_t i = lane; i < words; i += kWarp) {
    reinterpret_cast<uint2*>(row)[i] = make_uint2(0, 0);
  }
  if (words * 8 + lane < row_bytes) row[words * 8 + lane] = std::byte{0};
}

LseParams lse_params(const ConstTensorView& view) {
  if (!view.given()) return {};
  return {static_cast<float*>(const_cast<void*>(view.data)), view.strides[0], view.strides[1]};
}

unsigned blocks_of(std::int64_t rows) {
  return static_cast<unsigned>((rows + kRowsPerBlock - 1) / kRowsPerBlock);
}

}  // namespace

void merge_attn_states(const AttnState& a, const AttnState& b, const ConstTensorView& sinks,
                       const TensorView& output, const TensorView& lse, cudaStream_t stream) {
  MergeParams p{};
  p.a = rows_params(a.output);
  p.b = rows_params(b.output);
  p.output = rows_params(output);
  p.lse_a = lse_params(a.lse);
  p.lse_b = lse_params(b.lse);
  p.lse = lse_params(lse);
  p.sinks = vector_params(sinks);
  p.num_heads = static_cast<std::int32_t>(output.shape[1]);
  p.num_rows = output.shape[0] * output.shape[1];
  p.head_size = static_cast<std::int32_t>(output.shape[2]);
  if (p.num_rows == 0) return;
  merge_kernel<<<blocks_of(p.num_rows), kWarp * kRowsPerBlock, 0, stream>>>(p);
  check(cudaGetLastError(), "merge_attn_states");
}

void fill_zero(const TensorView& output, cudaStream_t stream) {
  const std::int64_t rows = output.shape[0] * output.shape[1];
  if (output.numel() == 0) return;
  zero_kernel<<<blocks_of(rows), kWarp * kRowsPerBlock, 0, stream>>>(
      rows_params(output), rows, static_cast<std::int32_t>(output.shape[1]),
      static_cast<std::int32_t>(output.shape[2] * size_of(output.dtype)));
  check(cudaGetLastError(), "fill_zero");
}

}  // namespace diffkv::cuda
