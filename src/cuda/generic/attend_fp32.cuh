// Attention in fp32 on CUDA cores for any types, head sizes, strides and tile classes: what runs
// where no tensor-core kernel does, and what those are checked against.
//
// A block of 4 warps takes 16 rows of a tile at a time and walks its keys in steps of 32. Scores: a
// lane has a key, a warp 4 rows, so that a row's softmax is a reduction over the lanes. Values: a
// thread has columns, of all 16 rows; probabilities pass through shared memory, in two buffers, so
// that a step needs one barrier.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "core/mask.h"
#include "core/softmax.h"
#include "cuda/kv_codec.cuh"
#include "cuda/params.h"
#include "cuda/row_io.cuh"
#include "cuda/warp.cuh"
#include "plan/schedule.h"
#include "plan/walk.h"

namespace diffkv::cuda::fp32 {

inline constexpr int kThreads = 128;
inline constexpr int kRows = 16;                              // of a tile at a time
inline constexpr int kWarpRows = kRows / (kThreads / kWarp);  // whose scores a warp has
inline constexpr int kStepKeys = kWarp;
// Sums are moved into outer sums after so many blocks of a plan, so that rounding errors of long
// sequences stay small.
inline constexpr std::int32_t kFoldBlocks = 128;
// The probability of a hidden key: no exp gives it, so that hidden values can be left out of a sum
// instead of being multiplied by zero.
inline constexpr float kHidden = -0.0F;

__device__ inline bool is_hidden(float probability) {
  return core::bits_of(probability) == core::bits_of(kHidden);
}

// Arrays whose size depends on the head sizes come after it: query [kRows, head_size_qk] and outer
// [kRows, head_size_v].
struct alignas(16) Shared {
  float probability[2][kStepKeys][kRows];
  float keep[2][kRows];  // what sums so far are multiplied with
  const std::byte* value[2][kStepKeys];
  std::int64_t token[kRows];
  std::int32_t head[kRows];
  std::int32_t index[kRows];  // of the query in its sequence
  core::RowKeys keys[kRows];
  float slope[kRows];
  bool live[kRows];  // the row exists and its token is below num_tokens
  core::SoftmaxState state[kRows];
  RowEnd end[kRows];

  __device__ float* query() { return reinterpret_cast<float*>(this + 1); }
  __device__ float* outer(std::int32_t head_size_qk) { return query() + kRows * head_size_qk; }
};

// Bytes of shared memory for these head sizes.
constexpr std::int64_t shared_bytes(std::int64_t head_size_qk, std::int64_t head_size_v) {
  return static_cast<std::int64_t>(sizeof(Shared)) +
         kRows * (head_size_qk + head_size_v) * static_cast<std::int64_t>(sizeof(float));
}

// The key and value rows of one key.
struct KeyPlace {
  const std::byte* key;
  const std::byte* value;
};

__device__ inline const std::byte* row_of(const PlaneParams& plane, std::int64_t block,
                                          std::int64_t offset, std::int32_t head) {
  return plane.data +
         (block * plane.stride_block + offset * plane.stride_token + head * plane.stride_head) *
             size_of(plane.dtype);
}

__device__ inline KeyPlace place_of(const AttendKernelParams& p, std::int32_t seq,
                                    std::int32_t kv_head, std::int32_t key) {
  std::int64_t block = 0;
  std::int64_t offset = 0;
  if (p.block_table == nullptr) {
    const std::int64_t token = std::int64_t{p.kv_start[seq * p.kv_start_stride]} + key;
    offset = min(max(token, std::int64_t{0}), std::int64_t{p.block_size} - 1);
  } else {
    const std::int32_t logical = p.block_shift >= 0 ? key >> p.block_shift : key / p.block_size;
    offset = key - logical * p.block_size;
    const std::int32_t page =
        p.block_table[seq * p.block_table_stride + min(logical, p.max_blocks - 1)];
    block = min(max(page, 0), p.num_blocks - 1);
  }
  return {row_of(p.key, block, offset, kv_head), row_of(p.value, block, offset, kv_head)};
}

// query . key of this warp's rows; `query` is [kWarpRows, head_size] in shared memory.
template <DType kDType>
__device__ inline void dot(const float* query, const std::byte* key, std::int32_t head_size,
                           float (&score)[kWarpRows]) {
  for (std::int32_t i = 0; i < head_size; i += kChunk) {
    float x[kChunk];
    load_chunk<kDType>(key, i, x);
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const float4* q = reinterpret_cast<const float4*>(query + r * head_size + i);
      const float4 low = q[0];
      const float4 high = q[1];
      float sum = score[r];
      sum = fmaf(low.x, x[0], sum), sum = fmaf(low.y, x[1], sum);
      sum = fmaf(low.z, x[2], sum), sum = fmaf(low.w, x[3], sum);
      sum = fmaf(high.x, x[4], sum), sum = fmaf(high.y, x[5], sum);
      sum = fmaf(high.z, x[6], sum), sum = fmaf(high.w, x[7], sum);
      score[r] = sum;
    }
  }
}

