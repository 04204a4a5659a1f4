// Tiles of many rows: rows in the lanes.
#include <algorithm>

#include "core/dtype.h"
#include "cpu/bf16_dot.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include "cpu/bf16_vectors.h"

namespace diffkv::cpu {
namespace {

// 8 keys x kVectors of rows stay in registers; the sum has a latency of 6, so 8 hide it.
constexpr int kKeys = 8;
// Pairs of head dimensions at a time; head sizes are multiples of 8.
constexpr std::int64_t kPairsPerStep = 4;

template <int kVectors>
DIFFKV_BF16_DOT void scores_of(std::int64_t width, const std::uint32_t* query,
                               const std::byte* const* keys, Fetch& fetch, std::int64_t num_keys,
                               std::int64_t head_size_qk, float scale, float* scores) {
  const std::int64_t pairs = head_size_qk / 2;
  for (std::int64_t k = 0; k < num_keys; k += kKeys) {
    const std::byte* key[kKeys];
    __m512 sum[kKeys][kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kKeys; ++j) {
      key[j] = keys[k + j];
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) sum[j][v] = _mm512_setzero_ps();
    }
    const std::uint32_t* q = query;
    for (std::int64_t i = 0; i < pairs; i += kPairsPerStep, q += kPairsPerStep * width) {
      fetch.units(std::int64_t{kKeys} * 2 * kPairsPerStep / 32);
#pragma GCC unroll 4
      for (std::int64_t step = 0; step < kPairsPerStep; ++step) {
        __m512i pair[kVectors];
#pragma GCC unroll 3
        for (std::int64_t v = 0; v < kVectors; ++v) {
          pair[v] = _mm512_loadu_si512(q + step * width + v * 16);
        }
#pragma GCC unroll 8
        for (int j = 0; j < kKeys; ++j) {
          const __m512i x = all_lanes(key[j] + 4 * (i + step));
#pragma GCC unroll 3
          for (int v = 0; v < kVectors; ++v) sum[j][v] = dot_pairs(sum[j][v], pair[v], x);
        }
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < kKeys; ++j) {
#pragma GCC unroll 3
      for (std::int64_t v = 0; v < kVectors; ++v) {
        _mm512_storeu_ps(scores + (k + j) * width + v * 16,
                         _mm512_mul_ps(sum[j][v], _mm512_set1_ps(scale)));
      }
    }
  }
}

// kColumns value columns x kVectors of rows.
template <int kVectors, int kColumns>
DIFFKV_BF16_DOT inline void accumulate_columns(std::int64_t width, const std::uint32_t* weights,
                                               const std::uint32_t* values, Fetch& fetch,
                                               std::int64_t num_pairs, std::int64_t head_size_v,
                                               const float* keep, float* acc) {
  __m512 sum[kColumns][kVectors];
#pragma GCC unroll 16
  for (int j = 0; j < kColumns; ++j) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) sum[j][v] = _mm512_setzero_ps();
  }
  for (std::int64_t k = 0; k < num_pairs; ++k, weights += width, values += head_size_v) {
    fetch.units(1);
    __m512i weight[kVectors];
#pragma GCC unroll 3
    for (std::int64_t v = 0; v < kVectors; ++v) weight[v] = _mm512_loadu_si512(weights + v * 16);
#pragma GCC unroll 16
    for (int j = 0; j < kColumns; ++j) {
      const __m512i x = all_lanes(values + j);
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) sum[j][v] = dot_pairs(sum[j][v], weight[v], x);
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < kColumns; ++j) {
#pragma GCC unroll 3
    for (std::int64_t v = 0; v < kVectors; ++v) {
      float* at = acc + j * width + v * 16;
      _mm512_storeu_ps(
          at, _mm512_fmadd_ps(_mm512_loadu_ps(at), _mm512_loadu_ps(keep + v * 16), sum[j][v]));
    }
  }
}

template <int kVectors>
DIFFKV_BF16_DOT void accumulate_of(std::int64_t width, const std::uint32_t* weights,
                                   const std::uint32_t* values, Fetch& fetch,
                                   std::int64_t num_pairs, std::int64_t head_size_v,
                                   const float* keep, float* acc) {
  constexpr int kMost = kVectors == 1 ? 16 : 8;
  std::int64_t c = 0;
  for (; c + kMost <= head_size_v; c += kMost) {
    accumulate_columns<kVectors, kMost>(width, weights, values + c, fetch, num_pairs, head_size_v,
                                        keep, acc + c * width);
  }
  for (; c < head_size_v; c += 8) {
    accumulate_columns<kVectors, 8>(width, weights, values + c, fetch, num_pairs, head_size_v, keep,
                                    acc + c * width);
  }
}

