#include "cpu/amx_fp16.h"

#include "cpu/amx.h"

#ifdef DIFFKV_HAS_AMX

#include <array>
#include <cmath>

#include "core/dtype.h"
#include "cpu/amx_tiles.h"
#include "cpu/bf16_vectors.h"

namespace diffkv::cpu {
namespace {

// 32 numbers as bf16, in order.
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

// 32 fp16 in place, and which are not finite.
struct SplitWords {
  SplitVector parts;
  __mmask32 nonfinite = 0;
};

// Of any kind, also subnormal, NaN or infinite.
DIFFKV_BF16_DOT __attribute__((noinline)) SplitWords split_any_words(__m512i x) {
  const __m512i magnitude = _mm512_and_si512(x, _mm512_set1_epi16(0x7fff));
  return {split(_mm512_cvtph_ps(_mm512_castsi512_si256(x)),
                _mm512_cvtph_ps(_mm512_extracti64x4_epi64(x, 1))),
          _mm512_cmpge_epu16_mask(magnitude, _mm512_set1_epi16(0x7c00))};
}

// By the bits: the mantissa's upper 7 of 10 bits, rounded, with the exponent's new bias, are the
// upper part. The rest, -4 to 3 units of the mantissa's last bit, is looked up as if the exponent
// were 0 and takes the exponent.
class WordSplitter {
 public:
  DIFFKV_BF16_DOT WordSplitter() {
    alignas(64) std::array<std::uint16_t, 32> rests{};
    for (std::size_t i = 0; i < rests.size(); ++i) {
      const auto bits = static_cast<int>(i % 8);
      const float rest = std::ldexp(static_cast<float>(bits < 4 ? bits : bits - 8), -25);
      rests[i] = static_cast<std::uint16_t>(core::bits_of(rest) >> 16);
    }
    rests_ = _mm512_load_si512(rests.data());
  }

  DIFFKV_BF16_DOT SplitWords split(__m512i x) const {
    const __m512i sign = _mm512_set1_epi16(-0x8000);
    const __m512i magnitude = _mm512_andnot_si512(sign, x);
    const __m512i past_subnormals = _mm512_sub_epi16(magnitude, _mm512_set1_epi16(0x400));
    const __mmask32 normal =
        _mm512_cmplt_epu16_mask(past_subnormals, _mm512_set1_epi16(0x7c00 - 0x400));
    constexpr int kOrOfAnd = 0xf8;   // a | (b & c)
    constexpr int kXorOfAnd = 0x78;  // a ^ (b & c)
    const __m512i rounded = _mm512_srli_epi16(_mm512_add_epi16(magnitude, _mm512_set1_epi16(4)), 3);
    const __m512i rebiased = _mm512_add_epi16(rounded, _mm512_set1_epi16((127 - 15) << 7));
    const __m512i exponent =
        _mm512_and_si512(_mm512_srli_epi16(magnitude, 3), _mm512_set1_epi16(0x1f << 7));
    const __m512i rest = _mm512_add_epi16(_mm512_permutexvar_epi16(x, rests_), exponent);
    const __mmask32 has_rest = _mm512_mask_test_epi16_mask(normal, x, _mm512_set1_epi16(7));
    SplitWords words;
    words.parts.upper =
        _mm512_maskz_mov_epi16(normal, _mm512_ternarylogic_epi32(rebiased, x, sign, kOrOfAnd));
    words.parts.lower =
        _mm512_maskz_mov_epi16(has_rest, _mm512_ternarylogic_epi32(rest, x, sign, kXorOfAnd));
    // The two ways round halves differently: what a number becomes must not depend on others.
    if (_mm512_mask_test_epi16_mask(~normal, magnitude, magnitude) != 0) {
      const SplitWords any = split_any_words(x);
      words.parts.upper = _mm512_mask_mov_epi16(any.parts.upper, normal, words.parts.upper);
      words.parts.lower = _mm512_mask_mov_epi16(any.parts.lower, normal, words.parts.lower);
      words.nonfinite = any.nonfinite;
    }
    return words;
  }

