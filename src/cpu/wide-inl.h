// The arithmetic of a tile of many rows on one block of keys, for the target being compiled. Query
// rows are the vector lanes throughout: scores, probabilities and the accumulator are stored [..,
// rows], so the softmax needs no horizontal operation, and each key and value element is broadcast
// from memory into a fused multiply-add. A row group is up to kGroupVectors vectors of rows.

// Per-target include guard.
#if defined(DIFFKV_CPU_WIDE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DIFFKV_CPU_WIDE_INL_H_
#undef DIFFKV_CPU_WIDE_INL_H_
#else
#define DIFFKV_CPU_WIDE_INL_H_
#endif

#include <cstdint>
#include <limits>

#include "core/softmax.h"
#include "cpu/kernels.h"
#include "cpu/tile_base.h"
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace diffkv::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using LaneTag = hn::CappedTag<float, 16>;
using LaneVec = hn::Vec<LaneTag>;
using IntTag = hn::RebindToSigned<LaneTag>;
inline constexpr std::int64_t kLanes = static_cast<std::int64_t>(hn::MaxLanes(LaneTag()));

// 3 vectors of rows x 8 keys (or value columns) keep 24 of 32 registers busy on AVX-512; the
// targets with 16 registers take 4 keys.
inline constexpr int kGroupVectors = 3;
template <int kVectors>
inline constexpr int kColumns = kVectors == 1 || kLanes == 16 ? 8 : 4;
// Keys of a scored block are padded to this.
inline constexpr std::int64_t kKeyPadding = 8;

// exp(x) for x <= 0, relative error below 1e-7: 2^n (1 + r + r^2 q(r)), q a degree-4 minimax fit of
// (exp(r) - 1 - r) / r^2 on |r| <= ln(2) / 2, weighted for the relative error of exp. Below -87,
// where the result would leave fp32's normal range, 0. NaN stays NaN.
HWY_INLINE LaneVec exp_nonpositive(LaneVec x) {
  const LaneTag d;
  const IntTag di;
  const LaneVec least = hn::Set(d, -87.0F);
  const LaneVec clamped = hn::IfThenElse(hn::Lt(x, least), least, x);
  // round(x / ln 2) appears in the low mantissa bits of x / ln 2 + 1.5 * 2^23.
  const LaneVec magic = hn::Set(d, 12582912.0F);
  const LaneVec shifted = hn::MulAdd(clamped, hn::Set(d, 1.44269504F), magic);
  const LaneVec n = hn::Sub(shifted, magic);
  // ln 2 = 0.693359375 - 2.12194440e-4, the first part exact in few bits.
  LaneVec r = hn::NegMulAdd(n, hn::Set(d, 0.693359375F), clamped);
  r = hn::NegMulAdd(n, hn::Set(d, -2.12194440e-4F), r);
  LaneVec q = hn::MulAdd(hn::Set(d, 0.00138145394F), r, hn::Set(d, 0.00836874545F));
  q = hn::MulAdd(q, r, hn::Set(d, 0.0416683890F));
  q = hn::MulAdd(q, r, hn::Set(d, 0.166665211F));
  q = hn::MulAdd(q, r, hn::Set(d, 0.49999994F));
  const LaneVec y = hn::Add(hn::MulAdd(q, hn::Mul(r, r), r), hn::Set(d, 1.0F));
  const LaneVec scaled =
      hn::BitCast(d, hn::Add(hn::BitCast(di, y), hn::ShiftLeft<23>(hn::BitCast(di, shifted))));
  // Adding to the exponent would lose a NaN whose mantissa overflows; such an x fails both tests.
  return hn::IfThenElse(hn::Ge(x, least), scaled, hn::IfThenElse(hn::Lt(x, least), hn::Zero(d), x));
}

// One row group's place in a tile's scratch; `width` = vectors * kLanes.
struct GroupBuffers {
  const float* query = nullptr;  // [head_size_qk, width], scaled
  float* acc = nullptr;          // [head_size_v, width]
  float* scores = nullptr;       // [kBlockKeys, width], then probabilities
  float* max = nullptr;          // [width]
  float* sum = nullptr;          // [width]
  RowInfo rows;                  // [width] each
};

// What is done to the scores of a block besides scaling.
struct ScoreRules {
  float soft_cap = 0.0F;
  bool alibi = false;
  bool alibi_sqrt = false;
  std::int32_t context_len = 0;

  bool any() const { return soft_cap > 0.0F || alibi; }
};