__device__ inline void dot(DType dtype, const float* query, const std::byte* key,
                           std::int32_t head_size, float (&score)[kWarpRows]) {
  switch (dtype) {
    case DType::kF32:
      return dot<DType::kF32>(query, key, head_size, score);
    case DType::kF16:
      return dot<DType::kF16>(query, key, head_size, score);
    case DType::kBF16:
      return dot<DType::kBF16>(query, key, head_size, score);
    case DType::kE5M2:
      return dot<DType::kE5M2>(query, key, head_size, score);
    default:
      return dot<DType::kE4M3>(query, key, head_size, score);
  }
}

// A score on its way to the softmax: soft cap, ALiBi, query-query bias. -inf from the bias hides
// the key, which is told by `seen`.
__device__ inline float apply_rules(const AttendKernelParams& p, float score, float slope,
                                    std::int32_t index, std::int64_t context_len, std::int32_t key,
                                    bool& seen) {
  if (p.soft_cap > 0.0F) score = p.soft_cap * tanhf(score / p.soft_cap);
  const std::int64_t column = key - context_len;  // keys of this step's queries start at 0
  if (p.alibi_slopes.data != nullptr) {
    if (p.alibi_sqrt) {
      const std::int64_t distance = index - column;
      if (distance > 0) score -= slope * sqrtf(static_cast<float>(distance));
    } else {
      score += slope * static_cast<float>(column);
    }
  }
  if (p.qq_bias != nullptr && column >= 0 && column < p.qq_bias_size && index < p.qq_bias_size) {
    const float bias =
        core::load_element(p.qq_bias_dtype, p.qq_bias,
                           index * p.qq_bias_stride_row + column * p.qq_bias_stride_column);
    seen = seen && bias != core::kNegInf;
    score += bias;
  }
  return score;
}

__device__ inline float warp_max(float x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lanes));
  }
  return x;
}

// Up to kRows rows of one KV head of a piece of a tile, by the whole block. kColumns: columns of
// the output a thread has.
template <int kColumns>
class Rows {
 public:
  __device__ Rows(const AttendKernelParams& p, Shared& shared, const plan::Piece& piece,
                  std::int32_t tile_class, std::int32_t head, std::int32_t first)
      : p_(p),
        shared_(shared),
        piece_(piece),
        tile_class_(tile_class),
        head_(head),
        kv_head_(piece.tile.kv_head + head),
        first_(first),
        count_(min(piece.tile.num_rows - first, kRows)),
        seq_(plan::seq_mask(p.schedule, piece.seq)),
        warp_(static_cast<int>(threadIdx.x) / kWarp),
        lane_(static_cast<int>(threadIdx.x) % kWarp) {}

  __device__ void run() {
    __syncthreads();  // former rows are done with the shared memory
    find_rows();
    __syncthreads();
    load_queries();
    clear();
    __syncthreads();
    for (std::int32_t v = piece_.begin_block; v < piece_.end_block; ++v) {
      if (v > piece_.begin_block && (v - piece_.begin_block) % kFoldBlocks == 0) fold();
      const KeyRange range = piece_.tile.keys_at(v);
      for (std::int32_t key = range.begin; key < range.end; key += kStepKeys) {
        const std::int32_t end = min(key + kStepKeys, range.end);
        if (some_row_sees(key, end)) step(key, end);
      }
    }
    finish();
  }

 private:
  __device__ void find_rows() {
    const auto r = static_cast<std::int32_t>(threadIdx.x);
    if (r >= kRows) return;
    core::RowKeys keys;
    bool live = false;
    if (r < count_) {
      const RowPlace place = row_place(p_.schedule, piece_, head_, first_ + r);
      live = place.token < p_.schedule.tables.num_tokens;
      shared_.token[r] = place.token;
      shared_.head[r] = place.head;
      shared_.index[r] = place.query;
      // An empty pool has no key to read.
      const bool has_keys = p_.num_blocks > 0 && p_.block_size > 0 &&
                            (p_.block_table == nullptr || p_.max_blocks > 0);
      if (live && has_keys) keys = core::row_keys(p_.schedule.mask, seq_, place.query);
      if (live && p_.alibi_slopes.data != nullptr) {
        shared_.slope[r] = scale_at(p_.alibi_slopes, place.head);
      }
    }
    shared_.live[r] = live;
    shared_.keys[r] = keys;
  }