// Stores 32 words of 16 bits, or fewer where only `left` are. A store with a mask takes longer,
// even with all lanes.
DIFFKV_BF16_DOT inline void store_words(void* to, __m512i words, std::int64_t left) {
  if (left >= 32) {
    _mm512_storeu_si512(to, words);
  } else if (left > 0) {
    _mm512_mask_storeu_epi16(to, first_lanes<__mmask32>(left), words);
  }
}

// The same of 16 pairs.
DIFFKV_BF16_DOT inline void store_pairs(std::uint32_t* to, __m512i pairs, std::int64_t left) {
  store_words(to, pairs, 2 * left);
}

DIFFKV_BF16_DOT bool pair_bf16(const std::byte* const* rows, std::int64_t num_keys,
                               std::int64_t head_size_v, std::uint32_t* pairs) {
  const Bf16Reader<false> reader(DType::kBF16);
  const __m512i first = pair_indices(0, 32);
  const __m512i second = pair_indices(16, 32);
  const __m512i magnitude = _mm512_set1_epi16(0x7fff);
  __m512i most = _mm512_setzero_si512();
  for (std::int64_t k = 0; k < num_keys; k += 2, pairs += head_size_v) {
    for (std::int64_t c = 0; c < head_size_v; c += 32) {
      const __m512i a = reader.load(rows[k], c, head_size_v);
      const __m512i b =
          k + 1 < num_keys ? reader.load(rows[k + 1], c, head_size_v) : _mm512_setzero_si512();
      most = _mm512_max_epu16(most, _mm512_and_si512(a, magnitude));
      most = _mm512_max_epu16(most, _mm512_and_si512(b, magnitude));
      const std::int64_t left = head_size_v - c;
      store_pairs(pairs + c, _mm512_permutex2var_epi16(a, first, b), left);
      store_pairs(pairs + c + 16, _mm512_permutex2var_epi16(a, second, b), left - 16);
    }
  }
  return _mm512_cmpge_epu16_mask(most, _mm512_set1_epi16(0x7f80)) == 0;
}

// 64 columns of both keys at a time. Unpacking works within 128-bit blocks, so the elements' words
// of 32 bits are dealt to the blocks first.
DIFFKV_BF16_DOT bool pair_fp8(DType stored, const std::byte* const* rows, std::int64_t num_keys,
                              std::int64_t head_size_v, std::uint32_t* pairs) {
  const Fp8Decoder decoder(stored);
  const __m512i deal = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i magnitude = _mm512_set1_epi8(0x7f);
  const __m512i least_nonfinite = _mm512_set1_epi8(stored == DType::kE4M3 ? 0x7f : 0x7c);
  __m512i most = _mm512_setzero_si512();
  for (std::int64_t k = 0; k < num_keys; k += 2, pairs += head_size_v) {
    for (std::int64_t c = 0; c < head_size_v; c += 64) {
      const std::int64_t left = head_size_v - c;
      const __mmask64 columns = first_lanes<__mmask64>(left);
      const __m512i a = _mm512_maskz_loadu_epi8(columns, rows[k] + c);
      const __m512i b = k + 1 < num_keys ? _mm512_maskz_loadu_epi8(columns, rows[k + 1] + c)
                                         : _mm512_setzero_si512();
      most = _mm512_max_epu8(most, _mm512_and_si512(a, magnitude));
      most = _mm512_max_epu8(most, _mm512_and_si512(b, magnitude));
      const __m512i dealt_a = _mm512_permutexvar_epi32(deal, a);
      const __m512i dealt_b = _mm512_permutexvar_epi32(deal, b);
      const __m512i lower_a = decoder.lower(dealt_a);
      const __m512i upper_a = decoder.upper(dealt_a);
      const __m512i lower_b = decoder.lower(dealt_b);
      const __m512i upper_b = decoder.upper(dealt_b);
      const __m512i a0 = _mm512_unpacklo_epi8(lower_a, upper_a);
      const __m512i a1 = _mm512_unpackhi_epi8(lower_a, upper_a);
      const __m512i b0 = _mm512_unpacklo_epi8(lower_b, upper_b);
      const __m512i b1 = _mm512_unpackhi_epi8(lower_b, upper_b);
      store_pairs(pairs + c, _mm512_unpacklo_epi16(a0, b0), left);
      store_pairs(pairs + c + 16, _mm512_unpackhi_epi16(a0, b0), left - 16);
      store_pairs(pairs + c + 32, _mm512_unpacklo_epi16(a1, b1), left - 32);
      store_pairs(pairs + c + 48, _mm512_unpackhi_epi16(a1, b1), left - 48);
    }
  }
  return _mm512_cmpge_epu8_mask(most, least_nonfinite) == 0;
}