 private:
  __m512i rests_;
};

// The sums of kTiles x 16 rows, `stride` bytes apart, by 16 columns of pairs, `width` apart, over
// steps of a register; both in parts.
template <int kTiles, class T>
void multiply(Parts<T> rows, std::int64_t stride, Parts<const std::uint32_t> pairs,
              std::int64_t width, std::int64_t steps, Fetch& fetch) {
  constexpr int kUpperPairs = 4;
  constexpr int kLowerPairs = 5;
  constexpr int kUpperRows = 6;
  constexpr int kLowerRows = 7;
  const auto* upper = reinterpret_cast<const std::byte*>(rows.upper);
  const auto* lower = reinterpret_cast<const std::byte*>(rows.lower);
  for_each_sum<kTiles>([&]<int kSum>() { zero_tile<kSum>(); });
  for (std::int64_t i = 0; i < steps; ++i) {
    load_tile<kUpperPairs>(pairs.upper + i * kTile * width, 4 * width);
    load_tile<kLowerPairs>(pairs.lower + i * kTile * width, 4 * width);
    for_each_sum<kTiles>([&]<int kSum>() {
      const std::int64_t at = kSum * kTile * stride + i * kTileBytes;
      load_tile<kUpperRows>(upper + at, stride);
      multiply_tiles<kSum, kUpperRows, kUpperPairs>();
      multiply_tiles<kSum, kUpperRows, kLowerPairs>();
      load_tile<kLowerRows>(lower + at, stride);
      multiply_tiles<kSum, kLowerRows, kUpperPairs>();
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
  const WordSplitter splitter;
  std::uint64_t nonfinite = 0;
  for (std::int64_t row = 0; row < num_rows; ++row) {
    for (std::int64_t i = 0; i < n; i += kTileDims) {
      const SplitWords x = splitter.split(_mm512_loadu_si512(rows[row] + 2 * i));
      _mm512_storeu_si512(parts.upper + row * n + i, x.parts.upper);
      _mm512_storeu_si512(parts.lower + row * n + i, x.parts.lower);
      if (x.nonfinite != 0) nonfinite |= std::uint64_t{1} << row;
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
      multiply<kTiles>(operands.keys, 2 * head_size_qk, query_at(row), width,
                       head_size_qk / kTileDims, fetch);
      store_sums<kTiles>(scores + row, width);
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

DIFFKV_BF16_DOT bool amx_turn_split_values(const std::byte* const* rows, std::int64_t num_keys,
                                           std::int64_t head_size_v, Parts<std::uint32_t> turned) {
  const WordSplitter splitter;
  const __m512i order = pair_indices(0, 16);
  bool finite = true;
  const auto load = [&](std::int64_t k, std::int64_t c) DIFFKV_BF16_DOT {
    return k < num_keys ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[k] + 2 * c))
                        : _mm256_setzero_si256();
  };
  const std::int64_t pairs = (num_keys + 1) / 2;
  for (std::int64_t c = 0; c < head_size_v; c += kTile) {
    for (std::int64_t k = 0; k < pairs; k += kTile) {
      __m512i upper[kTile];
      __m512i lower[kTile];
      for (std::int64_t i = 0; i < kTile; ++i) {
        const __m512i keys = _mm512_inserti64x4(_mm512_castsi256_si512(load(2 * (k + i), c)),
                                                load(2 * (k + i) + 1, c), 1);
        const SplitWords x = splitter.split(_mm512_permutexvar_epi16(order, keys));
        upper[i] = x.parts.upper;
        lower[i] = x.parts.lower;
        if (x.nonfinite != 0) {
          upper[i] = _mm512_maskz_mov_epi16(~x.nonfinite, upper[i]);
          finite = false;
        }
      }
      turn_words(upper, turned.upper + c * kMostPairs + k, kMostPairs);
      turn_words(lower, turned.lower + c * kMostPairs + k, kMostPairs);
    }
  }
  return finite;
}

DIFFKV_BF16_DOT void amx_split_weights(std::int64_t width, const float* p, std::int64_t num_keys,
                                       Parts<std::uint32_t> pairs) {
  const __m512i order = pair_indices(0, 16);
  for (std::int64_t k = 0; k < num_keys; k += 2, p += 2 * width) {
    for (std::int64_t r = 0; r < width; r += kTile) {
      const __m512 a = _mm512_loadu_ps(p + r);
      const __m512 b = k + 1 < num_keys ? _mm512_loadu_ps(p + width + r) : _mm512_setzero_ps();
      const SplitVector x = split(a, b);
      const std::int64_t at = k / 2 * width + r;
      _mm512_storeu_si512(pairs.upper + at, _mm512_permutexvar_epi16(order, x.upper));
      _mm512_storeu_si512(pairs.lower + at, _mm512_permutexvar_epi16(order, x.lower));
    }
  }
}

void amx_split_accumulate(std::int64_t width, Parts<std::uint32_t> weights,
                          Parts<const std::uint32_t> turned, Fetch& fetch, std::int64_t num_keys,
                          std::int64_t head_size_v, const float* keep, float* acc) {
  pad_weights(width, num_keys, weights.upper);
  pad_weights(width, num_keys, weights.lower);
  for_each_accumulated(head_size_v, width, [&]<int kTiles>(std::int64_t c, std::int64_t row) {
    const Parts<const std::uint32_t> columns{turned.upper + c * kMostPairs,
                                             turned.lower + c * kMostPairs};
    multiply<kTiles>(columns, 4 * kMostPairs, {weights.upper + row, weights.lower + row}, width,
                     padded_pairs(num_keys) / kTile, fetch);
    accumulate_sums<kTiles>(width, keep + row, acc + c * width + row);
  });
}

}  // namespace diffkv::cpu

#endif
