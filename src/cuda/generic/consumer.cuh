// The warps that compute: scores, softmax and weighted sums of the blocks that the producer brings.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <limits>
#include <type_traits>

#include "core/mask.h"
#include "cuda/generic/convert.cuh"
#include "cuda/generic/finish.cuh"
#include "cuda/generic/fragments.cuh"
#include "cuda/generic/ptx.cuh"
#include "cuda/generic/scores.cuh"
#include "cuda/generic/shared.cuh"
#include "cuda/generic/tile.h"
#include "cuda/generic/warpgroup.cuh"
#include "cuda/params.h"
#include "diffkv/tensor.h"

namespace diffkv::cuda::mma {

template <class T>
class Consumer {
 public:
  using Grid = typename T::Grid;
  using Element = std::conditional_t<T::kHalf, __half, __nv_bfloat16>;

  // `boxes`: whether stages are filled by tensor copies.
  __device__ Consumer(const AttendKernelParams& params, const Shared<T>& shared, Depth depth,
                      bool boxes)
      : params_(params),
        shared_(shared),
        depth_(depth),
        boxes_(boxes),
        lane_(static_cast<std::int32_t>(threadIdx.x) % kWarp),
        warp_(static_cast<std::int32_t>(threadIdx.x) / kWarp),
        first_row_(Grid::row_warp(warp_) * Grid::kRowTiles * kMmaRows),
        key_warp_(Grid::key_warp(warp_)),
        head_(T::kHeads > 1 ? first_row_ / T::kHeadRows : 0),
        always_ruled_(params.soft_cap > 0.0F || params.alibi_slopes.data != nullptr),
        together_(shared.racecheck) {}

  __device__ void run() {
    for (;;) {
      StageInfo block = next_block();
      if ((block.flags & kNoMoreWork) != 0) return;
      start_piece();
      for (;;) {
        if (!run_block(block)) release();
        stage_.advance(depth_.stages);
        if ((block.flags & kLastOfPiece) != 0) break;
        block = next_block();
      }
      finish_piece();
    }
  }

 private:
  static constexpr int kTilesV = T::kHeadSizeV / 8;
  static constexpr int kStepsQk = T::kHeadSizeQk / kMmaRows;
  // Keys that are scored at a time: beside many sums only half of those in a block, for registers.
  static constexpr int kSliceKeys = T::kManySums && Grid::kWarpKeys > 32 ? 32 : Grid::kWarpKeys;
  // Warps that decide together what of a slice is computed, and their rows.
  static constexpr int kTogether = Grid::kWarpgroups ? 4 : 1;
  static constexpr int kRowsTogether = kTogether * Grid::kRowTiles * kMmaRows;
  // Whether these are all rows of a KV head: what none of them sees is not brought.
  static constexpr bool kSeeAlike = kRowsTogether == T::kHeadRows;
  static_assert(!Grid::kWarpgroups || (Grid::kWarpKeys == kSliceKeys && Grid::kRowTiles == 1));
  static_assert(Grid::kConsumers / kTogether <= kMetBarrier - kTogetherBarrier ||
                !Grid::kWarpgroups);
  // Scores of few keys are summed in two halves, to have more independent instructions.
  static constexpr int kChains = Grid::kRowTiles * kSliceKeys <= 16 ? 2 : 1;

  // Of the stages' slices this warp's.
  __device__ std::int32_t slice() const { return stage_.index * Grid::kKeyWarps + key_warp_; }

  __device__ StageInfo next_block() const {
    ptx::wait(shared_.stage_full + slice(), stage_.parity);
    return shared_.stage_infos[slice()];
  }

  // Gives the slice back to the producer.
  __device__ void release() const {
    __syncwarp();
    if (arrives(lane_)) ptx::arrive(shared_.stage_empty + slice());
  }

  // Returns whether the slice has been given back.
  __device__ bool run_block(const StageInfo& block) {
    const std::int32_t first = key_warp_ * Grid::kWarpKeys;
    bool released = false;
#pragma unroll 1
    for (std::int32_t at = first; at < first + Grid::kWarpKeys; at += kSliceKeys) {
      const std::int32_t first_key = block.first_key + at;
      if (first_key < block.end && first_key + kSliceKeys > block.begin &&
          (kSeeAlike || any_sees(first_key, first_key + kSliceKeys))) {
        released = run_slice(block, first_key, at);
      }
    }
    return released;
  }

