// What the products of bf16 pairs are made of: the instructions' types and rows read as bf16.
// Included by their implementation alone.
#pragma once

// GCC 12 takes the undefined operand of an unmasked instruction for a mistake.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstddef>
#include <cstdint>

#include "diffkv/tensor.h"

// Part of the signature of every function of the implementation: the rest of the library runs on
// any x86-64.
#define DIFFKV_BF16_DOT \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,fma,f16c")))

namespace diffkv::cpu {

// sum + the products of the pairs a and b, lane by lane.
DIFFKV_BF16_DOT inline __m512 dot_pairs(__m512 sum, __m512i a, __m512i b) {
  // Vector types of one size convert by a cast of their bits.
  // NOLINTNEXTLINE(google-readability-casting)
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

// The 32 numbers of two vectors rounded to bf16, `low`'s first.
DIFFKV_BF16_DOT inline __m512i round_to_bf16(__m512 low, __m512 high) {
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);  // NOLINT(google-readability-casting)
}

// One pair, or one key's or column's 32 bits, in every lane.
DIFFKV_BF16_DOT inline __m512i all_lanes(const void* pair) {
  std::int32_t bits = 0;
  __builtin_memcpy(&bits, pair, sizeof(bits));
  return _mm512_set1_epi32(bits);
}

// The first n of 32 16-bit lanes, all from 32 on.
inline __mmask32 first_lanes(std::int64_t n) {
  return n >= 32 ? ~__mmask32{0} : (__mmask32{1} << n) - 1;
}

// The 128 magnitudes of an fp8 type as bf16: their lower and their upper bytes.
struct Fp8Table {
  alignas(64) std::uint8_t lower[128];
  alignas(64) std::uint8_t upper[128];
};
const Fp8Table& fp8_table(DType stored);

// Reads 32 elements of a row as bf16; those past n, a multiple of 8, are zeros.
template <bool kFp8>
class Bf16Reader {
 public:
  DIFFKV_BF16_DOT explicit Bf16Reader(DType stored) {
    if constexpr (!kFp8) return;
    const Fp8Table& table = fp8_table(stored);
    for (std::int64_t i = 0; i < 2; ++i) {
      lower_[i] = _mm512_load_si512(table.lower + 64 * i);
      upper_[i] = _mm512_load_si512(table.upper + 64 * i);
    }
  }

  DIFFKV_BF16_DOT __m512i load(const std::byte* row, std::int64_t i, std::int64_t n) const {
    const __mmask32 lanes = first_lanes(n - i);
    if constexpr (!kFp8) return _mm512_maskz_loadu_epi16(lanes, row + 2 * i);
    // The byte in the lower half of a word finds its lower byte, in the upper half its upper one;
    // the other half finds that of zero, which is zero.
    const __m512i x = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(lanes, row + i));
    const __m512i moved = _mm512_slli_epi16(x, 8);
    const __m512i lower = _mm512_permutex2var_epi8(lower_[0], x, lower_[1]);
    const __m512i upper = _mm512_permutex2var_epi8(upper_[0], moved, upper_[1]);
    const __m512i sign = _mm512_and_si512(moved, _mm512_set1_epi16(std::int16_t{-0x8000}));
    return _mm512_ternarylogic_epi32(lower, upper, sign, 0xfe);
  }

 private:
  __m512i lower_[2];
  __m512i upper_[2];
};

// Indices of 16 pairs of words: word first + i and the word `other` after it.
DIFFKV_BF16_DOT inline __m512i pair_indices(int first, int other) {
  alignas(64) std::uint16_t indices[32];
  for (std::int64_t i = 0; i < 16; ++i) {
    indices[2 * i] = static_cast<std::uint16_t>(first + i);
    indices[2 * i + 1] = static_cast<std::uint16_t>(first + i + other);
  }
  return _mm512_load_si512(indices);
}

}  // namespace diffkv::cpu
