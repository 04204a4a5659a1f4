#include "cpu/amx_fp16.h"

#include "cpu/amx.h"

#ifdef DIFFKV_HAS_AMX

#include <cmath>

#include "core/dtype.h"
#include "cpu/amx_tiles.h"
#include "cpu/bf16_vectors.h"

namespace diffkv::cpu {
namespace {

// 32 numbers as bf16.
struct SplitVector {
  __m512i upper;
  __m512i lower;
};

// A bf16 that is the upper half of an fp32.
DIFFKV_BF16_DOT __m512 widen(__m256i words) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

// What is left of x past its upper part, zero where that is NaN or infinite.
DIFFKV_BF16_DOT __m512 lower_of(__m512 x, __m256i upper) {
  const __m512 rest = _mm512_sub_ps(x, widen(upper));
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(rest, rest, _CMP_ORD_Q), rest);
}

DIFFKV_BF16_DOT SplitVector split(__m512 first, __m512 second) {
  const __m512i upper = round_to_bf16(first, second);
  return {upper, round_to_bf16(lower_of(first, _mm512_castsi512_si256(upper)),
                               lower_of(second, _mm512_extracti64x4_epi64(upper, 1)))};
}

// Two times 16 fp16 as words of their parts: `second`'s in the upper halves, `first`'s in the
// lower. The upper part is rounded to nearest, halves away from zero.
class WordSplitter {
 public:
  DIFFKV_BF16_DOT WordSplitter()
      : upper_halves_(_mm512_set1_epi32(-0x10000)), zeros_(_mm512_setzero_ps()) {}

  DIFFKV_BF16_DOT SplitVector split(__m256i first, __m256i second) {
    const Sixteen low = parts_of(first);
    const Sixteen high = parts_of(second);
    return {words(low.upper, high.upper), words(low.lower, high.lower)};
  }

  // Whether all that was split was finite. Of what is not the lower part is NaN.
  DIFFKV_BF16_DOT bool finite() const {
    return _mm512_cmp_ps_mask(zeros_, zeros_, _CMP_UNORD_Q) == 0;
  }

 private:
  struct Sixteen {
    __m512i upper;  // in the upper half of each word
    __m512i lower;
  };

  DIFFKV_BF16_DOT Sixteen parts_of(__m256i halves) {
    const __m512 x = _mm512_cvtph_ps(halves);
    const __m512i rounded = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
    const __m512i upper = _mm512_and_si512(rounded, upper_halves_);
    const __m512 lower = _mm512_sub_ps(x, _mm512_castsi512_ps(upper));
    zeros_ = _mm512_fmadd_ps(lower, _mm512_setzero_ps(), zeros_);
    return {upper, _mm512_castps_si512(lower)};
  }

  DIFFKV_BF16_DOT __m512i words(__m512i low, __m512i high) const {
    constexpr int kSelect = 0xca;  // a ? b : c
    return _mm512_ternarylogic_epi32(upper_halves_, high, _mm512_srli_epi32(low, 16), kSelect);
  }

  __m512i upper_halves_;
  __m512 zeros_;  // NaN once a lower part was
};

DIFFKV_BF16_DOT __m256i halves_at(const std::byte* row, std::int64_t i) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + 2 * i));
}

// An fp16 that is not finite, as bf16.
std::uint16_t nonfinite_bf16(const std::byte* row, std::int64_t i) {
  return core::float_to_bf16(core::load_element(DType::kF16, row, i));
}

bool is_finite(const std::byte* row, std::int64_t i) {
  return std::isfinite(core::load_element(DType::kF16, row, i));
}

// The sums of kTiles x 16 keys by 16 rows of queries, `width` apart.
template <int kTiles>
void multiply_keys(Parts<const std::uint16_t> keys, std::int64_t head_size_qk,
                   Parts<const std::uint32_t> query, std::int64_t width, Fetch& fetch) {
  constexpr int kUpperPairs = 4;
  constexpr int kLowerPairs = 5;
  constexpr int kUpperKeys = 6;
  constexpr int kLowerKeys = 7;
  for_each_sum<kTiles>([&]<int kSum>() { zero_tile<kSum>(); });
  for (std::int64_t i = 0; i < head_size_qk; i += kTileDims) {
    load_tile<kUpperPairs>(query.upper + i / 2 * width, 4 * width);
    load_tile<kLowerPairs>(query.lower + i / 2 * width, 4 * width);
    for_each_sum<kTiles>([&]<int kSum>() {
      const std::int64_t at = kSum * kTile * head_size_qk + i;
      load_tile<kUpperKeys>(keys.upper + at, 2 * head_size_qk);
      multiply_tiles<kSum, kUpperKeys, kUpperPairs>();
      multiply_tiles<kSum, kUpperKeys, kLowerPairs>();
      load_tile<kLowerKeys>(keys.lower + at, 2 * head_size_qk);
      multiply_tiles<kSum, kLowerKeys, kUpperPairs>();
      fetch_tile(fetch);
    });
  }
}

