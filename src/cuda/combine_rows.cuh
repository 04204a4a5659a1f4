// How a thread block of combine merges rows of partials: a warp has a row of a cut tile at a time
// or, of tiles in many parts, some of a row's parts.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/softmax.h"
#include "cuda/merged_row.cuh"
#include "cuda/params.h"
#include "cuda/warp.cuh"

namespace diffkv::cuda::combining {

inline constexpr int kWarps = 8;
inline constexpr int kThreads = kWarps * kWarp;
inline constexpr int kVector = 4;  // floats a lane loads at once

__device__ inline int lane_of_warp() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp_of_block() { return static_cast<int>(threadIdx.x) / kWarp; }

// A row's accumulator, spread over the lanes: vector i of lane l holds columns
// (i * 32 + l) * 4 and on.
template <int kVectors>
using Columns = float4[kVectors];

// Some parts of a row, merged.
template <int kVectors>
struct Merged {
  core::SoftmaxState state;
  Columns<kVectors> acc{};
};

// What warps that share a row leave for the one that merges them.
template <int kVectors>
struct SharedSums {
  float4 acc[kWarps][kVectors][kWarp];
  core::SoftmaxState states[kWarps];
};

inline constexpr std::int32_t kNoRow = -1;

// Parts first, first + step, ... of `count` of a row, in this order, by a warp. row_at(part): the
// row of the partials that holds the row, counted from first_row, or kNoRow; that of part 0 there
// is.
template <int kVectors, class RowAt>
__device__ Merged<kVectors> merge_parts(const AttendKernelParams& p, std::int64_t first_row,
                                        std::int32_t count, std::int32_t first, std::int32_t step,
                                        RowAt&& row_at) {
  // Rows that are loaded at a time: one after another, each would cost the latency of memory.
  constexpr int kBatch = kVectors == 1 ? 8 : kVectors == 2 ? 4 : 2;
  static_assert(kWarp % kBatch == 0);
  const int lane = lane_of_warp();
  const core::SoftmaxState* states = p.schedule.tables.partial_state + first_row;
  const auto stride = static_cast<std::int32_t>(p.schedule.tables.partial_stride);
  const float* rows_of_parts = p.schedule.tables.partial_acc + first_row * stride;
  Merged<kVectors> merged;
#pragma unroll 1
  for (std::int32_t begin = first; begin < count; begin += kWarp * step) {
    // Lane i knows part i's row and state; lanes without a part repeat the first one's row.
    const std::int32_t part = begin + lane * step;
    std::int32_t own_row = part < count ? row_at(part) : kNoRow;
    const bool there = own_row != kNoRow;
    core::SoftmaxState own;
    if (there) {
      const float2 state = __ldcg(reinterpret_cast<const float2*>(states + own_row));
      own = {state.x, state.y};
    } else {
      own_row = row_at(0);
    }
    Columns<kVectors> rows[kBatch];
    const auto load = [&](int i) {
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const float* from =
            rows_of_parts + std::int64_t{__shfl_sync(kAllLanes, own_row, i + j)} * stride;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          // Columns that are not there are read from others, and not written.
          const std::int32_t column = min((v * kWarp + lane) * kVector, p.head_size_v - kVector);
          rows[j][v] = __ldcg(reinterpret_cast<const float4*>(from + column));
        }
      }
    };
    load(0);
    // All weights against one maximum.
    const float max = fmaxf(merged.state.max, max_of_warp(own.max));
    const float keep = exp_difference(merged.state.max, max);
    const float weight = exp_difference(own.max, max);
    merged.state = {max, scaled_sum(merged.state, keep) + sum_of_warp(scaled_sum(own, weight))};
#pragma unroll
    for (auto& acc : merged.acc) scale(acc, keep);
    // Below 0: what is loaded is of no part, and may be no number.
    const float add = there ? weight : -1.0F;
    // The first ones without a condition, behind which the compiler would load them.
#pragma unroll 1
    for (int i = 0;;) {
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const float by = __shfl_sync(kAllLanes, add, i + j);
        if (by < 0.0F) continue;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) add_scaled(merged.acc[v], by, rows[j][v]);
      }
      i += kBatch;
      if (i == kWarp || begin + i * step >= count) break;
      load(i);
    }
  }
  return merged;
}

// Warps that share a row of a tile in so many parts, or as many as another of its sequence can
// have: this depends on the sequence alone, and so do the sums.
__device__ inline int warps_of_row(std::int32_t parts) {
  int warps = 1;
  while (warps < kWarps && 8 * warps <= parts) warps *= 2;
  return warps;
}

// A round of a block, `sharing` neighbouring warps a row: each has its row's `out`, which may be
// nowhere, and what merge_parts asks for. All warps of a block call it, with the same `sharing`.
template <int kVectors, class RowAt>
__device__ void merge_rows(const AttendKernelParams& p, int sharing, const MergedRow& out,
                           std::int64_t first_row, std::int32_t parts, SharedSums<kVectors>& shared,
                           RowAt&& row_at) {
  const int warp = warp_of_block();
  const int lane = lane_of_warp();
  const int member = warp & (sharing - 1);
  Merged<kVectors> merged;
  if (out.to != nullptr) {
    merged = merge_parts<kVectors>(p, first_row, parts, member, sharing, row_at);
  }
  if (sharing > 1) {
    __syncthreads();  // a former round's have been read
#pragma unroll
    for (int v = 0; v < kVectors; ++v) shared.acc[warp][v][lane] = merged.acc[v];
    if (lane == 0) shared.states[warp] = merged.state;
    __syncthreads();
    if (member > 0) return;
#pragma unroll 1
    for (int other = warp + 1; other < warp + sharing; ++other) {
      const core::SoftmaxState state = shared.states[other];
      const float max = fmaxf(merged.state.max, state.max);
      const float keep = exp_difference(merged.state.max, max);
      const float add = exp_difference(state.max, max);
      merged.state = {max, scaled_sum(merged.state, keep) + scaled_sum(state, add)};
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        scale(merged.acc[v], keep);
        add_scaled(merged.acc[v], add, shared.acc[other][v][lane]);
      }
    }
  }
  out.write<kWarp * kVector>(p, merged.state, lane * kVector, merged.acc);
}

}  // namespace diffkv::cuda::combining
