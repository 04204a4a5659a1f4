// The block that leaves the last partial of a cut tile merges all of them into output rows, in the
// order of their keys whoever that is. Another kernel would wait for the slowest block, and then
// for its own instructions and for what says which tiles are cut.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "core/softmax.h"
#include "cuda/generic/finish.cuh"
#include "cuda/generic/scores.cuh"
#include "cuda/generic/shared.cuh"
#include "cuda/generic/tile.h"
#include "cuda/kv_codec.cuh"
#include "cuda/params.h"
#include "cuda/row_io.cuh"
#include "plan/schedule.h"

namespace diffkv::cuda::mma {

template <class T>
class TileMerge {
 public:
  using Grid = typename T::Grid;

  __device__ TileMerge(const AttendKernelParams& params, CutPiece* cut_pieces,
                       std::int32_t tile_class)
      : params_(params),
        cut_pieces_(cut_pieces),
        tile_class_(tile_class),
        lane_(static_cast<std::int32_t>(threadIdx.x) % kWarp),
        warp_(static_cast<std::int32_t>(threadIdx.x) / kWarp) {}

  // All consumer warps, when they have written everything.
  __device__ void run() const {
    // The first parts' slots are on their way while the writes end.
    std::int32_t slots[2];
    bool inside[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      slots[i] = slot_of_part(cut_pieces_[i], lane_, inside[i]);
    }
    __threadfence();
    Finish<T>::sync();
    if (threadIdx.x < 2) arrive(cut_pieces_[threadIdx.x]);
    Finish<T>::sync();
    __threadfence();
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      const CutPiece& piece = cut_pieces_[i];
      if (piece.blocks == 0) continue;
#pragma unroll 1
      for (std::int32_t row = warp_ * kRows; row < piece.num_rows;
           row += Grid::kConsumers * kRows) {
        merge_rows(piece, row, i == 0 ? slots[0] : slots[1], i == 0 ? inside[0] : inside[1]);
      }
    }
  }

 private:
  static constexpr int kRows = 4;     // that a warp merges at a time
  static constexpr int kColumns = 4;  // neighbouring ones of a lane
  static constexpr int kVectors = (T::kHeadSizeV + kWarp * kColumns - 1) / (kWarp * kColumns);
  static constexpr int kBatch = kVectors == 1 ? 4 : 2;  // parts that are loaded at a time

  // Leaves a piece whose tile has others still to come to their blocks.
  __device__ void arrive(CutPiece& piece) const {
    if (piece.blocks == 0) return;
    std::int32_t* done = params_.schedule.tables.blocks_done[tile_class_] + piece.first_worker;
    if (atomicAdd(done, piece.blocks) + piece.blocks < piece.blocks_of_tile) {
      piece.blocks = 0;
    } else {
      *done = 0;
    }
  }

  // The partial of part `part`, or -1: 0 is the first share's, each share that starts inside the
  // tile has another, unless it is empty. `inside`: whether there may be more behind it.
  __device__ std::int32_t slot_of_part(const CutPiece& piece, std::int32_t part,
                                       bool& inside) const {
    const plan::ScheduleView& schedule = params_.schedule;
    const std::int32_t lanes = schedule.limits.classes[tile_class_].head_lanes;
    const plan::WorkStart* starts = schedule.tables.starts[tile_class_];
    const std::int32_t first_share = piece.first_worker / lanes;
    const std::int32_t shares = schedule.limits.classes[tile_class_].workers / lanes;
    const std::int32_t slot =
        schedule.tables.first_slot[tile_class_] + 2 * (piece.first_worker + part * lanes);
    inside = part == 0;
    if (inside) return slot + 1;
    if (first_share + part >= shares) return -1;
    const plan::WorkStart start = starts[first_share + part];
    const plan::WorkStart stop = starts[first_share + part + 1];
    inside = plan::starts_inside(start, {piece.seq, piece.line_index, 0});
    return inside && plan::before(start, stop) ? slot : -1;
  }

