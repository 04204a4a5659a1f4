// The arithmetic of a tile of few rows, for the target being compiled. One vector of rows would be
// mostly empty, so here the head dimension is the vector lanes of the products, keys are those of
// the softmax, and keys and values are converted in registers, each once.

// Per-target include guard.
#if defined(DIFFKV_CPU_NARROW_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DIFFKV_CPU_NARROW_INL_H_
#undef DIFFKV_CPU_NARROW_INL_H_
#else
#define DIFFKV_CPU_NARROW_INL_H_
#endif

#include <algorithm>
#include <cstdint>
#include <limits>

#include "core/softmax.h"
#include "cpu/codec-inl.h"
#include "cpu/fetch.h"
#include "cpu/kernels.h"
#include "cpu/lanes-inl.h"
#include "cpu/tile_base.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace diffkv::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Measured: Fetch::units_of_row.
template <int kRows>
inline constexpr bool kFetchesByRow = kRows < 4;

// Accumulators that fit the registers beside their operands.
inline constexpr int kNarrowAccs = kLanes == 16 ? 16 : 8;
// Loads of a vector for every Fetch::kUnit elements.
inline constexpr int kLoadsPerUnit = static_cast<int>(Fetch::kUnit / kLanes);

// Elements of a row rounded up to whole vectors; the rest of a query or accumulator row is zeros.
constexpr std::int64_t padded_to_lanes(std::int64_t n) {
  return (n + kLanes - 1) / kLanes * kLanes;
}

#if HWY_TARGET == HWY_SCALAR
HWY_INLINE void sum_lanes(const LaneVec* acc, float* HWY_RESTRICT sums) {
  for (int i = 0; i < kNarrowAccs; ++i) sums[i] = hn::GetLane(acc[i]);
}
#else
// The sum of all 128-bit blocks of v, stored as 4 floats.
template <class D>
HWY_INLINE void store_block_sum(D d, hn::Vec<D> v, float* HWY_RESTRICT to) {
  if constexpr (hn::MaxLanes(D()) == 4) {
    hn::Store(v, d, to);
  } else {
    const hn::Half<D> half;
    store_block_sum(half, hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)), to);
  }
}

// Of four vectors, the sums of each over every 128-bit block, transposed while adding: lane j of a
// block is the sum of x[j] over that block.
HWY_INLINE LaneVec sum_blocks(const LaneVec* x) {
  const LaneTag d;
  const hn::Repartition<double, LaneTag> pairs;
  const auto ab = hn::BitCast(
      pairs, hn::Add(hn::InterleaveLower(d, x[0], x[1]), hn::InterleaveUpper(d, x[0], x[1])));
  const auto cd = hn::BitCast(
      pairs, hn::Add(hn::InterleaveLower(d, x[2], x[3]), hn::InterleaveUpper(d, x[2], x[3])));
  return hn::Add(hn::BitCast(d, hn::InterleaveLower(pairs, ab, cd)),
                 hn::BitCast(d, hn::InterleaveUpper(pairs, ab, cd)));
}

// sums[i] = sum of the lanes of acc[i].
HWY_INLINE void sum_lanes(const LaneVec* acc, float* HWY_RESTRICT sums) {
  for (int i = 0; i < kNarrowAccs; i += 4) {
    store_block_sum(LaneTag(), sum_blocks(acc + i), sums + i);
  }
}
#endif

