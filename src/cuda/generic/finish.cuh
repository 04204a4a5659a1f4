// A piece's end: the sums of the warps that shared rows become output rows, or partials. It runs
// once a piece, so what costs is less its arithmetic than its instructions, which come from memory
// the first time: there are few of them, and none twice.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"
#include "core/softmax.h"
#include "cuda/generic/fragments.cuh"
#include "cuda/generic/ptx.cuh"
#include "cuda/generic/scores.cuh"
#include "cuda/generic/shared.cuh"
#include "cuda/generic/tile.h"
#include "cuda/kv_codec.cuh"
#include "cuda/params.h"
#include "cuda/row_io.cuh"

namespace diffkv::cuda::mma {

template <class T>
__device__ inline void write_lse(const AttendKernelParams& params,
                                 const typename Shared<T>::Piece& piece, std::int32_t row,
                                 float lse) {
  const RowPlace place = row_place(piece.first_token, piece.kv_head + piece.head_of(row),
                                   params.schedule.group, piece.first_row + piece.row_in_head(row));
  write_lse(params, place.token, place.head, lse);
}

template <class T>
class Finish {
 public:
  using Grid = typename T::Grid;
  using Piece = typename Shared<T>::Piece;
  using Sums = float[T::kHeadSizeV / 8][4];  // of a warp's 16 rows

  __device__ Finish(const AttendKernelParams& params, const Shared<T>& shared, const Piece& piece)
      : params_(params),
        shared_(shared),
        piece_(piece),
        lane_(static_cast<std::int32_t>(threadIdx.x) % kWarp),
        warp_(static_cast<std::int32_t>(threadIdx.x) / kWarp),
        key_warp_(Grid::key_warp(warp_)) {}