// Adds the products of 16 rows of weights by kTiles x 16 columns of values to the sums.
template <int kTiles>
void multiply_values(Parts<const std::uint32_t> weights, Parts<const std::uint32_t> values,
                     std::int64_t head_size_v, std::int64_t steps, Fetch& fetch) {
  constexpr int kUpperWeights = 4;
  constexpr int kLowerWeights = 5;
  constexpr int kUpperValues = 6;
  constexpr int kLowerValues = 7;
  for (std::int64_t i = 0; i < steps; ++i) {
    load_tile<kUpperWeights>(weights.upper + i * kTile, 4 * kMostPairs);
    load_tile<kLowerWeights>(weights.lower + i * kTile, 4 * kMostPairs);
    for_each_sum<kTiles>([&]<int kSum>() {
      const std::int64_t at = i * kTile * head_size_v + kSum * kTile;
      load_tile<kUpperValues>(values.upper + at, 4 * head_size_v);
      multiply_tiles<kSum, kUpperWeights, kUpperValues>();
      multiply_tiles<kSum, kLowerWeights, kUpperValues>();
      load_tile<kLowerValues>(values.lower + at, 4 * head_size_v);
      multiply_tiles<kSum, kUpperWeights, kLowerValues>();
      fetch_tile(fetch);
    });
  }
}

// The scores of a key and 16 rows, where `lanes` says, without a zero part of one number meeting an
// infinite one of another.
DIFFKV_BF16_DOT void whole_scores(std::int64_t width, Parts<const std::uint32_t> query,
                                  Parts<const std::uint16_t> key, std::int64_t head_size_qk,
                                  __mmask16 lanes, float* scores) {
  const auto first = [&](const std::uint32_t* pairs) DIFFKV_BF16_DOT {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(pairs), 16));
  };
  const auto second = [&](const std::uint32_t* pairs) DIFFKV_BF16_DOT {
    return _mm512_castsi512_ps(
        _mm512_and_si512(_mm512_loadu_si512(pairs), _mm512_set1_epi32(-0x10000)));
  };
  const auto element = [&](std::int64_t i) DIFFKV_BF16_DOT {
    return _mm512_set1_ps(core::bf16_to_float(key.upper[i]) + core::bf16_to_float(key.lower[i]));
  };
  __m512 sum = _mm512_setzero_ps();
  for (std::int64_t i = 0; i < head_size_qk; i += 2) {
    const std::uint32_t* upper = query.upper + i / 2 * width;
    const std::uint32_t* lower = query.lower + i / 2 * width;
    sum = _mm512_fmadd_ps(_mm512_add_ps(first(upper), first(lower)), element(i), sum);
    sum = _mm512_fmadd_ps(_mm512_add_ps(second(upper), second(lower)), element(i + 1), sum);
  }
  _mm512_mask_storeu_ps(scores, lanes, sum);
}

}  // namespace

DIFFKV_BF16_DOT std::uint64_t amx_split_rows(const std::byte* const* rows, std::int64_t num_rows,
                                             std::int64_t n, Parts<std::uint16_t> parts) {
  std::uint64_t nonfinite = 0;
  for (std::int64_t row = 0; row < num_rows; ++row) {
    const std::byte* from = rows[row];
    WordSplitter splitter;
    for (std::int64_t i = 0; i < n; i += kTileDims) {
      const SplitVector x = splitter.split(halves_at(from, i), halves_at(from, i + kTile));
      _mm512_storeu_si512(parts.upper + row * n + i, x.upper);
      _mm512_storeu_si512(parts.lower + row * n + i, x.lower);
    }
    if (splitter.finite()) continue;
    nonfinite |= std::uint64_t{1} << row;
    for (std::int64_t i = 0; i < n; ++i) {
      if (is_finite(from, i)) continue;
      const std::int64_t at = row * n + split_index(i);
      parts.upper[at] = nonfinite_bf16(from, i);
      parts.lower[at] = 0;
    }
  }
  return nonfinite;
}

