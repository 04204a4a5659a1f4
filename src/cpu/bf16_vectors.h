// What the products of bf16 pairs are made of: the instructions' types and rows read as bf16.
// Included by their implementation alone.
#pragma once

// GCC 12 takes the undefined operand of an unmasked instruction for a mistake.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
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

// The first n lanes of as many as the mask has bits, all from there on.
template <class Mask>
Mask first_lanes(std::int64_t n) {
  constexpr std::int64_t kLanes = 8 * sizeof(Mask);
  return n >= kLanes ? static_cast<Mask>(~Mask{0}) : static_cast<Mask>((Mask{1} << n) - 1);
}

// The 128 magnitudes of an fp8 type as bf16: their lower and their upper bytes.
struct Fp8Table {
  alignas(64) std::uint8_t lower[128];
  alignas(64) std::uint8_t upper[128];
};
const Fp8Table& fp8_table(DType stored);

// fp8 to bf16 by table, in registers.
class Fp8Decoder {
 public:
  DIFFKV_BF16_DOT explicit Fp8Decoder(DType stored) {
    const Fp8Table& table = fp8_table(stored);
    for (std::int64_t i = 0; i < 2; ++i) {
      lower_[i] = _mm512_load_si512(table.lower + 64 * i);
      upper_[i] = _mm512_load_si512(table.upper + 64 * i);
    }
  }

  // The lower bytes of 64 elements as bf16.
  DIFFKV_BF16_DOT __m512i lower(__m512i x) const {
    return _mm512_permutex2var_epi8(lower_[0], x, lower_[1]);
  }
  // Their upper bytes, with the signs.
  DIFFKV_BF16_DOT __m512i upper(__m512i x) const {
    const __m512i magnitude = _mm512_permutex2var_epi8(upper_[0], x, upper_[1]);
    constexpr int kOrOfAnd = 0xf8;  // a | (b & c)
    return _mm512_ternarylogic_epi32(magnitude, x, _mm512_set1_epi8(-0x80), kOrOfAnd);
  }

  // 32 elements.
  DIFFKV_BF16_DOT __m512i decode(__m256i elements) const {
    // The byte in the lower half of a word finds its lower byte, in the upper half its upper one;
    // the other half finds that of zero, which is zero.
    const __m512i x = _mm512_cvtepu8_epi16(elements);
    const __m512i moved = _mm512_slli_epi16(x, 8);
    return _mm512_or_si512(lower(x), upper(moved));
  }

 private:
  __m512i lower_[2];
  __m512i upper_[2];
};

// Reads 32 elements of a row as bf16; those past n, a multiple of 8, are zeros.
template <bool kFp8>
class Bf16Reader;

template <>
class Bf16Reader<false> {
 public:
  explicit Bf16Reader(DType /*stored*/) {}

  DIFFKV_BF16_DOT __m512i load(const std::byte* row, std::int64_t i, std::int64_t n) const {
    return _mm512_maskz_loadu_epi16(first_lanes<__mmask32>(n - i), row + 2 * i);
  }
};

template <>
class Bf16Reader<true> {
 public:
  DIFFKV_BF16_DOT explicit Bf16Reader(DType stored) : decoder_(stored) {}

  DIFFKV_BF16_DOT __m512i load(const std::byte* row, std::int64_t i, std::int64_t n) const {
    return decoder_.decode(_mm256_maskz_loadu_epi8(first_lanes<__mmask32>(n - i), row + i));
  }

 private:
  Fp8Decoder decoder_;
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

// Of four vectors, the sums of each over every 128-bit block, transposed while adding: lane j of a
// block is the sum of x[j] over that block.
DIFFKV_BF16_DOT inline __m512 sum_blocks(const __m512* x) {
  const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
  const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
  return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
}

}  // namespace diffkv::cpu
