// The matrix unit's instructions, and what goes into its registers. Included by the products made
// of them alone.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#ifdef DIFFKV_EMULATE_AMX
#include "cpu/amx_emulated.h"
#endif
#include "cpu/bf16_vectors.h"
#include "cpu/fetch.h"
#include "cpu/kernels.h"

namespace diffkv::cpu {

// A register holds 16 rows of 64 bytes: of keys 32 dimensions, of weights 16 pairs of keys, of
// queries, values and sums 16 columns.
inline constexpr std::int64_t kTile = 16;
inline constexpr std::int64_t kTileBytes = 64;
inline constexpr std::int64_t kTileDims = 32;
inline constexpr std::int64_t kMostPairs = kBlockKeys / 2;

#ifndef DIFFKV_EMULATE_AMX
inline constexpr bool kEmulatesAmx = false;

inline void configure_tiles(const void* config) {
  asm volatile("ldtilecfg (%0)" : : "r"(config) : "memory");
}
inline void release_tiles() { asm volatile("tilerelease" : : : "memory"); }
// The compiler's own intrinsics do not say that they read memory.
template <int kRegister>
void load_tile(const void* from, std::int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2"
               :
               : "r"(from), "r"(stride_bytes), "i"(kRegister)
               : "memory");
}
template <int kRegister>
void store_tile(void* to, std::int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)"
               :
               : "r"(to), "r"(stride_bytes), "i"(kRegister)
               : "memory");
}
template <int kRegister>
void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kRegister) : "memory");
}
// sums += a * b.
template <int kSums, int kA, int kB>
void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0"
               :
               : "i"(kSums), "i"(kA), "i"(kB)
               : "memory");
}
#endif

// Registers 0 to 3 are sums.
inline constexpr int kMostSums = 4;
template <int kCount, class Fn>
void for_each_sum(Fn&& fn) {
  fn.template operator()<0>();
  if constexpr (kCount > 1) fn.template operator()<1>();
  if constexpr (kCount > 2) fn.template operator()<2>();
  if constexpr (kCount > 3) fn.template operator()<3>();
}

// What is read with one tile.
inline void fetch_tile(Fetch& fetch) { fetch.units(kTile * kTileDims / Fetch::kUnit); }