// scores[key, row] = sum over d of key[key, d] * query[d, row], for keys padded to kKeyPadding.
template <int kVectors>
HWY_NOINLINE void score_block(const GroupBuffers& group, const float* HWY_RESTRICT keys,
                              std::int64_t num_keys, std::int64_t head_size_qk) {
  constexpr int kKeys = kColumns<kVectors>;
  constexpr std::int64_t kWidth = kVectors * kLanes;
  const LaneTag d;
  for (std::int64_t k = 0; k < num_keys; k += kKeys) {
    LaneVec acc[kKeys][kVectors];
    HWY_UNROLL(8)
    for (auto& row : acc) {
      for (LaneVec& v : row) v = hn::Zero(d);
    }
    const float* HWY_RESTRICT key = keys + k * head_size_qk;
    const float* HWY_RESTRICT query = group.query;
    for (std::int64_t i = 0; i < head_size_qk; ++i, ++key, query += kWidth) {
      LaneVec q[kVectors];
      for (int v = 0; v < kVectors; ++v) q[v] = hn::Load(d, query + v * kLanes);
      HWY_UNROLL(8)
      for (int j = 0; j < kKeys; ++j) {
        const LaneVec x = hn::Set(d, key[j * head_size_qk]);
        for (int v = 0; v < kVectors; ++v) acc[j][v] = hn::MulAdd(x, q[v], acc[j][v]);
      }
    }
    HWY_UNROLL(8)
    for (int j = 0; j < kKeys; ++j) {
      for (int v = 0; v < kVectors; ++v) {
        hn::Store(acc[j][v], d, group.scores + (k + j) * kWidth + v * kLanes);
      }
    }
  }
}

// cap * tanh(s / cap); NaN stays NaN.
HWY_INLINE LaneVec soft_cap(float cap, LaneVec s) {
  const LaneTag d;
  const LaneVec x = hn::Mul(s, hn::Set(d, 1.0F / cap));
  return hn::IfThenElse(hn::IsNaN(x), x, hn::Mul(hn::Set(d, cap), hn::Tanh(d, x)));
}

// Soft cap and ALiBi on the scores of keys first_key .. first_key + num_keys - 1.
HWY_INLINE void apply_rules(const ScoreRules& rules, const GroupBuffers& group, std::int64_t width,
                            std::int32_t first_key, std::int64_t num_keys) {
  const LaneTag d;
  const IntTag di;
  for (std::int64_t k = 0; k < num_keys; ++k) {
    const std::int32_t key = first_key + static_cast<std::int32_t>(k);
    for (std::int64_t r = 0; r < width; r += kLanes) {
      float* HWY_RESTRICT at = group.scores + k * width + r;
      LaneVec s = hn::Load(d, at);
      if (rules.soft_cap > 0.0F) s = soft_cap(rules.soft_cap, s);
      if (rules.alibi) {
        const LaneVec slope = hn::Load(d, group.rows.slope + r);
        if (rules.alibi_sqrt) {
          const auto distance = hn::Max(
              hn::Sub(hn::Load(di, group.rows.position + r), hn::Set(di, key)), hn::Zero(di));
          s = hn::NegMulAdd(slope, hn::Sqrt(hn::ConvertTo(d, distance)), s);
        } else {
          s = hn::MulAdd(slope, hn::Set(d, static_cast<float>(key - rules.context_len)), s);
        }
      }
      hn::Store(s, d, at);
    }
  }
}

// -inf where the row does not see the key.
HWY_INLINE void apply_mask(const GroupBuffers& group, std::int64_t width, std::int32_t first_key,
                           std::int64_t num_keys) {
  const LaneTag d;
  const IntTag di;
  const LaneVec hidden = hn::Set(d, core::kNegInf);
  for (std::int64_t r = 0; r < width; r += kLanes) {
    const auto prefix_end = hn::Load(di, group.rows.prefix_end + r);
    const auto begin = hn::Load(di, group.rows.begin + r);
    const auto end = hn::Load(di, group.rows.end + r);
    for (std::int64_t k = 0; k < num_keys; ++k) {
      const auto key = hn::Set(di, first_key + static_cast<std::int32_t>(k));
      const auto in_window = hn::AndNot(hn::Lt(key, begin), hn::Lt(key, end));
      const auto seen = hn::Or(in_window, hn::Lt(key, prefix_end));
      float* HWY_RESTRICT at = group.scores + k * width + r;
      hn::Store(hn::IfThenElse(hn::RebindMask(d, seen), hn::Load(d, at), hidden), d, at);
    }
  }
}