  __device__ const auto& piece() const { return shared_.pieces[query_.index]; }

  __device__ void start_piece() {
    ptx::wait(shared_.query_full + query_.index, query_.parity);
    const std::uint32_t queries = ptx::shared_address(shared_.queries) +
                                  static_cast<std::uint32_t>(query_.index * T::kQueryBytes);
    if constexpr (T::kFp8) {
      const std::int32_t end = T::kHeads > 1 ? Grid::kRows : piece().num_rows;
      for (std::int32_t row = warp_; row < end; row += Grid::kConsumers) {
        if (!piece().has(row)) continue;
        const float factor =
            prepare_query(shared_.queries + query_.index * T::kQueryBytes + row * T::kQueryPitch);
        if (lane_ == 0) shared_.pieces[query_.index].query_factor[row] = factor;
      }
      ptx::sync(kConsumerBarrier, Grid::kConsumers * kWarp);
    }
    find_seen();
    queries_ =
        query_address<T>(queries + static_cast<std::uint32_t>(first_row_ * T::kQueryPitch), lane_);
#pragma unroll
    for (int m = 0; m < Grid::kRowTiles; ++m) {
      states_[m] = RowStates();
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const std::int32_t row = first_row_ + m * kMmaRows + lane_ / 4 + 8 * h;
        const float query_factor = T::kFp8 ? piece().query_factor[row] : 1.0F;
        factor_[m][h] = piece().score_scale[head_] * query_factor * kLog2E;
      }
#pragma unroll
      for (int n = 0; n < kTilesV; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums_[m][n][i] = 0.0F;
      }
    }
  }

  // What all rows see that this warp decides for together with others, and what any may.
  __device__ void find_seen() {
    core::RowKeys all;
    core::RowKeys any;
    all.prefix_end = all.end = any.begin = std::numeric_limits<std::int32_t>::max();
    for (std::int32_t row = lane_; row < kRowsTogether; row += kWarp) {
      const std::int32_t r = first_row_ / kRowsTogether * kRowsTogether + row;
      if (!piece().has(r)) continue;
      all.prefix_end = min(all.prefix_end, piece().prefix_end[r]);
      all.begin = max(all.begin, piece().begin[r]);
      all.end = min(all.end, piece().end[r]);
      any.prefix_end = max(any.prefix_end, piece().prefix_end[r]);
      any.begin = min(any.begin, piece().begin[r]);
      any.end = max(any.end, piece().end[r]);
    }
    all_.prefix_end = __reduce_min_sync(kAllLanes, all.prefix_end);
    all_.begin = __reduce_max_sync(kAllLanes, all.begin);
    all_.end = __reduce_min_sync(kAllLanes, all.end);
    if constexpr (!kSeeAlike) {
      any_.prefix_end = __reduce_max_sync(kAllLanes, any.prefix_end);
      any_.begin = __reduce_min_sync(kAllLanes, any.begin);
      any_.end = __reduce_max_sync(kAllLanes, any.end);
    }
  }

  __device__ bool any_sees(std::int32_t first_key, std::int32_t last_key) const {
    return first_key < any_.prefix_end || (first_key < any_.end && last_key > any_.begin);
  }