// x[i], 16 words, becomes column i: word i of to[j * stride] is word j of x[i].
DIFFKV_BF16_DOT inline void turn_words(const __m512i (&x)[kTile], std::uint32_t* to,
                                       std::int64_t stride) {
  // Within 128-bit blocks, four by four: block b of y[4 g + j] is column 4 b + j of rows 4 g on.
  __m512i y[kTile];
#pragma GCC unroll 4
  for (std::int64_t g = 0; g < kTile; g += 4) {
    const __m512i low01 = _mm512_unpacklo_epi32(x[g], x[g + 1]);
    const __m512i high01 = _mm512_unpackhi_epi32(x[g], x[g + 1]);
    const __m512i low23 = _mm512_unpacklo_epi32(x[g + 2], x[g + 3]);
    const __m512i high23 = _mm512_unpackhi_epi32(x[g + 2], x[g + 3]);
    y[g] = _mm512_unpacklo_epi64(low01, low23);
    y[g + 1] = _mm512_unpackhi_epi64(low01, low23);
    y[g + 2] = _mm512_unpacklo_epi64(high01, high23);
    y[g + 3] = _mm512_unpackhi_epi64(high01, high23);
  }
  // Blocks, four by four: column 4 b + j is block b of y[j], y[4 + j], y[8 + j] and y[12 + j].
#pragma GCC unroll 4
  for (std::int64_t j = 0; j < 4; ++j) {
    const __m512i even_low = _mm512_shuffle_i32x4(y[j], y[4 + j], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(y[j], y[4 + j], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(y[8 + j], y[12 + j], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(y[8 + j], y[12 + j], 0xdd);
    const auto store = [&](std::int64_t column, __m512i rows)
                           DIFFKV_BF16_DOT { _mm512_storeu_si512(to + column * stride, rows); };
    store(j, _mm512_shuffle_i32x4(even_low, even_high, 0x88));
    store(8 + j, _mm512_shuffle_i32x4(even_low, even_high, 0xdd));
    store(4 + j, _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
    store(12 + j, _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd));
  }
}

// Sums in memory: rows `stride` floats apart, each tile's first row `step` floats after the one's
// before.
template <int kTiles>
void store_sums(float* to, std::int64_t stride, std::int64_t step) {
  constexpr auto kBytes = static_cast<std::int64_t>(sizeof(float));
  for_each_sum<kTiles>([&]<int kSum>() { store_tile<kSum>(to + kSum * step, kBytes * stride); });
}
template <int kTiles>
void load_sums(const float* from, std::int64_t stride, std::int64_t step) {
  constexpr auto kBytes = static_cast<std::int64_t>(sizeof(float));
  for_each_sum<kTiles>([&]<int kSum>() { load_tile<kSum>(from + kSum * step, kBytes * stride); });
}

// acc[row, c] *= keep[row], which is 1 for most rows of most blocks.
DIFFKV_BF16_DOT inline void keep_rows(std::int64_t width, const float* keep,
                                      std::int64_t head_size_v, float* acc) {
  for (std::int64_t row = 0; row < width; ++row, acc += head_size_v) {
    if (keep[row] == 1.0F) continue;
    const __m512 factor = _mm512_set1_ps(keep[row]);
    for (std::int64_t c = 0; c < head_size_v; c += kTile) {
      _mm512_storeu_ps(acc + c, _mm512_mul_ps(_mm512_loadu_ps(acc + c), factor));
    }
  }
}

// Pairs of keys up to whole registers.
inline std::int64_t padded_pairs(std::int64_t num_keys) {
  return (num_keys + 2 * kTile - 1) / (2 * kTile) * kTile;
}
// Zeros past the last key's pair: whatever is there is multiplied with weights of zero.
inline void pad_values(std::int64_t num_keys, std::int64_t head_size_v, std::uint32_t* values) {
  std::fill(values + (num_keys + 1) / 2 * head_size_v,
            values + padded_pairs(num_keys) * head_size_v, 0U);
}

// n scores, a multiple of 16, times `scale`.
DIFFKV_BF16_DOT inline void scale_scores(std::int64_t n, float scale, float* scores) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (std::int64_t i = 0; i < n; i += kTile) {
    _mm512_storeu_ps(scores + i, _mm512_mul_ps(_mm512_loadu_ps(scores + i), factor));
  }
}

// Calls fn with the number of sums, 1 to kMostSums, as a constant.
template <class Fn>
void with_sums(std::int64_t count, Fn&& fn) {
  switch (count) {
    case 1:
      return fn.template operator()<1>();
    case 2:
      return fn.template operator()<2>();
    case 3:
      return fn.template operator()<3>();
    default:
      return fn.template operator()<kMostSums>();
  }
}

// Calls fn<tiles>(column, row) for all columns and rows of an accumulator, by as many columns as
// there are sums and 16 rows.
template <class Fn>
void for_each_accumulated(std::int64_t head_size_v, std::int64_t width, Fn&& fn) {
  for (std::int64_t c = 0; c < head_size_v; c += kMostSums * kTile) {
    with_sums(std::min<std::int64_t>((head_size_v - c) / kTile, kMostSums), [&]<int kTiles>() {
      for (std::int64_t row = 0; row < width; row += kTile) {
        fn.template operator()<kTiles>(c, row);
      }
    });
  }
}

// The weights of 16 rows for keys k and k + 1, zeros past the last key. p: [num_keys, width].
struct WeightsOfPair {
  __m512 first;
  __m512 second;

  DIFFKV_BF16_DOT WeightsOfPair(const float* p, std::int64_t width, std::int64_t num_keys,
                                std::int64_t k)
      : first(k < num_keys ? _mm512_loadu_ps(p + k * width) : _mm512_setzero_ps()),
        second(k + 1 < num_keys ? _mm512_loadu_ps(p + (k + 1) * width) : _mm512_setzero_ps()) {}
};

}  // namespace diffkv::cpu