  // Tells the other warps that share rows what this one has of the 16 rows from first_row on.
  __device__ void put_states(const RowStates& states, std::int32_t first_row) const {
    if constexpr (Grid::kKeyWarps > 1) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float sum = quad_sum(states.sum[h]);
        const std::int32_t at = key_warp_ * Grid::kRows + first_row + lane_ / 4 + 8 * h;
        if (lane_ % 4 == 0) {
          shared_.row_max[at] = states.max[h];
          shared_.row_sum[at] = sum;
        }
      }
    }
  }

  // Merges and writes those rows, once all warps have put their states.
  __device__ void write(const RowStates& states, Sums& sums, std::int32_t first_row) const {
    std::byte* to[2];
    // Lane l finds out about row l % 16.
    const Row own_row = row_of(states, first_row);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int source = lane_ / 4 + 8 * h;
      const float scale = __shfl_sync(kAllLanes, own_row.scale, source);
      to[h] = reinterpret_cast<std::byte*>(
          __shfl_sync(kAllLanes, reinterpret_cast<std::uint64_t>(own_row.to), source));
#pragma unroll
      for (auto& tile : sums) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          // Sums of no weight are left out: a row that saw nothing is zero whatever they hold.
          float& x = tile[2 * h + i];
          x = scale == 0.0F ? 0.0F : x * scale;
        }
      }
    }
    merge(sums);
    const DType dtype = piece_.slot >= 0 ? DType::kF32 : params_.output.dtype;
    switch (dtype) {
      case DType::kF32:
        return store<float>(sums, to);
      case DType::kF16:
        return store<__half>(sums, to);
      case DType::kBF16:
        return store<__nv_bfloat16>(sums, to);
      default:
        return store_fp8(sums, to, dtype);
    }
  }

  // All consumer warps.
  static __device__ void sync() { ptx::sync(kConsumerBarrier, Grid::kConsumers * kWarp); }

 private:
  static constexpr int kKeyWarps = Grid::kKeyWarps;
  // Tiles of 8 columns that a warp writes of rows that it shares.
  static constexpr int kOwnTiles = T::kHeadSizeV / 8 / kKeyWarps;
  static_assert(kOwnTiles % kMergeTiles == 0);

  struct Row {
    std::byte* to;  // null: the row is not written
    float scale;    // of this warp's sums
  };

  // The softmax of row first_row + lane % 16 over all warps; writes what is one number a row.
  __device__ Row row_of(const RowStates& states, std::int32_t first_row) const {
    const std::int32_t row = first_row + lane_ % kMmaRows;
    core::SoftmaxState state;  // in log2
    float weight = 1.0F;
    if constexpr (kKeyWarps == 1) {
      const float sums[2] = {quad_sum(states.sum[0]), quad_sum(states.sum[1])};
      const int source = lane_ % 8 * 4;
      const float max[2] = {__shfl_sync(kAllLanes, states.max[0], source),
                            __shfl_sync(kAllLanes, states.max[1], source)};
      const float sum[2] = {__shfl_sync(kAllLanes, sums[0], source),
                            __shfl_sync(kAllLanes, sums[1], source)};
      state = lane_ % kMmaRows < 8 ? core::SoftmaxState{max[0], sum[0]}
                                   : core::SoftmaxState{max[1], sum[1]};
    } else {
#pragma unroll
      for (int w = 0; w < kKeyWarps; ++w) {
        state.max = fmaxf(state.max, shared_.row_max[w * Grid::kRows + row]);
      }
      const float base = state.max == core::kNegInf ? 0.0F : state.max;
#pragma unroll
      for (int w = 0; w < kKeyWarps; ++w) {
        const int at = w * Grid::kRows + row;
        const float of_warp = ptx::exp2(shared_.row_max[at] - base);
        const float sum = shared_.row_sum[at];
        // A NaN score leaves the max alone but makes the sum NaN, whatever its weight.
        state.sum += sum == 0.0F ? 0.0F : sum * (isnan(sum) ? 1.0F : of_warp);
        if (w == key_warp_) weight = of_warp;
      }
    }
    state.max *= kLn2;
    const bool writes = key_warp_ == 0 && lane_ < kMmaRows;
    if (piece_.slot >= 0) {
      if (!piece_.has(row)) return {nullptr, weight};
      const detail::PlanTables& tables = params_.schedule.tables;
      const std::int64_t at = piece_.partial_row + row;
      if (writes) {
        tables.partial_state[at] = state;
      }
      return {reinterpret_cast<std::byte*>(tables.partial_acc + at * tables.partial_stride),
              weight};
    }
    const std::int64_t at = piece_.output_at[row];
    if (at < 0) return {nullptr, weight};
    const core::SoftmaxEnd end = core::finish(state, piece_.sink[row]);
    if (writes && params_.lse != nullptr) write_lse<T>(params_, piece_, row, end.lse);
    return {params_.output.data + at,
            end.empty ? 0.0F : weight * end.factor * piece_.value_scale[piece_.head_of(row)]};
  }

  // Each warp gets the sums of its own columns from the others with its rows, kMergeTiles tiles at
  // a time, in an order that depends on the column alone. They are then its first kOwnTiles tiles.
  __device__ void merge(Sums& sums) const {
    if constexpr (kKeyWarps > 1) {
      turn(sums);
      auto* places = reinterpret_cast<float4*>(shared_.merge) + lane_;
      const int group = Grid::row_warp(warp_) * kKeyWarps;
      // What warp `owner` gets from the one that is `distance` behind it.
      const auto place = [&](int owner, int distance, int tile) {
        const int slot = (group + owner) * (kKeyWarps - 1) + kKeyWarps - 1 - distance;
        return places + (slot * kMergeTiles + tile) * kWarp;
      };
#pragma unroll
      for (int first = 0; first < kOwnTiles; first += kMergeTiles) {
        if (first > 0) sync();
#pragma unroll
        for (int next = 1; next < kKeyWarps; ++next) {
#pragma unroll
          for (int j = 0; j < kMergeTiles; ++j) {
            const float(&x)[4] = sums[next * kOwnTiles + first + j];
            *place((key_warp_ + next) % kKeyWarps, next, j) = make_float4(x[0], x[1], x[2], x[3]);
          }
        }
        sync();
#pragma unroll
        for (int next = 1; next < kKeyWarps; ++next) {
#pragma unroll
          for (int j = 0; j < kMergeTiles; ++j) {
            const float4 x = *place(key_warp_, kKeyWarps - next, j);
            float(&own)[4] = sums[first + j];
            own[0] += x.x;
            own[1] += x.y;
            own[2] += x.z;
            own[3] += x.w;
          }
        }
      }
    }
  }

  // Brings this warp's own tiles to the front, and those of the next warps behind them.
  __device__ void turn(Sums& sums) const {
#pragma unroll
    for (int by = 1; by < kKeyWarps; by *= 2) {
      const bool turns = (key_warp_ & by) != 0;
#pragma unroll
      for (int tile = 0; tile < kOwnTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float x[kKeyWarps];
#pragma unroll
          for (int w = 0; w < kKeyWarps; ++w) x[w] = sums[w * kOwnTiles + tile][i];
#pragma unroll
          for (int w = 0; w < kKeyWarps; ++w) {
            sums[w * kOwnTiles + tile][i] = turns ? x[(w + by) % kKeyWarps] : x[w];
          }
        }
      }
    }
  }

  // Neighbouring columns of a row that a lane holds: two of a tile or, of mixed columns, four of
  // two tiles (see column_of).
  static constexpr int kTiles = T::kMixesColumns ? 2 : 1;
  static constexpr int kColumns = 2 * kTiles;

  __device__ int first_column(int tile) const {
    return (key_warp_ * kOwnTiles + tile) * 8 + lane_ % 4 * kColumns;
  }

  static __device__ void columns_of(const Sums& sums, int tile, int h, float (&x)[kColumns]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int k = 0; k < kTiles; ++k) x[i * kTiles + k] = sums[tile + k][2 * h + i];
    }
  }

  template <class Out>
  __device__ void store(const Sums& sums, std::byte* const (&to)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (to[h] == nullptr) continue;
#pragma unroll
      for (int tile = 0; tile < kOwnTiles; tile += kTiles) {
        const int column = first_column(tile);
        if (column >= params_.head_size_v) continue;
        float x[kColumns];
        columns_of(sums, tile, h, x);
        std::uint32_t words[kColumns * sizeof(Out) / 4];
        if constexpr (sizeof(Out) == 4) {
#pragma unroll
          for (int i = 0; i < kColumns; ++i) words[i] = __float_as_uint(x[i]);
        } else {
#pragma unroll
          for (int i = 0; i < kTiles; ++i) words[i] = ptx::pack<Out>(x[2 * i], x[2 * i + 1]);
        }
        ptx::store(to[h] + column * static_cast<int>(sizeof(Out)), words);
      }
    }
  }

  __device__ void store_fp8(const Sums& sums, std::byte* const (&to)[2], DType dtype) const {
    const float scale = scale_at(params_.output_scale, 0);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (to[h] == nullptr) continue;
      float copy[kOwnTiles / kTiles][kColumns];  // in memory, so that the loop need not be unrolled
#pragma unroll
      for (int tile = 0; tile < kOwnTiles; tile += kTiles) {
        columns_of(sums, tile, h, copy[tile / kTiles]);
      }
#pragma unroll 1
      for (int tile = 0; tile < kOwnTiles; tile += kTiles) {
        const int column = first_column(tile);
        if (column >= params_.head_size_v) break;
        const float(&x)[kColumns] = copy[tile / kTiles];
        if constexpr (kColumns == 4) {
          *reinterpret_cast<std::uint32_t*>(to[h] + column) =
              fp8_word(dtype, x[0] / scale, x[1] / scale, x[2] / scale, x[3] / scale);
        } else {
          *reinterpret_cast<std::uint16_t*>(to[h] + column) =
              static_cast<std::uint16_t>(fp8_word(dtype, x[0] / scale, x[1] / scale, 0.0F, 0.0F));
        }
      }
    }
  }

  const AttendKernelParams& params_;
  const Shared<T>& shared_;
  const Piece& piece_;
  const std::int32_t lane_;
  const std::int32_t warp_;
  const std::int32_t key_warp_;
};

}  // namespace diffkv::cuda::mma
