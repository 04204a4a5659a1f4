// Scores of one warp's rows and keys in registers: rules, masks, online softmax.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/softmax.h"
#include "cuda/generic/ptx.cuh"
#include "cuda/generic/tile.h"
#include "cuda/params.h"
#include "cuda/warp.cuh"

namespace diffkv::cuda::mma {

inline constexpr float kLog2E = 1.4426950408889634F;
inline constexpr float kLn2 = 0.6931471805599453F;

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

// cap * tanh(x * one_by_cap) with a relative error of about 1e-6, in fewer instructions than
// tanhf.
__device__ inline float soft_capped(float x, float cap, float one_by_cap) {
  const float y = x * one_by_cap;
  const float y2 = y * y;
  // tanh(y) = y - y^3 / 3 + 2 y^5 / 15 - 17 y^7 / 315 + ... = 1 - 2 / (1 + e^2y)
  const float near_0 =
      y * fmaf(y2, fmaf(y2, fmaf(y2, -17.0F / 315.0F, 2.0F / 15.0F), -1.0F / 3.0F), 1.0F);
  const float farther = 1.0F - __fdividef(2.0F, 1.0F + ptx::exp2(2.0F * kLog2E * y));
  return cap * (fabsf(y) < 0.25F ? near_0 : farther);
}

// The same of x = 2 log2(e) y, y = score / cap, in a third of the instructions, with an error of up
// to about cap * 2^-22.
__device__ inline float quickly_capped(float x, float cap) {
  return fmaf(-2.0F * cap, ptx::reciprocal(1.0F + ptx::exp2(x)), cap);
}
// For caps up to this one that is little beside the rounding of 16-bit operands.
inline constexpr float kMostQuickCap = 128.0F;

// qq_bias of a row and key; 0 outside the table.
__device__ inline float bias_at(const AttendKernelParams& p, std::int32_t token,
                                std::int32_t offset) {
  if (offset < 0 || offset >= p.qq_bias_size || token >= p.qq_bias_size) return 0.0F;
  return core::load_element(p.qq_bias_dtype, p.qq_bias,
                            token * p.qq_bias_stride_row + offset * p.qq_bias_stride_column);
}

// Products of rows first_row + lane / 4 (+ 8) with keys from first_key on.
template <int kKeys>
struct RowsByKeys {
  std::int32_t first_row;
  std::int32_t first_key;

  static __device__ std::int32_t lane() { return static_cast<std::int32_t>(threadIdx.x) % kWarp; }
  __device__ std::int32_t row(int h) const { return first_row + lane() / 4 + 8 * h; }
  __device__ std::int32_t key(int n, int i) const {
    return first_key + 8 * n + 2 * (lane() % 4) + i;
  }
  // A score that its row does not see: -inf, and a bit of `hidden`.
  static __device__ void hide(ScoreTile<kKeys>& s, int n, int h, int i, std::uint32_t& hidden) {
    s[n][2 * h + i] = core::kNegInf;
    hidden |= 1U << (4 * n + 2 * h + i);
  }
};

// Makes products scores, in units of log2: score = product * factor[h]. Hides what qq_bias hides.
// One loop a rule: of those that a call does not have, no instructions are fetched.
template <int kKeys, class Piece>
__device__ inline void apply_rules(const AttendKernelParams& p, const Piece& piece,
                                   const RowsByKeys<kKeys>& at, const float (&factor)[2],
                                   ScoreTile<kKeys>& s, std::uint32_t& hidden) {
  // The score of key 8 n + i, its offset from context_len.
  const auto for_each = [&](int h, auto&& fn) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) fn(s[n][2 * h + i], at.key(n, i) - piece.context_len, n, i);
    }
  };
  const auto token_of = [&](int h) {  // within the sequence
    return (piece.first_row + piece.row_in_head(at.row(h))) / p.schedule.group;
  };
  const float cap = p.soft_cap * kLog2E;
  if (cap <= 0.0F) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      for_each(h, [&](float& x, std::int32_t, int, int) { x *= factor[h]; });
    }
  } else {
    const float by_cap = ptx::reciprocal(cap);
    if (p.soft_cap <= kMostQuickCap) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float to_exponent = factor[h] * (2.0F * kLog2E) * by_cap;
        for_each(
            h, [&](float& x, std::int32_t, int, int) { x = quickly_capped(x * to_exponent, cap); });
      }
    } else {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        for_each(h, [&](float& x, std::int32_t, int, int) {
          x = soft_capped(x * factor[h], cap, by_cap);
        });
      }
    }
  }
  if (p.alibi_slopes.data != nullptr) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float slope = piece.slope[at.row(h)] * kLog2E;
      if (!p.alibi_sqrt) {
        for_each(h, [&](float& x, std::int32_t offset, int, int) {
          x = fmaf(slope, static_cast<float>(offset), x);
        });
      } else {
        const std::int32_t token = token_of(h);
        for_each(h, [&](float& x, std::int32_t offset, int, int) {
          x -= slope * sqrtf(static_cast<float>(max(token - offset, 0)));
        });
      }
    }
  }
  if (p.qq_bias == nullptr) return;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const std::int32_t token = token_of(h);
    for_each(h, [&](float& x, std::int32_t offset, int n, int i) {
      const float bias = bias_at(p, token, offset);
      x += bias * kLog2E;
      if (bias == core::kNegInf) at.hide(s, n, h, i, hidden);
    });
  }
}

// Of a lane's keys those whose offset from the tile's first is less than `end`, as bits of
// RowsByKeys::hide of row 0.
template <int kKeys>
__device__ inline std::uint32_t keys_below(std::int32_t end) {
  const std::int32_t from_own = max(0, min(end, kKeys)) + 7 - 2 * (RowsByKeys<kKeys>::lane() % 4);
  const auto first = [](std::int32_t count) {
    return static_cast<std::uint32_t>((std::uint64_t{1} << (4 * count)) - 1);
  };
  return (first(from_own / 8) & 0x11111111U) | (first((from_own - 1) / 8) & 0x22222222U);
}

// Hides what the rows do not see. Apart from the rules, and in few instructions: most tiles end
// with a block that is hidden in part, for which they all come from memory.
template <int kKeys, class Piece>
__device__ inline void apply_mask(const Piece& piece, const RowsByKeys<kKeys>& at,
                                  ScoreTile<kKeys>& s, std::uint32_t& hidden) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const std::int32_t r = at.row(h);
    const std::uint32_t seen = keys_below<kKeys>(piece.prefix_end[r] - at.first_key) |
                               (keys_below<kKeys>(piece.end[r] - at.first_key) &
                                ~keys_below<kKeys>(piece.begin[r] - at.first_key));
    const std::uint32_t unseen = ~seen & 0x33333333U;
    hidden |= unseen << (2 * h);
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if ((unseen >> (4 * n + i) & 1U) != 0) s[n][2 * h + i] = core::kNegInf;
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