  // Makes a row of queries fp16, in the order of columns that fragments.cuh says, if any. A row of
  // bf16 is multiplied with a power of two that brings its largest element to about 1; returns what
  // undoes that.
  __device__ float prepare_query(std::byte* row) {
    constexpr int kItems = (T::kHeadSizeQk / 4 + kWarp - 1) / kWarp;
    const DType dtype = params_.query.dtype;
    std::uint32_t pairs[kItems][2] = {};  // of 4 neighbouring columns
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      const std::int32_t column = (lane_ + item * kWarp) * 4;
      if (column >= params_.head_size_qk) continue;
      if (dtype == DType::kE4M3) {
        halves_of_bytes<DType::kE4M3>(*reinterpret_cast<const std::uint32_t*>(row + column),
                                      pairs[item][0], pairs[item][1]);
      } else {
        const auto both = *reinterpret_cast<const uint2*>(row + column * 2);
        pairs[item][0] = both.x;
        pairs[item][1] = both.y;
      }
    }
    const float factor = dtype == DType::kBF16 ? halves_of_bf16(pairs) : 1.0F;
    __syncwarp();
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      const std::int32_t column = (lane_ + item * kWarp) * 4;
      if (column >= T::kHeadSizeQk) continue;
      auto* words = reinterpret_cast<std::uint32_t*>(row) +
                    (T::kMixesColumns ? column / 16 * 8 + column % 16 / 4 : column / 2);
      words[0] = pairs[item][0];
      words[T::kMixesColumns ? 4 : 1] = pairs[item][1];
    }
    return factor;
  }

  // Of a warp's row.
  template <int kItems>
  static __device__ float halves_of_bf16(std::uint32_t (&pairs)[kItems][2]) {
    std::uint32_t largest = 0;  // bits of a float, without the sign
#pragma unroll
    for (auto& pair : pairs) {
#pragma unroll
      for (const std::uint32_t x : pair) {
        largest = max(largest, max(x << 16 & 0x7fff0000U, x & 0x7fff0000U));
      }
    }
    const std::uint32_t exponent = __reduce_max_sync(kAllLanes, largest) >> 23;
    float up = 1.0F;
    float factor = 1.0F;
    if (exponent > 0 && exponent < 254) {
      up = __uint_as_float((254 - exponent) << 23);
      factor = __uint_as_float(exponent << 23);
    }
#pragma unroll
    for (auto& pair : pairs) {
#pragma unroll
      for (std::uint32_t& x : pair) {
        x = ptx::pack<__half>(__uint_as_float(x << 16) * up, __uint_as_float(x & 0xffff0000U) * up);
      }
    }
    return factor;
  }

  // Keys of a block from its key `at` on. Returns whether the slice has been given back.
  __device__ bool run_slice(const StageInfo& block, std::int32_t first_key, std::int32_t at) {
    std::byte* boxes = shared_.stages + stage_.index * T::kStageBytes + row_of_key<T>(at);
    std::uint32_t keys =
        ptx::shared_address(boxes) + static_cast<std::uint32_t>(head_ * T::kKeyHeadBytes);
    boxes += head_ * T::kValueHeadBytes;  // for their values
    const std::int32_t last_key = first_key + kSliceKeys;
    const auto& p = piece();
    const bool masked =
        !((first_key >= all_.begin && last_key <= all_.end) || last_key <= all_.prefix_end);
    const bool biased = params_.qq_bias != nullptr && last_key > p.context_len &&
                        first_key < p.context_len + params_.qq_bias_size;
    bool by_element = false;
    if constexpr (T::kConverts) {
      by_element = (masked || biased) && clear_and_inspect(boxes, block, first_key, biased);
      std::byte* converted = shared_.converted + key_warp_ * T::Operands::kGroupBytes;
      keys = ptx::shared_address(converted);
      together_.sync(warp_);  // the slice before has been multiplied
      convert_keys<T>(boxes, converted);
      ptx::fence_before_tensor_copies();  // wgmma reads as these copies write
      together_.sync(warp_);
      if (!by_element) release();
    }
    const std::conditional_t<Grid::kWarpgroups, Matrices, std::uint32_t> operands(keys);
    float scores[Grid::kRowTiles][kSliceKeys / 8][4];
    if constexpr (Grid::kWarpgroups) {
      multiply_keys_together(operands, scores[0]);
    } else {
      multiply_keys(operands, scores);
    }

    const bool ruled = always_ruled_ || biased || !(p.score_scale[head_] > 0.0F);
    std::uint32_t hidden[Grid::kRowTiles] = {};
    // One jump over everything where there is nothing to do: each is a long one.
    if (ruled || masked) {
#pragma unroll
      for (int m = 0; m < Grid::kRowTiles; ++m) {
        const RowsByKeys<kSliceKeys> at{first_row_ + m * kMmaRows, first_key};
        if (ruled) apply_rules(params_, p, at, factor_[m], scores[m], hidden[m]);
        if (masked) apply_mask(p, at, scores[m], hidden[m]);
      }
    }
    weigh(scores, ruled);
    if constexpr (!T::kConverts) {
      by_element = (masked || biased) && clear_and_inspect(boxes, block, first_key, biased);
    }
    if (by_element) {
      add_visible_values(boxes, scores, hidden);
    } else if constexpr (Grid::kWarpgroups) {
      add_values_together(operands, scores[0]);
    } else {
      add_values(ptx::shared_address(boxes), scores);
    }
    if constexpr (T::kConverts) return !by_element;
    if (masked) ptx::fence_before_tensor_copies();
    return false;
  }

  // Scores of a slice by four warps.
  __device__ void multiply_keys_together(const Matrices& keys, float (&scores)[kSliceKeys / 8][4]) {
    using Operands = typename T::Operands;
    constexpr int kSteps = Operands::kSlabRowBytes / kStepBytes;  // of a slab
    if constexpr (!T::kConverts) {
      if (!boxes_) ptx::fence_before_tensor_copies();  // wgmma reads as these copies write
    }
    // CUDA 13.0 gives weights the registers of queries that are kept from one block to the next.
    std::uint32_t queries[kStepsQk][4];
#pragma unroll
    for (int k = 0; k < kStepsQk; ++k) {
      ptx::load_matrices(queries[k], queries_ + static_cast<std::uint32_t>(k * 32));
    }
    hold(queries);
    begin_products();
#pragma unroll
    for (int k = 0; k < kStepsQk; ++k) {
      const auto at =
          static_cast<std::uint32_t>(k / kSteps * Operands::kSlabBytes + k % kSteps * kStepBytes);
      if constexpr (Operands::kGroupKeys == kSliceKeys) {
        multiply_64<Element, false>(scores, queries[k], keys.at(at), k > 0);
      } else {
        // Of each group, keys 0 to 7 and keys 8 to 15.
        static_assert(Operands::kGroupKeys == 16);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const auto row = static_cast<std::uint32_t>(half * 8 * Operands::kSlabRowBytes);
          multiply_every_second_8<Element>(scores + half, queries[k],
                                           keys.at<Operands::kGroupBytes>(at + row), k > 0);
        }
      }
    }
    end_products();
    hold(scores);
  }

  __device__ void add_values_together(const Matrices& keys,
                                      const float (&weights)[kSliceKeys / 8][4]) {
    using Operands = typename T::Operands;
    constexpr int kSteps = kSliceKeys / kMmaRows;
    std::uint32_t a[kSteps][4];
#pragma unroll
    for (int k = 0; k < kSteps; ++k) pack_weights(a[k], weights, k);
    hold(a);
    hold(sums_[0]);
    begin_products();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int slab = 0; slab < T::kValueSlabs; ++slab) {
        const auto at =
            static_cast<std::uint32_t>(row_of_key<Operands>(k * kMmaRows) +
                                       Operands::kValuesInGroup + slab * Operands::kSlabBytes);
        multiply_64<Element, true>(sums_[0] + 8 * slab, a[k], keys.at(at), true);
      }
    }
    end_products();
    hold(sums_[0]);
  }

  __device__ void multiply_keys(std::uint32_t keys,
                                float (&scores)[Grid::kRowTiles][kSliceKeys / 8][4]) {
    constexpr int kSubsteps = KeyStep<T>::kSteps;
    constexpr int kPairs = kSliceKeys / 16;
    float parts[kChains][Grid::kRowTiles][kSliceKeys / 8][4] = {};
    const std::uint32_t address = key_address<T>(keys, lane_);
    // Operands are loaded one step ahead of the products.
    std::uint32_t raw[2][kPairs][4];
    std::uint32_t a[2][kSubsteps][Grid::kRowTiles][4];
    load_step(0, address, raw[0], a[0]);
#pragma unroll
    for (int k = 0; k < kStepsQk; k += kSubsteps) {
      const int now = k / kSubsteps % 2;
      if (k + kSubsteps < kStepsQk) load_step(k + kSubsteps, address, raw[1 - now], a[1 - now]);
#pragma unroll
      for (int n = 0; n < kPairs; ++n) {
        const KeyStep<T> key(raw[now][n]);
#pragma unroll
        for (int sub = 0; sub < kSubsteps; ++sub) {
          const int chain = (k + sub) % kChains;
#pragma unroll
          for (int m = 0; m < Grid::kRowTiles; ++m) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              ptx::multiply_add<Element>(parts[chain][m][2 * n + j], a[now][sub][m],
                                         key.b[sub][j][0], key.b[sub][j][1]);
            }
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < Grid::kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kSliceKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          scores[m][n][i] = parts[0][m][n][i] + (kChains == 2 ? parts[kChains - 1][m][n][i] : 0.0F);
        }
      }
    }
  }

  // Keys and queries of column step k.
  __device__ void load_step(int k, std::uint32_t address, std::uint32_t (&raw)[kSliceKeys / 16][4],
                            std::uint32_t (&a)[KeyStep<T>::kSteps][Grid::kRowTiles][4]) const {
    constexpr int kSubsteps = KeyStep<T>::kSteps;
#pragma unroll
    for (int sub = 0; sub < kSubsteps; ++sub) {
#pragma unroll
      for (int m = 0; m < Grid::kRowTiles; ++m) {
        ptx::load_matrices(
            a[sub][m],
            queries_ + static_cast<std::uint32_t>(m * kMmaRows * T::kQueryPitch + (k + sub) * 32));
      }
    }
#pragma unroll
    for (int n = 0; n < kSliceKeys / 16; ++n) {
      ptx::load_matrices(raw[n], at_step<T>(address, k / kSubsteps) +
                                     static_cast<std::uint32_t>(row_of_key<T>(n * kMmaRows)));
    }
  }

  __device__ void weigh(float (&scores)[Grid::kRowTiles][kSliceKeys / 8][4], bool ruled) {
#pragma unroll
    for (int m = 0; m < Grid::kRowTiles; ++m) {
      const float factor[2] = {ruled ? 1.0F : factor_[m][0], ruled ? 1.0F : factor_[m][1]};
      float keep[2];
      if (!states_[m].template weigh<kSliceKeys>(scores[m], factor, keep)) continue;
#pragma unroll
      for (int n = 0; n < kTilesV; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums_[m][n][i] *= keep[i / 2];
      }
    }
  }

  __device__ void add_values(std::uint32_t keys,
                             const float (&weights)[Grid::kRowTiles][kSliceKeys / 8][4]) {
    const std::uint32_t address = value_address<T>(keys, lane_);
#pragma unroll
    for (int k = 0; k < kSliceKeys / kMmaRows; ++k) {
      std::uint32_t a[Grid::kRowTiles][4];
#pragma unroll
      for (int m = 0; m < Grid::kRowTiles; ++m) pack_weights(a[m], weights[m], k);
      constexpr int kTiles = ValueStep<T>::kTiles;
      const std::uint32_t box = address + static_cast<std::uint32_t>(row_of_key<T>(k * kMmaRows));
      std::uint32_t raw[2][4];
      ptx::load_matrices_transposed(raw[0], box);
#pragma unroll
      for (int n = 0; n < kTilesV; n += kTiles) {
        const int now = n / kTiles % 2;
        if (n + kTiles < kTilesV) {
          ptx::load_matrices_transposed(raw[1 - now], at_step<T>(box, n / kTiles + 1));
        }
        const ValueStep<T> value(raw[now]);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
          for (int m = 0; m < Grid::kRowTiles; ++m) {
            ptx::multiply_add<Element>(sums_[m][n + j], a[m], value.b[j][0], value.b[j][1]);
          }
        }
      }
    }
  }

  // The left operand of key step k.
  static __device__ void pack_weights(std::uint32_t (&a)[4],
                                      const float (&weights)[kSliceKeys / 8][4], int k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* w = weights[2 * k + i / 2] + i % 2 * 2;
      a[i] = ptx::pack<Element>(w[0], w[1]);
    }
  }

  // Of the slice's keys that some row does not see, or of all: zeroes the values that were not
  // loaded. Returns whether a value of the others is not finite, which zero weights would not keep
  // out. Warps of other rows may do the same at the same time; all write zeros, and each reads its
  // own.
  __device__ bool clear_and_inspect(std::byte* boxes, const StageInfo& block,
                                    std::int32_t first_key, bool all) {
    constexpr int kChunks = T::kValueSlabs * T::kSlabChunks;
    // A run of keys that all rows see.
    std::int32_t begin = all_.begin;
    std::int32_t end = all_.end;
    if (all_.prefix_end > first_key) {
      end = begin <= all_.prefix_end ? max(all_.prefix_end, end) : all_.prefix_end;
      begin = first_key;
    }
    begin = all ? kSliceKeys : max(0, min(begin - first_key, kSliceKeys));
    end = max(begin, min(end - first_key, kSliceKeys));
    bool found = false;
    const std::int32_t chunks = (kSliceKeys - (end - begin)) * kChunks;
    for (std::int32_t i = warp_ % kTogether * kWarp + lane_; i < chunks; i += kTogether * kWarp) {
      std::int32_t row = i / kChunks;
      if (row >= begin) row += end - begin;
      auto* chunk =
          reinterpret_cast<uint4*>(boxes + T::kValuesInGroup + chunk_at<T>(row, i % kChunks));
      if (first_key + row < block.begin || first_key + row >= block.end) {
        *chunk = make_uint4(0, 0, 0, 0);
      } else {
        found = any_not_finite<T>(*chunk) || found;
      }
    }
    if constexpr (Grid::kWarpgroups) {
      ptx::fence_before_tensor_copies();  // wgmma reads as these copies write
      return together_.any(warp_, found);
    }
    // A vote orders no accesses to memory; other lanes read what this one zeroed.
    __syncwarp();
    return __any_sync(kAllLanes, found);
  }

  // The slow way for blocks that hold infinities or NaN which some rows must not see.
  __device__ void add_visible_values(const std::byte* boxes,
                                     const float (&weights)[Grid::kRowTiles][kSliceKeys / 8][4],
                                     const std::uint32_t (&hidden)[Grid::kRowTiles]) {
#pragma unroll
    for (int m = 0; m < Grid::kRowTiles; ++m) {
      float copy[kSliceKeys / 8][4];  // in memory, so that the loop need not be unrolled
#pragma unroll
      for (int n = 0; n < kSliceKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) copy[n][i] = weights[m][n][i];
      }
#pragma unroll 1
      for (int key = 0; key < kSliceKeys; ++key) {
        const float(&of_keys)[4] = copy[key / 8];
        const int source = lane_ / 4 * 4 + key % 8 / 2;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float even = __shfl_sync(kAllLanes, of_keys[2 * h], source);
          const float odd = __shfl_sync(kAllLanes, of_keys[2 * h + 1], source);
          const std::uint32_t bits = __shfl_sync(kAllLanes, hidden[m], source);
          if (((bits >> (key / 8 * 4 + 2 * h + key % 2)) & 1U) != 0) continue;
          // As the tensor cores see it.
          const float weight = rounded(key % 2 == 0 ? even : odd);
#pragma unroll
          for (int c = 0; c < kTilesV; ++c) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const float value = value_at<T>(boxes, key, column_of<T>(c, lane_, i));
              sums_[m][c][2 * h + i] = fmaf(weight, value, sums_[m][c][2 * h + i]);
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
    ptx::wait(shared_.described + query_.index, query_.parity);
    const Finish<T> finish(params_, shared_, piece());
#pragma unroll
    for (int m = 0; m < Grid::kRowTiles; ++m) {
      finish.put_states(states_[m], first_row_ + m * kMmaRows);
    }
    if constexpr (Grid::kKeyWarps > 1) Finish<T>::sync();
#pragma unroll
    for (int m = 0; m < Grid::kRowTiles; ++m) {
      finish.write(states_[m], sums_[m], first_row_ + m * kMmaRows);
    }
    ptx::Barrier* const written = piece().slot >= 0 ? shared_.written + piece().cut : nullptr;
    __syncwarp();
    if (arrives(lane_)) {
      ptx::arrive(shared_.query_empty + query_.index);
      if (written != nullptr) ptx::arrive(written);
    }
    query_.advance(depth_.query_buffers);
  }

  const AttendKernelParams& params_;
  const Shared<T>& shared_;
  const Depth depth_;
  const bool boxes_;
  const std::int32_t lane_;
  const std::int32_t warp_;
  const std::int32_t first_row_;  // of this warp in the tile
  const std::int32_t key_warp_;   // which slice of a block is this warp's
  const std::int32_t head_;       // of the tile's KV heads this warp's
  const bool always_ruled_;
  Together together_;
  RingPosition stage_;
  RingPosition query_;
  core::RowKeys all_;
  core::RowKeys any_;
  std::uint32_t queries_ = 0;
  RowStates states_[Grid::kRowTiles];
  float factor_[Grid::kRowTiles][2];
  float sums_[Grid::kRowTiles][kTilesV][4];
};

}  // namespace diffkv::cuda::mma
