// Tiles of few rows: the head dimension in the lanes.
#include <type_traits>

#include "cpu/bf16_dot.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include "cpu/bf16_vectors.h"

namespace diffkv::cpu {
namespace {

// Sums that stay in registers; the latency of a product is 6.
constexpr int kSums = 16;

// Lane i of the result is the sum of the lanes of x[i].
DIFFKV_BF16_DOT inline __m512 sum_each(const __m512* x) {
  __m512 four[4];
#pragma GCC unroll 4
  for (std::int64_t i = 0; i < 4; ++i) four[i] = sum_blocks(x + 4 * i);
  const __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(four[0], four[1], 0x88),
                                 _mm512_shuffle_f32x4(four[0], four[1], 0xdd));
  const __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(four[2], four[3], 0x88),
                                 _mm512_shuffle_f32x4(four[2], four[3], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

// Measured: Fetch::units_of_row.
template <int kRows>
constexpr bool kFetchesByRow = kRows < 8;

template <int kRows, bool kFp8>
DIFFKV_BF16_DOT void scores_of(DType stored, const std::uint16_t* query,
                               const std::byte* const* keys, Fetch& next, std::int64_t num_keys,
                               std::int64_t head_size_qk, float scale, float* scores) {
  constexpr int kKeys = kSums / kRows;
  const Bf16Reader<kFp8> reader(stored);
  Fetch fetch = next;
  for (std::int64_t k = 0; k < num_keys; k += kKeys) {
    __m512 sum[kSums];
#pragma GCC unroll 16
    for (__m512& each : sum) each = _mm512_setzero_ps();
    for (std::int64_t i = 0; i < head_size_qk; i += 32) {
      __m512i key[kKeys];
#pragma GCC unroll 16
      for (int j = 0; j < kKeys; ++j) {
        fetch_units<kFetchesByRow<kRows>>(fetch, 1);
        key[j] = reader.load(keys[k + j], i, head_size_qk);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m512i q = _mm512_loadu_si512(query + i * kRows + r * kBf16Padding);
#pragma GCC unroll 16
        for (int j = 0; j < kKeys; ++j) {
          sum[r * kKeys + j] = dot_pairs(sum[r * kKeys + j], q, key[j]);
        }
      }
    }
    alignas(64) float sums[kSums];
    _mm512_store_ps(sums, _mm512_mul_ps(sum_each(sum), _mm512_set1_ps(scale)));
#pragma GCC unroll 8
    for (std::int64_t r = 0; r < kRows; ++r) {
      __builtin_memcpy(scores + r * kBlockKeys + k, sums + r * kKeys, kKeys * sizeof(float));
    }
  }
  next = fetch;
}

// kPairs x 32 columns.
template <int kRows, int kPairs, bool kFp8>
DIFFKV_BF16_DOT inline void accumulate_columns(const Bf16Reader<kFp8>& reader,
                                               const std::uint16_t* weights,
                                               const std::byte* const* values, Fetch& next,
                                               std::int64_t num_keys, std::int64_t c,
                                               std::int64_t head_size_v, std::int64_t padded,
                                               const float* keep, float* acc) {
  constexpr std::int64_t kVectors = std::int64_t{2} * kPairs;
  Fetch fetch = next;
  const __m512i first = pair_indices(0, 32);
  const __m512i second = pair_indices(16, 32);
  __m512 sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_setzero_ps();
  }
  for (std::int64_t k = 0; k < num_keys; k += 2) {
    __m512i value[kVectors];
#pragma GCC unroll 4
    for (std::int64_t v = 0; v < kPairs; ++v) {
      fetch_units<kFetchesByRow<kRows>>(fetch, 2);
      const __m512i a = reader.load(values[k], c + 32 * v, head_size_v);
      // The key after an odd last one has no weight, but what its slot holds may be anything.
      const __m512i b = k + 1 < num_keys ? reader.load(values[k + 1], c + 32 * v, head_size_v)
                                         : _mm512_setzero_si512();
      value[2 * v] = _mm512_permutex2var_epi16(a, first, b);
      value[2 * v + 1] = _mm512_permutex2var_epi16(a, second, b);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512i weight = all_lanes(weights + r * kBlockKeys + k);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] = dot_pairs(sum[r][v], weight, value[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (std::int64_t v = 0; v < kVectors; ++v) {
      float* at = acc + r * padded + c + 16 * v;
      _mm512_storeu_ps(at,
                       _mm512_fmadd_ps(_mm512_loadu_ps(at), _mm512_set1_ps(keep[r]), sum[r][v]));
    }
  }
  next = fetch;
}

template <int kRows, bool kFp8>
DIFFKV_BF16_DOT void accumulate_of(DType stored, const std::uint16_t* weights,
                                   const std::byte* const* values, Fetch& fetch,
                                   std::int64_t num_keys, std::int64_t head_size_v,
                                   const float* keep, float* acc) {
  constexpr int kPairs = kRows == 8 ? 1 : kRows == 4 ? 2 : 4;
  const Bf16Reader<kFp8> reader(stored);
  const std::int64_t padded = padded_to_unit(head_size_v);
  constexpr std::int64_t kColumns = std::int64_t{32} * kPairs;
  std::int64_t c = 0;
  for (; c + kColumns <= padded; c += kColumns) {
    accumulate_columns<kRows, kPairs, kFp8>(reader, weights, values, fetch, num_keys, c,
                                            head_size_v, padded, keep, acc);
  }
  for (; c < padded; c += 32) {
    accumulate_columns<kRows, 1, kFp8>(reader, weights, values, fetch, num_keys, c, head_size_v,
                                       padded, keep, acc);
  }
}

}  // namespace

void bf16_scores_narrow(int rows, DType stored, const std::uint16_t* query,
                        const std::byte* const* keys, Fetch& fetch, std::int64_t num_keys,
                        std::int64_t head_size_qk, float scale, float* scores) {
  const auto of = [&](auto fp8) {
    constexpr bool kFp8 = decltype(fp8)::value;
    return rows == 1   ? scores_of<1, kFp8>
           : rows == 2 ? scores_of<2, kFp8>
           : rows == 4 ? scores_of<4, kFp8>
                       : scores_of<8, kFp8>;
  };
  auto* const fn = stored == DType::kBF16 ? of(std::false_type()) : of(std::true_type());
  fn(stored, query, keys, fetch, num_keys, head_size_qk, scale, scores);
}

DIFFKV_BF16_DOT void bf16_weights_narrow(int rows, const float* p, std::int64_t num_keys,
                                         std::uint16_t* weights) {
  for (int r = 0; r < rows; ++r, p += kBlockKeys, weights += kBlockKeys) {
    for (std::int64_t k = 0; k < num_keys; k += 32) {
      const __mmask32 keys = first_lanes<__mmask32>(num_keys - k);
      const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(keys), p + k);
      const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(keys >> 16), p + k + 16);
      _mm512_storeu_si512(weights + k, round_to_bf16(low, high));
    }
  }
}

void bf16_accumulate_narrow(int rows, DType stored, const std::uint16_t* weights,
                            const std::byte* const* values, Fetch& fetch, std::int64_t num_keys,
                            std::int64_t head_size_v, const float* keep, float* acc) {
  const auto of = [&](auto fp8) {
    constexpr bool kFp8 = decltype(fp8)::value;
    return rows == 1   ? accumulate_of<1, kFp8>
           : rows == 2 ? accumulate_of<2, kFp8>
           : rows == 4 ? accumulate_of<4, kFp8>
                       : accumulate_of<8, kFp8>;
  };
  auto* const fn = stored == DType::kBF16 ? of(std::false_type()) : of(std::true_type());
  fn(stored, weights, values, fetch, num_keys, head_size_v, keep, acc);
}

}  // namespace diffkv::cpu

#endif