// Scores to probabilities against the new running max; sum is updated, `keep` [width] gets the
// factor of what was accumulated before. With kMarkHidden a score of -inf leaves -0 and not +0, so
// that accumulate_visible can tell it from an underflow.
template <int kVectors, bool kMarkHidden>
HWY_NOINLINE void softmax_block(const GroupBuffers& group, std::int64_t num_keys,
                                float* HWY_RESTRICT keep) {
  constexpr std::int64_t kWidth = kVectors * kLanes;
  const LaneTag d;
  const LaneVec hidden = hn::Set(d, core::kNegInf);
  for (int v = 0; v < kVectors; ++v) {
    float* HWY_RESTRICT scores = group.scores + v * kLanes;
    const LaneVec old_max = hn::Load(d, group.max + v * kLanes);
    LaneVec max = old_max;
    for (std::int64_t k = 0; k < num_keys; ++k) {
      max = hn::Max(hn::Load(d, scores + k * kWidth), max);
    }
    // Nothing seen yet: any finite base gives exp(-inf - base) = 0.
    const LaneVec base = hn::IfThenElse(hn::Eq(max, hidden), hn::Zero(d), max);
    LaneVec sum = hn::Zero(d);
    for (std::int64_t k = 0; k < num_keys; ++k) {
      const LaneVec s = hn::Load(d, scores + k * kWidth);
      LaneVec p = exp_nonpositive(hn::Sub(s, base));
      sum = hn::Add(sum, p);
      if constexpr (kMarkHidden) p = hn::IfThenElse(hn::Eq(s, hidden), hn::Set(d, -0.0F), p);
      hn::Store(p, d, scores + k * kWidth);
    }
    const LaneVec factor = exp_nonpositive(hn::Sub(old_max, base));
    hn::Store(factor, d, keep + v * kLanes);
    hn::Store(max, d, group.max + v * kLanes);
    float* HWY_RESTRICT total = group.sum + v * kLanes;
    hn::Store(hn::MulAdd(hn::Load(d, total), factor, sum), d, total);
  }
}

// acc[c, row] = acc[c, row] * keep[row] + sum over keys of value[key, c] * p[key, row]. Values are
// stored [head_size_v / 8, kBlockKeys, 8]. A block is summed on its own first, which keeps the
// rounding error of long sequences down.
template <int kVectors>
HWY_NOINLINE void accumulate_block(const GroupBuffers& group, const float* HWY_RESTRICT values,
                                   std::int64_t num_keys, std::int64_t head_size_v,
                                   const float* HWY_RESTRICT keep) {
  constexpr int kValues = kColumns<kVectors>;
  constexpr std::int64_t kWidth = kVectors * kLanes;
  const LaneTag d;
  for (std::int64_t c = 0; c < head_size_v; c += kValues) {
    LaneVec acc[kValues][kVectors];
    HWY_UNROLL(8)
    for (auto& row : acc) {
      for (LaneVec& v : row) v = hn::Zero(d);
    }
    const float* HWY_RESTRICT value = values + (c / 8) * (kBlockKeys * 8) + c % 8;
    const float* HWY_RESTRICT p = group.scores;
    for (std::int64_t k = 0; k < num_keys; ++k, value += 8, p += kWidth) {
      LaneVec weight[kVectors];
      for (int v = 0; v < kVectors; ++v) weight[v] = hn::Load(d, p + v * kLanes);
      HWY_UNROLL(8)
      for (int j = 0; j < kValues; ++j) {
        const LaneVec x = hn::Set(d, value[j]);
        for (int v = 0; v < kVectors; ++v) acc[j][v] = hn::MulAdd(x, weight[v], acc[j][v]);
      }
    }
    HWY_UNROLL(8)
    for (int j = 0; j < kValues; ++j) {
      for (int v = 0; v < kVectors; ++v) {
        float* HWY_RESTRICT at = group.acc + (c + j) * kWidth + v * kLanes;
        hn::Store(hn::MulAdd(hn::Load(d, at), hn::Load(d, keep + v * kLanes), acc[j][v]), d, at);
      }
    }
  }
}

// The same where some value of the block is NaN or infinite and some row does not see every key:
// hidden keys (marked -0) are left out, not multiplied by zero.
HWY_INLINE void accumulate_visible(const GroupBuffers& group, std::int64_t width,
                                   const float* HWY_RESTRICT values, std::int64_t num_keys,
                                   std::int64_t head_size_v, const float* HWY_RESTRICT keep) {
  const LaneTag d;
  const IntTag di;
  for (std::int64_t c = 0; c < head_size_v; ++c) {
    for (std::int64_t r = 0; r < width; r += kLanes) {
      float* HWY_RESTRICT at = group.acc + c * width + r;
      LaneVec acc = hn::Mul(hn::Load(d, at), hn::Load(d, keep + r));
      for (std::int64_t k = 0; k < num_keys; ++k) {
        const LaneVec p = hn::Load(d, group.scores + k * width + r);
        const auto hidden = hn::RebindMask(
            d, hn::Eq(hn::BitCast(di, p), hn::Set(di, std::numeric_limits<std::int32_t>::min())));
        const LaneVec x = hn::Set(d, values[(c / 8) * (kBlockKeys * 8) + k * 8 + c % 8]);
        acc = hn::IfThenElse(hidden, acc, hn::MulAdd(x, p, acc));
      }
      hn::Store(acc, d, at);
    }
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace diffkv::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
