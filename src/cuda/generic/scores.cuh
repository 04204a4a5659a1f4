// Scores of one warp's rows and keys in registers: rules, masks, online softmax.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/softmax.h"
#include "cuda/generic/ptx.cuh"
#include "cuda/generic/tile.h"
#include "cuda/params.h"

namespace diffkv::cuda::mma {

inline constexpr float kLog2E = 1.4426950408889634F;
inline constexpr float kLn2 = 0.6931471805599453F;
inline constexpr std::uint32_t kAllLanes = 0xffffffffU;

// What four lanes that share rows know of them together.
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// Scores of 16 rows and kKeys keys: s[n][2 h + i] is row lane / 4 + 8 h and key 8 n + 2 (lane % 4)
// + i of the warp's.
template <int kKeys>
using ScoreTile = float[kKeys / 8][4];

// What makes a raw product a score besides its scale, of a row.
struct RowRules {
  float scale;
  float slope;
  std::int32_t token;  // within the sequence
};

// Soft cap and ALiBi of one score, in units of log2; `offset` is j - context_len. A call, because
// as many copies as a lane has scores would not fit into the instruction cache.
__device__ __noinline__ inline float ruled_score(const AttendKernelParams& p, const RowRules& row, float product,
                                    std::int32_t offset) {
  float s = product * row.scale;
  if (p.soft_cap > 0.0F) s = p.soft_cap * tanhf(s / p.soft_cap);
  if (p.alibi_slopes.data != nullptr) {
    const float distance = static_cast<float>(row.token - offset);
    s += p.alibi_sqrt ? -row.slope * sqrtf(fmaxf(distance, 0.0F))
                      : row.slope * static_cast<float>(offset);
  }
  return s * kLog2E;
}

// qq_bias of a row and key; 0 outside the table.
__device__ inline float bias_at(const AttendKernelParams& p, std::int32_t token,
                                std::int32_t offset) {
  if (offset < 0 || offset >= p.qq_bias_size || token >= p.qq_bias_size) return 0.0F;
  return core::load_element(p.qq_bias_dtype, p.qq_bias,
                            token * p.qq_bias_stride_row + offset * p.qq_bias_stride_column);
}

// Makes the products of rows first_row + lane / 4 (+ 8) with keys from first_key on scores, and
// hides what the rows do not see: -inf, and a bit of `hidden` (bit 4 n + 2 h + i).
template <int kKeys, class Piece>
__device__ inline void rule_and_mask(const AttendKernelParams& p, const Piece& piece,
                                     std::int32_t first_row, std::int32_t first_key, bool ruled,
                                     bool masked, ScoreTile<kKeys>& s, std::uint32_t& hidden) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const std::int32_t r = first_row + lane / 4 + 8 * h;
    const std::int32_t prefix_end = piece.prefix_end[r];
    const std::int32_t begin = piece.begin[r];
    const std::int32_t end = piece.end[r];
    RowRules row{};
    if (ruled) {
      row.scale = piece.score_scale * piece.query_factor[r];
      row.slope = piece.slope[r];
      row.token = (piece.first_row + r) / p.schedule.group;
    }
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const std::int32_t key = first_key + 8 * n + 2 * (lane % 4) + i;
        float& score = s[n][2 * h + i];
        bool hide = masked && !(key < prefix_end || (key >= begin && key < end));
        if (ruled) {
          const std::int32_t offset = key - piece.context_len;
          score = ruled_score(p, row, score, offset);
          if (p.qq_bias != nullptr) {
            const float bias = bias_at(p, row.token, offset);
            hide = hide || bias == core::kNegInf;
            score += bias * kLog2E;
          }
        }
        if (hide) {
          score = core::kNegInf;
          hidden |= 1U << (4 * n + 2 * h + i);
        }
      }
    }
  }
}

// The online softmax of 16 rows: of rows lane / 4 and lane / 4 + 8.
struct RowStates {
  float max[2] = {core::kNegInf, core::kNegInf};  // log2, the same in four lanes
  float sum[2] = {0.0F, 0.0F};                    // each lane's own keys'

  // Turns scores s * factor into weights exp2(s * factor - max); `keep` is what sums so far are to
  // be multiplied with. Returns whether that is not 1. factor > 0.
  template <int kKeys>
  __device__ bool weigh(ScoreTile<kKeys>& s, const float (&factor)[2], float (&keep)[2]) {
    bool moved = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float largest = s[0][2 * h];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        largest = fmaxf(largest, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
      }
      const float before = max[h];
      max[h] = fmaxf(before, quad_max(largest) * factor[h]);
      // With no key yet every weight is exp2(-inf).
      const float base = max[h] == core::kNegInf ? 0.0F : max[h];
      keep[h] = ptx::exp2(before - base);
      moved = moved || before != max[h];
      float added = 0.0F;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = s[n][2 * h + i];
          x = ptx::exp2(fmaf(x, factor[h], -base));
          added += x;
        }
      }
      sum[h] = sum[h] * keep[h] + added;
    }
    return __any_sync(kAllLanes, moved);
  }
};

}  // namespace diffkv::cuda::mma