// scores[row, key] = sum over d of query[row, d] * key[key, d]. query: [padded head_size_qk /
// kLanes, kRows, kLanes], so that one pointer reaches all rows; scores: [kRows, kBlockKeys]. The
// next rows are fetched on the way.
template <int kRows, DType kDType>
HWY_NOINLINE void score_narrow(const float* HWY_RESTRICT query, const BlockRows& rows, Fetch& next,
                               std::int64_t head_size_qk, float* HWY_RESTRICT scores) {
  constexpr int kKeys = kNarrowAccs / kRows;
  const LaneTag d;
  Fetch fetch = next;
  for (std::int64_t k = 0; k < rows.count(); k += kKeys) {
    LaneVec acc[kNarrowAccs];
    HWY_UNROLL(16)
    for (LaneVec& v : acc) v = hn::Zero(d);
    const std::byte* const* at = rows.key.data() + k;
    for (std::int64_t i = 0; i < head_size_qk; i += kLanes) {
      LaneVec key[kKeys];
      HWY_UNROLL(16)
      for (int j = 0; j < kKeys; ++j) {
        if (j % kLoadsPerUnit == 0) fetch_units<kFetchesByRow<kRows>>(fetch, 1);
        key[j] = load_padded<kDType>(d, at[j], i, head_size_qk);
      }
      HWY_UNROLL(8)
      for (int r = 0; r < kRows; ++r) {
        const LaneVec q = hn::Load(d, query + i * kRows + r * kLanes);
        HWY_UNROLL(16)
        for (int j = 0; j < kKeys; ++j) {
          acc[r * kKeys + j] = hn::MulAdd(q, key[j], acc[r * kKeys + j]);
        }
      }
    }
    HWY_ALIGN float sums[kNarrowAccs];
    sum_lanes(acc, sums);
    for (int r = 0; r < kRows; ++r) {
      for (int j = 0; j < kKeys; ++j) scores[r * kBlockKeys + k + j] = sums[r * kKeys + j];
    }
  }
  next = fetch;
}

// Soft cap and ALiBi on one row's scores; keys first_key + k.
HWY_INLINE void apply_rules_to_row(const ScoreRules& rules, float slope, std::int32_t position,
                                   std::int32_t first_key, std::int64_t num_keys,
                                   float* HWY_RESTRICT scores) {
  const LaneTag d;
  const IntTag di;
  for (std::int64_t k = 0; k < num_keys; k += kLanes) {
    const IntVec key = hn::Iota(di, first_key + static_cast<std::int32_t>(k));
    const LaneVec s = hn::Load(d, scores + k);
    hn::Store(adjust_scores(rules, s, hn::Set(d, slope), key, hn::Set(di, position)), d,
              scores + k);
  }
}

// -inf where the row does not see the key, and for the padding up to whole vectors.
HWY_INLINE void apply_mask_to_row(const core::RowKeys& sees, KeyRange range,
                                  float* HWY_RESTRICT scores) {
  const LaneTag d;
  const IntTag di;
  const IntVec prefix_end = hn::Set(di, std::min(sees.prefix_end, range.end));
  const IntVec begin = hn::Set(di, sees.begin);
  const IntVec end = hn::Set(di, std::min(sees.end, range.end));
  for (std::int32_t k = range.begin; k < range.end; k += static_cast<std::int32_t>(kLanes)) {
    float* HWY_RESTRICT at = scores + (k - range.begin);
    hn::Store(hide_scores(hn::Load(d, at), hn::Iota(di, k), prefix_end, begin, end), d, at);
  }
}

// One row's scores to probabilities, as softmax_block does. Returns the factor of what was
// accumulated before.
HWY_INLINE float softmax_row(float* HWY_RESTRICT scores, std::int64_t num_keys,
                             core::SoftmaxState& state) {
  const LaneTag d;
  const LaneVec hidden = hn::Set(d, core::kNegInf);
  LaneVec max = hn::Set(d, state.max);
  for (std::int64_t k = 0; k < num_keys; k += kLanes) max = hn::Max(hn::Load(d, scores + k), max);
  max = hn::MaxOfLanes(d, max);
  const LaneVec base = hn::IfThenElse(hn::Eq(max, hidden), hn::Zero(d), max);
  LaneVec sum = hn::Zero(d);
  for (std::int64_t k = 0; k < num_keys; k += kLanes) {
    const LaneVec s = hn::Load(d, scores + k);
    const LaneVec p = exp_nonpositive(hn::Sub(s, base));
    sum = hn::Add(sum, p);
    hn::Store(p, d, scores + k);
  }
  const float keep = hn::GetLane(exp_nonpositive(hn::Sub(hn::Set(d, state.max), base)));
  state.sum = state.sum * keep + hn::GetLane(hn::SumOfLanes(d, sum));
  state.max = hn::GetLane(max);
  return keep;
}