  __device__ void load_queries() {
    const std::int32_t chunks = p_.head_size_qk / kChunk;
    const float scale = score_scale(p_, kv_head_);
    for (std::int32_t i = static_cast<std::int32_t>(threadIdx.x); i < kRows * chunks;
         i += kThreads) {
      const std::int32_t r = i / chunks;
      const std::int32_t at = (i - r * chunks) * kChunk;
      float x[kChunk] = {};
      if (shared_.live[r]) {
        load_chunk(p_.query.dtype, row_at(p_.query, shared_.token[r], shared_.head[r]), at, x);
      }
      float* to = shared_.query() + r * p_.head_size_qk + at;
#pragma unroll
      for (int j = 0; j < kChunk; ++j) to[j] = x[j] * scale;
    }
    for (int r = 0; r < count_; ++r) {
      const core::RowKeys keys = shared_.keys[r];
      prefix_end_ = max(prefix_end_, keys.prefix_end);
      if (keys.begin >= keys.end) continue;
      begin_ = begin_ < 0 ? keys.begin : min(begin_, keys.begin);
      end_ = max(end_, keys.end);
    }
  }

  __device__ void clear() {
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      max_[r] = core::kNegInf;
      sum_[r] = outer_sum_[r] = 0.0F;
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) acc_[i][r] = 0.0F;
    }
  }

  __device__ bool some_row_sees(std::int32_t key, std::int32_t end) const {
    return key < prefix_end_ || (key < end_ && end > begin_);
  }

  __device__ std::int32_t column(int i) const {
    return i * kThreads + static_cast<std::int32_t>(threadIdx.x);
  }

  // Moves what was accumulated into the outer sums, which have the same maximum.
  __device__ void fold() {
    float* outer = shared_.outer(p_.head_size_qk);
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      outer_sum_[r] += sum_[r];
      sum_[r] = 0.0F;
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (column(i) >= p_.head_size_v) continue;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float& sum = outer[r * p_.head_size_v + column(i)];
        sum = folded_ ? sum + acc_[i][r] : acc_[i][r];
        acc_[i][r] = 0.0F;
      }
    }
    folded_ = true;
  }

  // Keys [key, end), at most kStepKeys.
  __device__ void step(std::int32_t key, std::int32_t end) {
    score(key, end);
    __syncthreads();
    accumulate(end - key);
    buffer_ ^= 1;
  }

  __device__ void score(std::int32_t first_key, std::int32_t end) {
    const std::int32_t key = first_key + lane_;
    const int first_row = warp_ * kWarpRows;
    const bool works = first_row < count_;
    // Lanes past the last key repeat it, and see nothing.
    KeyPlace place{};
    if (works || warp_ == 0) {
      place = place_of(p_, piece_.seq, kv_head_, min(key, end - 1));
    }
    if (warp_ == 0) shared_.value[buffer_][lane_] = place.value;
    float score[kWarpRows] = {};
    if (works) {
      dot(p_.key.dtype, shared_.query() + first_row * p_.head_size_qk, place.key, p_.head_size_qk,
          score);
    }
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const core::RowKeys keys = shared_.keys[first_row + r];
      bool seen = key < end && (key < keys.prefix_end || (key >= keys.begin && key < keys.end));
      float s = core::kNegInf;
      if (seen) {
        s = apply_rules(p_, score[r], shared_.slope[first_row + r], shared_.index[first_row + r],
                        seq_.context_len(), key, seen);
      }
      const float max = fmaxf(max_[r], warp_max(seen ? s : core::kNegInf));
      const float keep = core::exp_difference(max_[r], max);
      const float probability = seen ? core::exp_difference(s, max) : kHidden;
      max_[r] = max;
      sum_[r] = sum_[r] * keep + probability;
      outer_sum_[r] *= keep;
      shared_.probability[buffer_][lane_][first_row + r] = probability;
      if (lane_ == 0) shared_.keep[buffer_][first_row + r] = keep;
    }
  }

  __device__ void accumulate(std::int32_t num_keys) {
    float* outer = shared_.outer(p_.head_size_qk);
    for (int r = 0; r < kRows; ++r) {
      if (!folded_ || shared_.keep[buffer_][r] == 1.0F) continue;
      for (int i = 0; i < kColumns; ++i) {
        if (column(i) < p_.head_size_v) {
          outer[r * p_.head_size_v + column(i)] *= shared_.keep[buffer_][r];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) acc_[i][r] *= shared_.keep[buffer_][r];
    }
    switch (p_.value.dtype) {
      case DType::kF32:
        return accumulate<DType::kF32>(num_keys);
      case DType::kF16:
        return accumulate<DType::kF16>(num_keys);
      case DType::kBF16:
        return accumulate<DType::kBF16>(num_keys);
      case DType::kE5M2:
        return accumulate<DType::kE5M2>(num_keys);
      default:
        return accumulate<DType::kE4M3>(num_keys);
    }
  }

  template <DType kDType>
  __device__ void accumulate(std::int32_t num_keys) {
#pragma unroll 4
    for (std::int32_t k = 0; k < num_keys; ++k) {
      const std::byte* row = shared_.value[buffer_][k];
      const auto* probabilities = reinterpret_cast<const float4*>(shared_.probability[buffer_][k]);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        if (column(i) >= p_.head_size_v) continue;
        const float x = core::load_element(kDType, row, column(i));
        // A value that is not finite counts in the rows that see it alone.
        const bool finite = fabsf(x) < std::numeric_limits<float>::infinity();
#pragma unroll
        for (int r = 0; r < kRows / 4; ++r) {
          const float4 four = probabilities[r];
          const float weights[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (finite || !is_hidden(weights[j])) {
              acc_[i][4 * r + j] = fmaf(weights[j], x, acc_[i][4 * r + j]);
            }
          }
        }
      }
    }
  }

  __device__ void finish() {
    fold();  // so that the outer sums have all
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const float sum = sum_of_warp(outer_sum_[r] + sum_[r]);
      if (lane_ == 0) shared_.state[warp_ * kWarpRows + r] = {max_[r], sum};
    }
    __syncthreads();
    const detail::PlanTables& tables = p_.schedule.tables;
    const auto own = static_cast<int>(threadIdx.x);
    if (own < count_ && shared_.live[own]) {
      const core::SoftmaxState state = shared_.state[own];
      if (piece_.slot >= 0) {
        const std::int64_t at =
            plan::partial_row(p_.schedule, tile_class_, piece_.slot, first_ + own, head_);
        tables.partial_state[at] = state;
      } else {
        shared_.end[own] = finish_row(p_, shared_.token[own], shared_.head[own], kv_head_, state);
      }
    }
    __syncthreads();
    // A loop: unrolled, each element would have code for every type of output.
    const float* outer = shared_.outer(p_.head_size_qk);
