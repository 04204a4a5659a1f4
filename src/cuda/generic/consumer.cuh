// The warps that compute: scores, softmax and weighted sums of the blocks that the producer brings.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "core/dtype.h"
#include "cuda/generic/finish.cuh"
#include "cuda/generic/fragments.cuh"
#include "cuda/generic/ptx.cuh"
#include "cuda/generic/scores.cuh"
#include "cuda/generic/shared.cuh"
#include "cuda/generic/tile.h"
#include "cuda/params.h"

namespace diffkv::cuda::mma {

template <class T>
class Consumer {
 public:
  using Grid = typename T::Grid;
  using Element = std::conditional_t<T::kHalf, __half, __nv_bfloat16>;

  __device__ Consumer(const AttendKernelParams& params, const Shared<T>& shared, Depth depth,
                      std::int32_t tile_class)
      : params_(params),
        shared_(shared),
        depth_(depth),
        tile_class_(tile_class),
        lane_(static_cast<std::int32_t>(threadIdx.x) % kWarp),
        warp_(static_cast<std::int32_t>(threadIdx.x) / kWarp),
        first_row_(warp_ / Grid::kKeyWarps * Grid::kRowTiles * kMmaRows),
        slice_(warp_ % Grid::kKeyWarps * Grid::kWarpKeys),
        always_ruled_(params.soft_cap > 0.0F || params.alibi_slopes.data != nullptr) {}

  __device__ void run() {
    for (;;) {
      ptx::wait(shared_.stage_full + stage_.index, stage_.parity);
      const StageInfo block = shared_.stage_infos[stage_.index];
      if ((block.flags & kNoMoreWork) != 0) return;
      if ((block.flags & kFirstOfPiece) != 0) start_piece();
      const std::int32_t first_key = block.first_key + slice_;
      if (first_key < block.end && first_key + Grid::kWarpKeys > block.begin) {
        run_slice(block, first_key);
      }
      __syncwarp();
      if (lane_ == 0) ptx::arrive(shared_.stage_empty + stage_.index);
      stage_.advance(depth_.stages);
      if ((block.flags & kLastOfPiece) != 0) finish_piece();
    }
  }

 private:
  static constexpr int kTilesV = T::kHeadSizeV / 8;
  static constexpr int kStepsQk = T::kHeadSizeQk / kMmaRows;
  // Queries stay in registers where they are few.
  static constexpr bool kKeepQueries = Grid::kRowTiles == 1 && Grid::kRowWarps == 1;
  // Scores of few keys are summed in two halves, to have more independent instructions.
  static constexpr int kChains = Grid::kRowTiles * Grid::kWarpKeys <= 16 ? 2 : 1;

  __device__ const auto& piece() const { return shared_.pieces[query_.index]; }

  __device__ void start_piece() {
    ptx::wait(shared_.query_full + query_.index, query_.parity);
    const std::uint32_t queries = ptx::shared_address(shared_.queries) +
                                  static_cast<std::uint32_t>(query_.index * T::kQueryBytes);
    if constexpr (T::kFp8) {
      for (std::int32_t row = warp_; row < piece().num_rows; row += Grid::kConsumers) {
        prepare_query(shared_.queries + query_.index * T::kQueryBytes + row * T::kQueryPitch,
                      shared_.pieces[query_.index].query_factor[row]);
      }
      ptx::sync(kConsumerBarrier, Grid::kConsumers * kWarp);
    }
    queries_ = query_address<T>(
        queries + static_cast<std::uint32_t>(first_row_ * T::kQueryPitch), lane_);
    if constexpr (kKeepQueries) {
#pragma unroll
      for (int k = 0; k < kStepsQk; ++k) {
        ptx::load_matrices(kept_queries_[k], queries_ + static_cast<std::uint32_t>(k * 32));
      }
    }
#pragma unroll
    for (int m = 0; m < Grid::kRowTiles; ++m) {
      states_[m] = RowStates();
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const std::int32_t row = first_row_ + m * kMmaRows + lane_ / 4 + 8 * h;
        const float query_factor = T::kFp8 ? piece().query_factor[row] : 1.0F;
        factor_[m][h] = piece().score_scale * query_factor * kLog2E;
      }
#pragma unroll
      for (int n = 0; n < kTilesV; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums_[m][n][i] = 0.0F;
      }
    }
  }