  // `slot` and `inside`: of part `lane_`.
  __device__ void merge_rows(const CutPiece& piece, std::int32_t row, std::int32_t slot,
                             bool inside) const {
    const detail::PlanTables& tables = params_.schedule.tables;
    core::SoftmaxState state[kRows];
    float4 acc[kRows][kVectors] = {};
#pragma unroll 1
    for (std::int32_t first = 0;;) {
      // Lane i knows part first + i.
      const std::uint32_t parts = __ballot_sync(kAllLanes, slot >= 0);
      const std::int64_t at = plan::partial_row(
          params_.schedule, tile_class_, slot >= 0 ? slot : tables.first_slot[tile_class_], row);
      core::SoftmaxState own[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (slot < 0) continue;
        own[r].max = __ldcg(tables.partial_max + at + r);
        own[r].sum = __ldcg(tables.partial_sum + at + r);
      }
      float4 rows[kBatch][kRows][kVectors];
      const auto load = [&](std::int32_t part) {
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const std::int64_t from = __shfl_sync(kAllLanes, at, part + j);
          const float* data = tables.partial_acc + from * tables.partial_stride;
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
              const std::int32_t column = (v * kWarp + lane_) * kColumns;
              if (column >= params_.head_size_v || (parts >> (part + j) & 1U) == 0) continue;
              rows[j][r][v] = __ldcg(
                  reinterpret_cast<const float4*>(data + r * tables.partial_stride + column));
            }
          }
        }
      };
      load(0);
      float weight[kRows];
      float keep[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        core::SoftmaxState& all = state[r];
        const float max = fmaxf(all.max, warp_max(own[r].max));
        weight[r] = core::exp_difference(own[r].max, max);
        keep[r] = core::exp_difference(all.max, max);
        // A NaN score leaves the max alone but makes the sum NaN, also of a part whose max is -inf.
        const float sum = own[r].sum;
        const float added = warp_sum(isnan(sum) ? sum : sum * weight[r]);
        all = {max, (isnan(all.sum) ? all.sum : all.sum * keep[r]) + added};
      }
      const std::int32_t end = kWarp - __clz(static_cast<int>(parts));
#pragma unroll 1
      for (std::int32_t part = 0; part < end; part += kBatch) {
        if (part > 0) load(part);
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const bool there = (parts >> (part + j) & 1U) != 0;
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const float add = __shfl_sync(kAllLanes, weight[r], part + j);
            if (!there) continue;
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
              scale_and_add(acc[r][v], keep[r], add, rows[j][r][v]);
            }
            keep[r] = 1.0F;
          }
        }
      }
      if (!__all_sync(kAllLanes, inside)) break;
      first += kWarp;
      slot = slot_of_part(piece, first + lane_, inside);
    }
#pragma unroll 1
    for (int r = 0; r < kRows; ++r) {
      // Of row r by selection, so that the loop need not be unrolled.
      core::SoftmaxState own = state[0];
      float4 sums[kVectors];
#pragma unroll
      for (int v = 0; v < kVectors; ++v) sums[v] = acc[0][v];
#pragma unroll
      for (int k = 1; k < kRows; ++k) {
        if (k != r) continue;
        own = state[k];
#pragma unroll
        for (int v = 0; v < kVectors; ++v) sums[v] = acc[k][v];
      }
      if (row + r < piece.num_rows) write_row(piece, row + r, own, sums);
    }
  }

  __device__ void write_row(const CutPiece& piece, std::int32_t row,
                            const core::SoftmaxState& state, const float4 (&sums)[kVectors]) const {
    plan::Piece planned;
    planned.seq = piece.seq;
    planned.tile.kv_head = piece.kv_head;
    planned.tile.first_row = piece.first_row;
    const RowPlace place = row_place(params_.schedule, planned, row);
    if (place.token >= params_.schedule.tables.num_tokens) return;
    const RowScales scales = row_scales(params_, place.head, piece.kv_head);
    const RowEnd end = finish_row(params_, place.token, place.head, scales, state, lane_ == 0);
    std::byte* to = row_at(params_.output, place.token, place.head);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const std::int32_t column = (v * kWarp + lane_) * kColumns;
      if (column >= params_.head_size_v) continue;
      const float4 x = sums[v];
      store_four(params_.output.dtype, make_float4(end(x.x), end(x.y), end(x.z), end(x.w)),
                 to + column * size_of(params_.output.dtype));
    }
  }

  static __device__ void scale_and_add(float4& x, float keep, float add, const float4& part) {
    x.x = x.x * keep + part.x * add;
    x.y = x.y * keep + part.y * add;
    x.z = x.z * keep + part.z * add;
    x.w = x.w * keep + part.w * add;
  }

  static __device__ float warp_max(float x) {
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lanes));
    }
    return x;
  }
  static __device__ float warp_sum(float x) {
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
    return x;
  }

  const AttendKernelParams& params_;
  CutPiece* const cut_pieces_;
  const std::int32_t tile_class_;
  const std::int32_t lane_;
  const std::int32_t warp_;
};

}  // namespace diffkv::cuda::mma