#pragma unroll 1
    for (std::int32_t i = 0; i < kColumns; ++i) {
      if (column(i) >= p_.head_size_v) continue;
#pragma unroll 1
      for (std::int32_t r = 0; r < count_; ++r) {
        if (!shared_.live[r]) continue;
        const float acc = outer[r * p_.head_size_v + column(i)];
        if (piece_.slot >= 0) {
          const std::int64_t at =
              plan::partial_row(p_.schedule, tile_class_, piece_.slot, first_ + r, head_);
          tables.partial_acc[at * tables.partial_stride + column(i)] = acc;
        } else {
          store_element(p_.output.dtype, shared_.end[r](acc),
                        row_at(p_.output, shared_.token[r], shared_.head[r]), column(i));
        }
      }
    }
  }

  const AttendKernelParams& p_;
  Shared& shared_;
  const plan::Piece& piece_;
  std::int32_t tile_class_;
  std::int32_t head_;  // of the tile's
  std::int32_t kv_head_;
  std::int32_t first_;
  std::int32_t count_;
  core::SeqMask seq_;
  int warp_;
  int lane_;
  int buffer_ = 0;
  bool folded_ = false;
  // Keys that some row sees lie in [0, prefix_end_) and [begin_, end_).
  std::int32_t prefix_end_ = 0;
  std::int32_t begin_ = -1;
  std::int32_t end_ = 0;
  float max_[kWarpRows];
  float sum_[kWarpRows];  // this lane's part
  float outer_sum_[kWarpRows];
  float acc_[kColumns][kRows];
};

template <int kColumns>
__global__ void __launch_bounds__(kThreads)
    attend_kernel(const __grid_constant__ AttendKernelParams p, std::int32_t tile_class) {
  extern __shared__ float4 memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  plan::for_each_piece(p.schedule, tile_class, static_cast<std::int32_t>(blockIdx.x),
                       [&](const plan::Piece& piece) {
                         const plan::Tile& tile = piece.tile;
                         for (std::int32_t head = 0; head < tile.num_heads; ++head) {
                           for (std::int32_t first = 0; first < tile.num_rows; first += kRows) {
                             Rows<kColumns>(p, shared, piece, tile_class, head, first).run();
                           }
                         }
                       });
}

}  // namespace diffkv::cuda::fp32
