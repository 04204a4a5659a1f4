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

  __device__ TileMerge(const AttendKernelParams& params, const Shared<T>& shared,
                       std::int32_t tile_class)
      : params_(params),
        cut_pieces_(shared.cut_pieces),
        tile_class_(tile_class),
        lane_(static_cast<std::int32_t>(threadIdx.x) % kWarp),
        warp_(static_cast<std::int32_t>(threadIdx.x) / kWarp) {}

  // All consumer warps, when they have written everything. A rehearsal writes nothing.
  __device__ void run(bool rehearsal) const {
    __threadfence();
    Finish<T>::sync();
    if (!rehearsal && threadIdx.x < 2) arrive(cut_pieces_[threadIdx.x]);
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      const CutPiece& piece = cut_pieces_[i];
      if (!rehearsal && (piece.blocks == 0 || !ready(piece))) continue;
#pragma unroll 1
      for (;;) {
        std::int32_t row = 0;
        if (!rehearsal && lane_ == 0) row = atomicAdd(&progress(piece).claimed, 1);
        row = __shfl_sync(kAllLanes, row, 0);
        if (!rehearsal && row >= piece.num_rows) break;
        merge_row(piece, row, !rehearsal);
        if (rehearsal) return;
      }
    }
  }

 private:
  static constexpr int kColumns = 4;  // neighbouring ones of a lane
  static constexpr int kVectors = (T::kHeadSizeV + kWarp * kColumns - 1) / (kWarp * kColumns);
  static constexpr int kBatch = kVectors == 1 ? 8 : 4;  // parts that are loaded at a time
  // How long a block waits for the others of its tile, to help them: whoever is last merges what
  // nobody else did.
  static constexpr long long kPatience = 30'000;  // cycles

  __device__ detail::MergeProgress& progress(const CutPiece& piece) const {
    return params_.schedule.tables.merges[tile_class_][piece.first_worker];
  }

  __device__ void arrive(const CutPiece& piece) const {
    if (piece.blocks == 0) return;
    detail::MergeProgress& all = progress(piece);
    // The rows of the attend before this one are claimed until the tile's first piece is there.
    if (piece.first) {
      atomicExch(&all.claimed, detail::MergeProgress::kNotReady);
      __threadfence();
    }
    if (atomicAdd(&all.blocks, piece.blocks) + piece.blocks < piece.blocks_of_tile) return;
    atomicExch(&all.blocks, 0);
    __threadfence();
    atomicExch(&all.claimed, 0);
  }

  // Whether the tile's partials are all there; waits a little.
  __device__ bool ready(const CutPiece& piece) const {
    const volatile std::int32_t& claimed = progress(piece).claimed;
    const long long start = clock64();
    bool is_ready = claimed < detail::MergeProgress::kNotReady;
    while (!is_ready && clock64() - start < kPatience) {
      __nanosleep(100);
      is_ready = claimed < detail::MergeProgress::kNotReady;
    }
    is_ready = __any_sync(kAllLanes, is_ready);
    __threadfence();
    return is_ready;
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

  __device__ void merge_row(const CutPiece& piece, std::int32_t row, bool writes) const {
    const detail::PlanTables& tables = params_.schedule.tables;
    core::SoftmaxState state;
    float4 acc[kVectors] = {};
    bool more = true;
#pragma unroll 1
    for (std::int32_t first = 0; more; first += kWarp) {
      // Lane i knows part first + i.
      bool inside = false;
      const std::int32_t slot = slot_of_part(piece, first + lane_, inside);
      more = __all_sync(kAllLanes, inside);
      const std::uint32_t parts = __ballot_sync(kAllLanes, slot >= 0);
      const std::int64_t at = plan::partial_row(
          params_.schedule, tile_class_, slot >= 0 ? slot : tables.first_slot[tile_class_], row);
      core::SoftmaxState own;
      if (slot >= 0) {
        own.max = __ldcg(tables.partial_max + at);
        own.sum = __ldcg(tables.partial_sum + at);
      }
      float4 rows[kBatch][kVectors];
      const auto load = [&](std::int32_t part) {
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const std::int64_t from = __shfl_sync(kAllLanes, at, part + j);
          const float* data = tables.partial_acc + from * tables.partial_stride;
#pragma unroll
          for (int v = 0; v < kVectors; ++v) {
            const std::int32_t column = (v * kWarp + lane_) * kColumns;
            if (column >= params_.head_size_v || (parts >> (part + j) & 1U) == 0) continue;
            rows[j][v] = __ldcg(reinterpret_cast<const float4*>(data + column));
          }
        }
      };
      load(0);
      const float max = fmaxf(state.max, warp_max(own.max));
      const float weight = core::exp_difference(own.max, max);
      float keep = core::exp_difference(state.max, max);
      // A NaN score leaves the max alone but makes the sum NaN, also of a part whose max is -inf.
      const float added = warp_sum(isnan(own.sum) ? own.sum : own.sum * weight);
      state = {max, (isnan(state.sum) ? state.sum : state.sum * keep) + added};
      const std::int32_t end = kWarp - __clz(static_cast<int>(parts));
#pragma unroll 1
      for (std::int32_t part = 0; part < end; part += kBatch) {
        if (part > 0) load(part);
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const float add = __shfl_sync(kAllLanes, weight, part + j);
          if ((parts >> (part + j) & 1U) == 0) continue;
#pragma unroll
          for (int v = 0; v < kVectors; ++v) scale_and_add(acc[v], keep, add, rows[j][v]);
          keep = 1.0F;
        }
      }
    }
    if (writes) write_row(piece, row, state, acc);
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