  // Makes a row of queries fp16, in the order of columns that fragments.cuh says. A row of bf16 is
  // multiplied with a power of two that brings its largest element to about 1.
  __device__ void prepare_query(std::byte* row, float& factor) {
    constexpr int kItems = (T::kHeadSizeQk / 4 + kWarp - 1) / kWarp;
    float x[kItems][4];
    float largest = 0.0F;
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      const std::int32_t column = (lane_ + item * kWarp) * 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[item][i] = column < params_.head_size_qk
                         ? core::load_element(T::kQuery, row, column + i)
                         : 0.0F;
        largest = fmaxf(largest, fabsf(x[item][i]));
      }
    }
    float up = 1.0F;
    factor = 1.0F;
    if constexpr (T::kQuery == DType::kBF16) {
      const std::uint32_t bits = __reduce_max_sync(kAllLanes, __float_as_uint(largest));
      const std::uint32_t exponent = bits >> 23;
      if (exponent > 0 && exponent < 254) {
        up = __uint_as_float((254 - exponent) << 23);
        factor = __uint_as_float(exponent << 23);
      }
    }
    __syncwarp();
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      const std::int32_t column = (lane_ + item * kWarp) * 4;
      if (column >= T::kHeadSizeQk) continue;
      auto* group = reinterpret_cast<std::uint32_t*>(row) + column / 16 * 8;
      const int t = column % 16 / 4;
      group[t] = ptx::pack<__half>(x[item][0] * up, x[item][1] * up);
      group[t + 4] = ptx::pack<__half>(x[item][2] * up, x[item][3] * up);
    }
  }

  __device__ void run_slice(const StageInfo& block, std::int32_t first_key) {
    std::byte* rows =
        shared_.stages + stage_.index * T::kStageBytes + slice_ * T::kRowPitch;
    const std::uint32_t keys = ptx::shared_address(rows);
    float scores[Grid::kRowTiles][Grid::kWarpKeys / 8][4];
    multiply_keys(keys, scores);

    const std::int32_t last_key = first_key + Grid::kWarpKeys;
    const auto& p = piece();
    const bool masked = !((first_key >= p.seen_begin && last_key <= p.seen_end) ||
                          last_key <= p.seen_prefix_end);
    const bool biased = params_.qq_bias != nullptr && last_key > p.context_len &&
                        first_key < p.context_len + params_.qq_bias_size;
    const bool ruled = always_ruled_ || biased || !(p.score_scale > 0.0F);
    std::uint32_t hidden[Grid::kRowTiles] = {};
    if (ruled || masked) {
#pragma unroll
      for (int m = 0; m < Grid::kRowTiles; ++m) {
        rule_and_mask<Grid::kWarpKeys>(params_, p, first_row_ + m * kMmaRows, first_key, ruled,
                                       masked, scores[m], hidden[m]);
      }
    }
    weigh(scores, ruled);
    const bool by_element =
        (masked || biased) && clear_and_inspect(rows, block.begin - first_key, block.end - first_key);
    if (by_element) {
      add_visible_values(rows, scores, hidden);
    } else {
      add_values(keys + T::kKeyBytes, scores);
    }
    if (masked) ptx::fence_before_bulk_copies();
  }

  __device__ void multiply_keys(std::uint32_t keys,
                                float (&scores)[Grid::kRowTiles][Grid::kWarpKeys / 8][4]) {
    constexpr int kSubsteps = KeyStep<T>::kSteps;
    float parts[kChains][Grid::kRowTiles][Grid::kWarpKeys / 8][4] = {};
    const std::uint32_t address = key_address<T>(keys, lane_);
#pragma unroll
    for (int k = 0; k < kStepsQk; k += kSubsteps) {
      std::uint32_t a[kSubsteps][Grid::kRowTiles][4];
#pragma unroll
      for (int sub = 0; sub < kSubsteps; ++sub) {
#pragma unroll
        for (int m = 0; m < Grid::kRowTiles; ++m) {
          if constexpr (kKeepQueries) {
#pragma unroll
            for (int i = 0; i < 4; ++i) a[sub][m][i] = kept_queries_[k + sub][i];
          } else {
            ptx::load_matrices(a[sub][m], queries_ + static_cast<std::uint32_t>(
                                                         m * kMmaRows * T::kQueryPitch +
                                                         (k + sub) * 32));
          }
        }
      }
#pragma unroll
      for (int n = 0; n < Grid::kWarpKeys / 8; n += 2) {
        const KeyStep<T> key(address + static_cast<std::uint32_t>(n * 8 * T::kRowPitch +
                                                                  k / kSubsteps * kStepBytes));
#pragma unroll
        for (int sub = 0; sub < kSubsteps; ++sub) {
          const int chain = (k + sub) % kChains;
#pragma unroll
          for (int m = 0; m < Grid::kRowTiles; ++m) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              ptx::multiply_add<Element>(parts[chain][m][n + j], a[sub][m], key.b[sub][j][0],
                                         key.b[sub][j][1]);
            }
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < Grid::kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < Grid::kWarpKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          scores[m][n][i] = parts[0][m][n][i] + (kChains == 2 ? parts[kChains - 1][m][n][i] : 0.0F);
        }
      }
    }
  }

  __device__ void weigh(float (&scores)[Grid::kRowTiles][Grid::kWarpKeys / 8][4], bool ruled) {
#pragma unroll
    for (int m = 0; m < Grid::kRowTiles; ++m) {
      const float factor[2] = {ruled ? 1.0F : factor_[m][0], ruled ? 1.0F : factor_[m][1]};
      float keep[2];
      if (!states_[m].template weigh<Grid::kWarpKeys>(scores[m], factor, keep)) continue;
#pragma unroll
      for (int n = 0; n < kTilesV; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums_[m][n][i] *= keep[i / 2];
      }
    }
  }

  __device__ void add_values(std::uint32_t values,
                             const float (&weights)[Grid::kRowTiles][Grid::kWarpKeys / 8][4]) {
    const std::uint32_t address = value_address<T>(values, lane_);
#pragma unroll
    for (int k = 0; k < Grid::kWarpKeys / kMmaRows; ++k) {
      std::uint32_t a[Grid::kRowTiles][4];
#pragma unroll
      for (int m = 0; m < Grid::kRowTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* w = weights[m][2 * k + i / 2] + i % 2 * 2;
          a[m][i] = ptx::pack<Element>(w[0], w[1]);
        }
      }
#pragma unroll
      for (int n = 0; n < kTilesV; n += ValueStep<T>::kTiles) {
        const ValueStep<T> value(address +
                                 static_cast<std::uint32_t>(k * kMmaRows * T::kRowPitch +
                                                            n / ValueStep<T>::kTiles * kStepBytes));
#pragma unroll
        for (int j = 0; j < ValueStep<T>::kTiles; ++j) {
#pragma unroll
          for (int m = 0; m < Grid::kRowTiles; ++m) {
            ptx::multiply_add<Element>(sums_[m][n + j], a[m], value.b[j][0], value.b[j][1]);
          }
        }
      }
    }
  }

  // Zeroes the values of the slice's keys outside [begin, end), which were not loaded. Returns
  // whether a value of the others is not finite, which zero weights would not keep out.
  __device__ bool clear_and_inspect(std::byte* rows, std::int32_t begin, std::int32_t end) {
    constexpr int kChunks = (T::kRowBytes - T::kKeyBytes) / 16;
    bool found = false;
    for (std::int32_t i = lane_; i < Grid::kWarpKeys * kChunks; i += kWarp) {
      const std::int32_t row = i / kChunks;
      auto* chunk = reinterpret_cast<uint4*>(rows + row * T::kRowPitch + T::kKeyBytes +
                                             i % kChunks * 16);
      if (row < begin || row >= end) {
        *chunk = make_uint4(0, 0, 0, 0);
      } else {
        found = any_not_finite<T>(*chunk) || found;
      }
    }
    return __any_sync(kAllLanes, found);
  }

  // The slow way for blocks that hold infinities or NaN which some rows must not see.
  __device__ void add_visible_values(
      const std::byte* rows, const float (&weights)[Grid::kRowTiles][Grid::kWarpKeys / 8][4],
      const std::uint32_t (&hidden)[Grid::kRowTiles]) {
#pragma unroll
    for (int m = 0; m < Grid::kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < Grid::kWarpKeys / 8; ++n) {
#pragma unroll 1
        for (int k = 0; k < 8; ++k) {
          const std::byte* value = rows + (8 * n + k) * T::kRowPitch + T::kKeyBytes;
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int source = lane_ / 4 * 4 + k / 2;
            const float even = __shfl_sync(kAllLanes, weights[m][n][2 * h], source);
            const float odd = __shfl_sync(kAllLanes, weights[m][n][2 * h + 1], source);
            const std::uint32_t bits = __shfl_sync(kAllLanes, hidden[m], source);
            if (((bits >> (4 * n + 2 * h + k % 2)) & 1U) != 0) continue;
            // As the tensor cores see it.
            const float weight = rounded(k % 2 == 0 ? even : odd);
#pragma unroll
            for (int c = 0; c < kTilesV; ++c) {
#pragma unroll
              for (int i = 0; i < 2; ++i) {
                sums_[m][c][2 * h + i] = fmaf(weight, value_at<T>(value, column_of<T>(c, lane_, i)),
                                              sums_[m][c][2 * h + i]);
              }
            }
          }
        }
      }
    }
  }

  static __device__ float rounded(float x) {
    if constexpr (T::kHalf) return __half2float(__float2half_rn(x));
    return __bfloat162float(__float2bfloat16_rn(x));
  }

  __device__ void finish_piece() {
    Finish<T> finish(params_, shared_, piece(), tile_class_);
#pragma unroll
    for (int m = 0; m < Grid::kRowTiles; ++m) {
      finish.put_states(states_[m], first_row_ + m * kMmaRows);
    }
#pragma unroll
    for (int round = 0; round < Finish<T>::kRounds; ++round) {
      constexpr int kTiles = kTilesV / Finish<T>::kRounds;
#pragma unroll
      for (int m = 0; m < Grid::kRowTiles; ++m) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          finish.put_sums(sums_[m][round * kTiles + n], first_row_ + m * kMmaRows, n);
        }
      }
      if (round == 0) finish.weigh();
      finish.write(round);
    }
    if constexpr (T::kFp8) ptx::fence_before_bulk_copies();
    __syncwarp();
    if (lane_ == 0) ptx::arrive(shared_.query_empty + query_.index);
    query_.advance(depth_.query_buffers);
  }

  const AttendKernelParams& params_;
  const Shared<T>& shared_;
  const Depth depth_;
  const std::int32_t tile_class_;
  const std::int32_t lane_;
  const std::int32_t warp_;
  const std::int32_t first_row_;  // of this warp in the tile
  const std::int32_t slice_;      // this warp's first key in a block
  const bool always_ruled_;
  RingPosition stage_;
  RingPosition query_;
  std::uint32_t queries_ = 0;
  std::uint32_t kept_queries_[kKeepQueries ? kStepsQk : 1][4];
  RowStates states_[Grid::kRowTiles];
  float factor_[Grid::kRowTiles][2];
  float sums_[Grid::kRowTiles][kTilesV][4];
};

}  // namespace diffkv::cuda::mma
