// A piece's end: the sums of the warps that shared rows become output rows, or partials.
#pragma once

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
#include "plan/schedule.h"

namespace diffkv::cuda::mma {

inline constexpr int kConsumerBarrier = 1;

template <class T>
class Finish {
 public:
  using Grid = typename T::Grid;
  using Piece = typename Shared<T>::Piece;

  __device__ Finish(const AttendKernelParams& params, const Shared<T>& shared, const Piece& piece,
                    std::int32_t tile_class, std::int32_t merge_columns)
      : params_(params),
        shared_(shared),
        piece_(piece),
        tile_class_(tile_class),
        merge_columns_(merge_columns),
        lane_(static_cast<std::int32_t>(threadIdx.x) % kWarp),
        key_warp_(static_cast<std::int32_t>(threadIdx.x) / kWarp % Grid::kKeyWarps) {}

  __device__ void put_states(const RowStates& states, std::int32_t first_row) const {
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

  // Accumulator tile n of the columns from `column` on.
  __device__ void put_sums(const float (&sums)[4], std::int32_t first_row, int n,
                           std::int32_t column) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const std::int32_t row = key_warp_ * Grid::kRows + first_row + lane_ / 4 + 8 * h;
#pragma unroll
      for (int i = 0; i < 2; ++i)
        *sum_at(row, column + column_of<T>(n, lane_, i)) = sums[2 * h + i];
    }
  }

  // What each warp's sums of a row are to be multiplied with; writes what is one number a row.
  __device__ void weigh() const {
    sync();
    for (std::int32_t row = static_cast<std::int32_t>(threadIdx.x); row < Grid::kRows;
         row += Grid::kConsumers * kWarp) {
      weigh_row(row);
    }
  }

  // Merges and writes the columns that were put last, of which `first` is the first.
  __device__ void write(std::int32_t first) const {
    sync();
    const std::int32_t end = min(first + merge_columns_, params_.head_size_v);
    // A thread's columns are the same in every row that it writes.
    const std::int32_t chunks = merge_columns_ / 4;
    const std::int32_t column =
        static_cast<std::int32_t>(threadIdx.x) & (chunks - 1);  // a power of two
    const std::int32_t step = Grid::kConsumers * kWarp / chunks;
    if (first + column * 4 < end) {
      for (std::int32_t row = static_cast<std::int32_t>(threadIdx.x) / chunks;
           row < piece_.num_rows; row += step) {
        write_columns(row, merged(row, column * 4), first + column * 4);
      }
    }
    // The next columns, or the next piece's, are put in the same place.
    sync();
  }

 private:
  struct Place {
    std::int64_t token;
    std::int32_t head;
  };

  static __device__ void sync() { ptx::sync(kConsumerBarrier, Grid::kConsumers * kWarp); }

  // Columns are exchanged in groups of 8, so that the same ones of 4 rows lie in different banks.
  __device__ float* sum_at(std::int32_t row, std::int32_t column) const {
    return shared_.merge + row * merge_columns_ + (column ^ row % 4 * 8);
  }

  __device__ Place place_of(std::int32_t row) const {
    const std::int32_t group = params_.schedule.group;
    const std::int32_t index = piece_.first_row + row;
    return {std::int64_t{piece_.first_token} + index / group,
            piece_.kv_head * group + index % group};
  }

  __device__ std::int64_t partial_of(std::int32_t row) const {
    return plan::partial_row(params_.schedule, tile_class_, piece_.slot, row);
  }

  __device__ void weigh_row(std::int32_t row) const {
    core::SoftmaxState state;  // in log2
    float* weights = shared_.weights + row;
#pragma unroll
    for (int w = 0; w < Grid::kKeyWarps; ++w) {
      state.max = fmaxf(state.max, shared_.row_max[w * Grid::kRows + row]);
    }
    const float base = state.max == core::kNegInf ? 0.0F : state.max;
#pragma unroll
    for (int w = 0; w < Grid::kKeyWarps; ++w) {
      const int at = w * Grid::kRows + row;
      const float weight = ptx::exp2(shared_.row_max[at] - base);
      const float sum = shared_.row_sum[at];
      // A NaN score leaves the max alone but makes the sum NaN, whatever its weight.
      state.sum += sum == 0.0F ? 0.0F : sum * (isnan(sum) ? 1.0F : weight);
      weights[w * Grid::kRows] = weight;
    }
    state.max *= kLn2;
    if (row >= piece_.num_rows) return;
    if (piece_.slot >= 0) {
      params_.schedule.tables.partial_max[partial_of(row)] = state.max;
      params_.schedule.tables.partial_sum[partial_of(row)] = state.sum;
      return;
    }
    const Place place = place_of(row);
    if (place.token >= params_.schedule.tables.num_tokens) return;
    const core::SoftmaxEnd end = core::finish(state, piece_.sink[row]);
    const float factor = end.empty ? 0.0F : end.factor * piece_.value_scale;
#pragma unroll
    for (int w = 0; w < Grid::kKeyWarps; ++w) weights[w * Grid::kRows] *= factor;
    if (params_.lse != nullptr) {
      params_.lse[place.head * params_.lse_stride_head + place.token * params_.lse_stride_token] =
          end.lse;
    }
  }

  // Sums of no weight are left out: a row that saw nothing is zero whatever they hold.
  __device__ float4 merged(std::int32_t row, std::int32_t column) const {
    float4 out = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
#pragma unroll
    for (int w = 0; w < Grid::kKeyWarps; ++w) {
      const int at = w * Grid::kRows + row;
      const float weight = shared_.weights[at];
      if (weight == 0.0F) continue;
      const auto sums = *reinterpret_cast<const float4*>(sum_at(at, column));
      out.x = fmaf(weight, sums.x, out.x);
      out.y = fmaf(weight, sums.y, out.y);
      out.z = fmaf(weight, sums.z, out.z);
      out.w = fmaf(weight, sums.w, out.w);
    }
    return out;
  }

  __device__ void write_columns(std::int32_t row, float4 x, std::int32_t column) const {
    if (piece_.slot >= 0) {
      *reinterpret_cast<float4*>(params_.schedule.tables.partial_acc +
                                 partial_of(row) * params_.schedule.tables.partial_stride +
                                 column) = x;
      return;
    }
    const Place place = place_of(row);
    if (place.token >= params_.schedule.tables.num_tokens) return;
    const DType dtype = params_.output.dtype;
    std::byte* to = row_at(params_.output, place.token, place.head) + column * size_of(dtype);
    switch (dtype) {
      case DType::kF32:
        *reinterpret_cast<float4*>(to) = x;
        return;
      case DType::kF16:
        *reinterpret_cast<uint2*>(to) =
            make_uint2(ptx::pack<__half>(x.x, x.y), ptx::pack<__half>(x.z, x.w));
        return;
      case DType::kBF16:
        *reinterpret_cast<uint2*>(to) =
            make_uint2(ptx::pack<__nv_bfloat16>(x.x, x.y), ptx::pack<__nv_bfloat16>(x.z, x.w));
        return;
      default: {
        const float scale = scale_at(params_.output_scale, 0);
        *reinterpret_cast<std::uint32_t*>(to) =
            fp8_word(dtype, x.x / scale, x.y / scale, x.z / scale, x.w / scale);
      }
    }
  }

  const AttendKernelParams& params_;
  const Shared<T>& shared_;
  const Piece& piece_;
  const std::int32_t tile_class_;
  const std::int32_t merge_columns_;
  const std::int32_t lane_;
  const std::int32_t key_warp_;
};

}  // namespace diffkv::cuda::mma