// Columns [c, c + kVectors * kLanes) of acc[row] = acc[row] * keep[row] + sum over keys p * value.
template <int kRows, int kVectors, DType kDType>
HWY_INLINE void accumulate_columns(const BlockRows& rows, Fetch& next, const float* HWY_RESTRICT p,
                                   const float* HWY_RESTRICT keep, std::int64_t c,
                                   std::int64_t head_size_v, float* HWY_RESTRICT acc) {
  Fetch fetch = next;
  const LaneTag d;
  LaneVec sum[kRows][kVectors];
  HWY_UNROLL(8)
  for (auto& row : sum) {
    for (LaneVec& v : row) v = hn::Zero(d);
  }
  for (std::int64_t k = 0; k < rows.count(); ++k) {
    const std::byte* row = rows.value[static_cast<std::size_t>(k)];
    LaneVec value[kVectors];
    HWY_UNROLL(8)
    for (int v = 0; v < kVectors; ++v) {
      if (v % kLoadsPerUnit == 0) fetch_units<kFetchesByRow<kRows>>(fetch, 1);
      value[v] = load_padded<kDType>(d, row, c + v * kLanes, head_size_v);
    }
    HWY_UNROLL(8)
    for (int r = 0; r < kRows; ++r) {
      const LaneVec weight = hn::Set(d, p[r * kBlockKeys + k]);
      for (int v = 0; v < kVectors; ++v) sum[r][v] = hn::MulAdd(weight, value[v], sum[r][v]);
    }
  }
  const std::int64_t padded = padded_to_lanes(head_size_v);
  HWY_UNROLL(8)
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      float* HWY_RESTRICT at = acc + r * padded + c + v * kLanes;
      hn::Store(hn::MulAdd(hn::Load(d, at), hn::Set(d, keep[r]), sum[r][v]), d, at);
    }
  }
  next = fetch;
}

// acc: [kRows, padded head_size_v]; p: [kRows, kBlockKeys].
template <int kRows, DType kDType>
HWY_NOINLINE void accumulate_narrow(const BlockRows& rows, Fetch& fetch,
                                    const float* HWY_RESTRICT p, const float* HWY_RESTRICT keep,
                                    std::int64_t head_size_v, float* HWY_RESTRICT acc) {
  constexpr int kVectors = std::min(kNarrowAccs / kRows, 8);
  std::int64_t c = 0;
  for (; c + kVectors * kLanes <= head_size_v; c += kVectors * kLanes) {
    accumulate_columns<kRows, kVectors, kDType>(rows, fetch, p, keep, c, head_size_v, acc);
  }
  for (; c < head_size_v; c += kLanes) {
    accumulate_columns<kRows, 1, kDType>(rows, fetch, p, keep, c, head_size_v, acc);
  }
}

// One row's acc [padded head_size_v] leaving out hidden keys (marked -0), for blocks with a NaN or
// infinite value. The order of operations is that of accumulate_columns, so what hidden slots hold
// does not change a bit of the result.
template <DType kDType>
HWY_INLINE void accumulate_visible_narrow(const BlockRows& rows, const float* HWY_RESTRICT p,
                                          float keep, std::int64_t head_size_v,
                                          float* HWY_RESTRICT acc) {
  const LaneTag d;
  for (std::int64_t c = 0; c < head_size_v; c += kLanes) {
    LaneVec sum = hn::Zero(d);
    for (std::int64_t k = 0; k < rows.count(); ++k) {
      if (core::bits_of(p[k]) == core::bits_of(-0.0F)) continue;
      const LaneVec value =
          load_padded<kDType>(d, rows.value[static_cast<std::size_t>(k)], c, head_size_v);
      sum = hn::MulAdd(hn::Set(d, p[k]), value, sum);
    }
    hn::Store(hn::MulAdd(hn::Load(d, acc + c), hn::Set(d, keep), sum), d, acc + c);
  }
}

// Whether every value of the block is finite.
template <DType kDType>
HWY_INLINE bool values_finite(const BlockRows& rows, std::int64_t head_size_v) {
  const RowTag d;
  RowVec zeros = hn::Zero(d);  // NaN once an infinity or a NaN was multiplied by zero
  for (std::int64_t k = 0; k < rows.count(); ++k) {
    const std::byte* row = rows.value[static_cast<std::size_t>(k)];
    for (std::int64_t c = 0; c < head_size_v; c += static_cast<std::int64_t>(hn::MaxLanes(d))) {
      zeros = hn::MulAdd(load_lanes<kDType>(d, row, c), hn::Zero(d), zeros);
    }
  }
  return hn::AllFalse(d, hn::IsNaN(zeros));
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace diffkv::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