Fp8Table make_table(DType stored) {
  Fp8Table table;
  for (int i = 0; i < 128; ++i) {
    const auto byte = static_cast<std::uint8_t>(i);
    const std::uint32_t bits = core::bits_of(core::load_element(stored, &byte, 0));
    table.lower[i] = static_cast<std::uint8_t>(bits >> 16);
    table.upper[i] = static_cast<std::uint8_t>(bits >> 24);
  }
  return table;
}

}  // namespace

const Fp8Table& fp8_table(DType stored) {
  static const Fp8Table e4m3 = make_table(DType::kE4M3);
  static const Fp8Table e5m2 = make_table(DType::kE5M2);
  return stored == DType::kE4M3 ? e4m3 : e5m2;
}

void bf16_scores(std::int64_t width, const std::uint32_t* query, const std::byte* const* keys,
                 Fetch& fetch, std::int64_t num_keys, std::int64_t head_size_qk, float scale,
                 float* scores) {
  auto* const fn = width == 16 ? scores_of<1> : width == 32 ? scores_of<2> : scores_of<3>;
  fn(width, query, keys, fetch, num_keys, head_size_qk, scale, scores);
}

void bf16_accumulate(std::int64_t width, const std::uint32_t* weights, const std::uint32_t* values,
                     Fetch& fetch, std::int64_t num_keys, std::int64_t head_size_v,
                     const float* keep, float* acc) {
  auto* const fn = width == 16   ? accumulate_of<1>
                   : width == 32 ? accumulate_of<2>
                                 : accumulate_of<3>;
  fn(width, weights, values, fetch, (num_keys + 1) / 2, head_size_v, keep, acc);
}

// 64 elements at a time. Unpacking works within 128-bit blocks, so the elements' words of 64 bits
// are dealt to the blocks first.
DIFFKV_BF16_DOT void bf16_keys(DType stored, const std::byte* const* rows, std::int64_t num_keys,
                               std::int64_t n, std::uint16_t* keys) {
  const Fp8Decoder decoder(stored);
  const __m512i deal = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  for (std::int64_t k = 0; k < num_keys; ++k, keys += n) {
    for (std::int64_t i = 0; i < n; i += 64) {
      const std::int64_t left = n - i;
      const __m512i x = _mm512_permutexvar_epi64(
          deal, _mm512_maskz_loadu_epi8(first_lanes<__mmask64>(left), rows[k] + i));
      const __m512i lower = decoder.lower(x);
      const __m512i upper = decoder.upper(x);
      store_words(keys + i, _mm512_unpacklo_epi8(lower, upper), left);
      store_words(keys + i + 32, _mm512_unpackhi_epi8(lower, upper), left - 32);
    }
  }
}

bool bf16_values(DType stored, const std::byte* const* rows, std::int64_t num_keys,
                 std::int64_t head_size_v, std::uint32_t* pairs) {
  return stored == DType::kBF16 ? pair_bf16(rows, num_keys, head_size_v, pairs)
                                : pair_fp8(stored, rows, num_keys, head_size_v, pairs);
}

void bf16_drop_nonfinite(std::uint16_t* values, std::int64_t n) {
  constexpr std::uint16_t kInf = 0x7f80;
  for (std::int64_t i = 0; i < n; ++i) {
    if ((values[i] & kInf) == kInf) values[i] = 0;
  }
}

DIFFKV_BF16_DOT void bf16_weights(std::int64_t width, const float* p, std::int64_t num_keys,
                                  std::uint32_t* pairs) {
  const __m512i order = pair_indices(0, 16);
  for (std::int64_t k = 0; k < num_keys; k += 2, p += 2 * width, pairs += width) {
    for (std::int64_t r = 0; r < width; r += 16) {
      const __m512 a = _mm512_loadu_ps(p + r);
      const __m512 b = k + 1 < num_keys ? _mm512_loadu_ps(p + width + r) : _mm512_setzero_ps();
      _mm512_storeu_si512(pairs + r, _mm512_permutexvar_epi16(order, round_to_bf16(a, b)));
    }
  }
}

}  // namespace diffkv::cpu

#endif
