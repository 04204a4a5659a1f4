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

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "cpu/fetch.h"
#include "cpu/kernels.h"
#include "cpu/lanes-inl.h"
#include "cpu/tile_base.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace diffkv::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// 3 vectors of rows x 8 keys (or value columns) keep 24 of 32 registers busy on AVX-512; the
// targets with 16 registers take 4 keys.
inline constexpr int kGroupVectors = 3;
template <int kVectors>
inline constexpr int kColumns = kVectors == 1 || kLanes == 16 ? 8 : 4;
// Head dimensions at a time; head sizes are multiples of it.
inline constexpr std::int64_t kDimsPerStep = 8;
// Keys of a scored block are padded to this.
inline constexpr std::int64_t kKeyPadding = 8;

// One row group's place in a tile's scratch; `width` = vectors * kLanes.
struct GroupBuffers {
  std::int64_t first_row = 0;    // of the tile
  const float* query = nullptr;  // as WideState has it
  float* acc = nullptr;          // [head_size_v, width], or by rows
  float* scores = nullptr;       // [kBlockKeys, width], then probabilities
  float* max = nullptr;          // [width]
  float* sum = nullptr;          // [width]
  RowInfo rows;                  // [width] each
};

// scores[key, row] = sum over d of key[key, d] * query[d, row], for keys padded to kKeyPadding.
// The next rows are fetched on the way.
template <int kVectors>
HWY_NOINLINE void score_block(const GroupBuffers& group, const float* HWY_RESTRICT keys,
                              Fetch& fetch, std::int64_t num_keys, std::int64_t head_size_qk) {
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
    for (std::int64_t start = 0; start < head_size_qk; start += kDimsPerStep) {
      fetch.units(kKeys * kDimsPerStep / Fetch::kUnit);
      for (std::int64_t i = 0; i < kDimsPerStep; ++i, ++key, query += kWidth) {
        LaneVec q[kVectors];
        for (int v = 0; v < kVectors; ++v) q[v] = hn::Load(d, query + v * kLanes);
        HWY_UNROLL(8)
        for (int j = 0; j < kKeys; ++j) {
          const LaneVec x = hn::Set(d, key[j * head_size_qk]);
          for (int v = 0; v < kVectors; ++v) acc[j][v] = hn::MulAdd(x, q[v], acc[j][v]);
        }
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

// Soft cap and ALiBi on the scores of keys first_key .. first_key + num_keys - 1.
HWY_INLINE void apply_rules(const ScoreRules& rules, const GroupBuffers& group, std::int64_t width,
                            std::int32_t first_key, std::int64_t num_keys) {
  const LaneTag d;
  const IntTag di;
  for (std::int64_t r = 0; r < width; r += kLanes) {
    const LaneVec slope = hn::Load(d, group.rows.slope + r);
    const IntVec position = hn::Load(di, group.rows.position + r);
    for (std::int64_t k = 0; k < num_keys; ++k) {
      const IntVec key = hn::Set(di, first_key + static_cast<std::int32_t>(k));
      float* HWY_RESTRICT at = group.scores + k * width + r;
      hn::Store(adjust_scores(rules, hn::Load(d, at), slope, key, position), d, at);
    }
  }
}

// -inf where the row does not see the key.
HWY_INLINE void apply_mask(const GroupBuffers& group, std::int64_t width, std::int32_t first_key,
                           std::int64_t num_keys) {
  const LaneTag d;
  const IntTag di;
  for (std::int64_t r = 0; r < width; r += kLanes) {
    const IntVec prefix_end = hn::Load(di, group.rows.prefix_end + r);
    const IntVec begin = hn::Load(di, group.rows.begin + r);
    const IntVec end = hn::Load(di, group.rows.end + r);
    for (std::int64_t k = 0; k < num_keys; ++k) {
      const IntVec key = hn::Set(di, first_key + static_cast<std::int32_t>(k));
      float* HWY_RESTRICT at = group.scores + k * width + r;
      hn::Store(hide_scores(hn::Load(d, at), key, prefix_end, begin, end), d, at);
    }
  }
}

// Scores to probabilities against the new running max; sum is updated, `keep` [width] gets the
// factor of what was accumulated before.
template <int kVectors>
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
      const LaneVec p = exp_nonpositive(hn::Sub(s, base));
      sum = hn::Add(sum, p);
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
// stored as value_at says. A block is summed on its own first, which keeps the
// rounding error of long sequences down.
template <int kVectors>
HWY_NOINLINE void accumulate_block(const GroupBuffers& group, const float* HWY_RESTRICT values,
                                   Fetch& fetch, std::int64_t num_keys, std::int64_t head_size_v,
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
    const float* HWY_RESTRICT value = values + value_at(0, c);
    const float* HWY_RESTRICT p = group.scores;
    for (std::int64_t k = 0; k < num_keys; ++k, value += kValueColumns, p += kWidth) {
      if (k % (Fetch::kUnit / kValues) == 0) fetch.units(1);
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
// hidden keys (marked -0) are left out, not multiplied by zero. The order of operations is that of
// accumulate_block, so what hidden slots hold does not change a bit of the result.
HWY_INLINE void accumulate_visible(const GroupBuffers& group, std::int64_t width,
                                   const float* HWY_RESTRICT values, std::int64_t num_keys,
                                   std::int64_t head_size_v, const float* HWY_RESTRICT keep) {
  const LaneTag d;
  const IntTag di;
  for (std::int64_t c = 0; c < head_size_v; ++c) {
    for (std::int64_t r = 0; r < width; r += kLanes) {
      float* HWY_RESTRICT at = group.acc + c * width + r;
      LaneVec sum = hn::Zero(d);
      for (std::int64_t k = 0; k < num_keys; ++k) {
        const LaneVec p = hn::Load(d, group.scores + k * width + r);
        const auto hidden = hn::RebindMask(
            d, hn::Eq(hn::BitCast(di, p), hn::Set(di, std::numeric_limits<std::int32_t>::min())));
        const LaneVec x = hn::Set(d, values[value_at(k, c)]);
        sum = hn::IfThenElse(hidden, sum, hn::MulAdd(x, p, sum));
      }
      hn::Store(hn::MulAdd(hn::Load(d, at), hn::Load(d, keep + r), sum), d, at);
    }
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace diffkv::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