void amx_split_scores(std::int64_t width, const SplitScores& operands, Fetch& fetch,
                      std::int64_t num_keys, std::int64_t head_size_qk, float scale,
                      float* scores) {
  const auto query_at = [&](std::int64_t row) {
    return Parts<const std::uint32_t>{operands.query.upper + row, operands.query.lower + row};
  };
  with_sums((num_keys + kTile - 1) / kTile, [&]<int kTiles>() {
    for (std::int64_t row = 0; row < width; row += kTile) {
      multiply_keys<kTiles>(operands.keys, head_size_qk, query_at(row), width, fetch);
      store_sums<kTiles>(scores + row, width, kTile * width);
    }
  });
  if ((operands.nonfinite_rows | operands.nonfinite_keys) != 0) {
    for (std::int64_t k = 0; k < num_keys; ++k) {
      const bool all_rows = (operands.nonfinite_keys >> k & 1) != 0;
      const std::int64_t at = k * head_size_qk;
      for (std::int64_t row = 0; row < width; row += kTile) {
        const auto lanes =
            all_rows ? __mmask16{0xffff} : static_cast<__mmask16>(operands.nonfinite_rows >> row);
        if (lanes == 0) continue;
        whole_scores(width, query_at(row), {operands.keys.upper + at, operands.keys.lower + at},
                     head_size_qk, lanes, scores + k * width + row);
      }
    }
  }
  scale_scores(num_keys * width, scale, scores);
}

DIFFKV_BF16_DOT bool amx_split_values(const std::byte* const* rows, std::int64_t num_keys,
                                      std::int64_t head_size_v, Parts<std::uint32_t> pairs) {
  WordSplitter splitter;
  for (std::int64_t k = 0; k < num_keys; k += 2) {
    for (std::int64_t c = 0; c < head_size_v; c += kTile) {
      const __m256i second = k + 1 < num_keys ? halves_at(rows[k + 1], c) : _mm256_setzero_si256();
      const SplitVector x = splitter.split(halves_at(rows[k], c), second);
      _mm512_storeu_si512(pairs.upper + k / 2 * head_size_v + c, x.upper);
      _mm512_storeu_si512(pairs.lower + k / 2 * head_size_v + c, x.lower);
    }
  }
  if (splitter.finite()) return true;
  for (std::int64_t k = 0; k < num_keys; ++k) {
    const std::uint32_t others = k % 2 == 0 ? 0xffff0000U : 0xffffU;
    for (std::int64_t c = 0; c < head_size_v; ++c) {
      if (is_finite(rows[k], c)) continue;
      pairs.upper[k / 2 * head_size_v + c] &= others;
      pairs.lower[k / 2 * head_size_v + c] &= others;
    }
  }
  return false;
}

DIFFKV_BF16_DOT void amx_split_weights(std::int64_t width, const float* p, std::int64_t num_keys,
                                       Parts<std::uint32_t> words) {
  const __m512i order = pair_indices(0, 16);
  for (std::int64_t row = 0; row < width; row += kTile) {
    for (std::int64_t k = 0; k < padded_pairs(num_keys); k += kTile) {
      __m512i upper[kTile];
      __m512i lower[kTile];
      for (std::int64_t i = 0; i < kTile; ++i) {
        const WeightsOfPair pair(p + row, width, num_keys, 2 * (k + i));
        const SplitVector x = split(pair.first, pair.second);
        upper[i] = _mm512_permutexvar_epi16(order, x.upper);
        lower[i] = _mm512_permutexvar_epi16(order, x.lower);
      }
      turn_words(upper, words.upper + row * kMostPairs + k, kMostPairs);
      turn_words(lower, words.lower + row * kMostPairs + k, kMostPairs);
    }
  }
}

void amx_split_accumulate(std::int64_t width, Parts<const std::uint32_t> weights,
                          Parts<std::uint32_t> values, Fetch& fetch, std::int64_t num_keys,
                          std::int64_t head_size_v, const float* keep, float* acc) {
  pad_values(num_keys, head_size_v, values.upper);
  pad_values(num_keys, head_size_v, values.lower);
  keep_rows(width, keep, head_size_v, acc);
  for_each_accumulated(head_size_v, width, [&]<int kTiles>(std::int64_t c, std::int64_t row) {
    const std::int64_t at = row * kMostPairs;
    float* const sums = acc + row * head_size_v + c;
    load_sums<kTiles>(sums, head_size_v, kTile);
    multiply_values<kTiles>({weights.upper + at, weights.lower + at},
                            {values.upper + c, values.lower + c}, head_size_v,
                            padded_pairs(num_keys) / kTile, fetch);
    store_sums<kTiles>(sums, head_size_v, kTile);
  });
}

}  // namespace diffkv::cpu

#endif
