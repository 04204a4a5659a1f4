#include "cpu/bf16_dot.h"

#include <algorithm>
#include <cstring>

#include "core/dtype.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

// Part of the signature of every function below: the rest of the library runs on any x86-64.
#define DIFFKV_BF16_DOT \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,fma,f16c")))

namespace diffkv::cpu {
namespace {

// Vector types of one size convert by a cast of their bits.
// NOLINTBEGIN(google-readability-casting)
DIFFKV_BF16_DOT inline __m512bh as_bf16(__m512i x) { return (__m512bh)x; }
DIFFKV_BF16_DOT inline __m256bh as_bf16(__m256i x) { return (__m256bh)x; }
DIFFKV_BF16_DOT inline __m128bh as_bf16(__m128i x) { return (__m128bh)x; }
// NOLINTEND(google-readability-casting)

// A vector of rows: 16, or the lower 8 or 4 of them, which AMD's cores run at up to twice the rate.
template <int kLanes>
struct Lanes;

template <>
struct Lanes<16> {
  using F = __m512;
  using I = __m512i;
  DIFFKV_BF16_DOT static F zero() { return _mm512_setzero_ps(); }
  DIFFKV_BF16_DOT static F load(const float* p) { return _mm512_loadu_ps(p); }
  DIFFKV_BF16_DOT static I load(const std::uint32_t* p) { return _mm512_loadu_si512(p); }
  DIFFKV_BF16_DOT static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  DIFFKV_BF16_DOT static I all(std::int32_t pair) { return _mm512_set1_epi32(pair); }
  DIFFKV_BF16_DOT static F dot(F sum, I a, I b) {
    return _mm512_dpbf16_ps(sum, as_bf16(a), as_bf16(b));
  }
  DIFFKV_BF16_DOT static F scaled(F x, float by) { return _mm512_mul_ps(x, _mm512_set1_ps(by)); }
  DIFFKV_BF16_DOT static F mul_add(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
};

template <>
struct Lanes<8> {
  using F = __m256;
  using I = __m256i;
  DIFFKV_BF16_DOT static F zero() { return _mm256_setzero_ps(); }
  DIFFKV_BF16_DOT static F load(const float* p) { return _mm256_loadu_ps(p); }
  DIFFKV_BF16_DOT static I load(const std::uint32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  DIFFKV_BF16_DOT static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  DIFFKV_BF16_DOT static I all(std::int32_t pair) { return _mm256_set1_epi32(pair); }
  DIFFKV_BF16_DOT static F dot(F sum, I a, I b) {
    return _mm256_dpbf16_ps(sum, as_bf16(a), as_bf16(b));
  }
  DIFFKV_BF16_DOT static F scaled(F x, float by) { return _mm256_mul_ps(x, _mm256_set1_ps(by)); }
  DIFFKV_BF16_DOT static F mul_add(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
};

template <>
struct Lanes<4> {
  using F = __m128;
  using I = __m128i;
  DIFFKV_BF16_DOT static F zero() { return _mm_setzero_ps(); }
  DIFFKV_BF16_DOT static F load(const float* p) { return _mm_loadu_ps(p); }
  DIFFKV_BF16_DOT static I load(const std::uint32_t* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
  DIFFKV_BF16_DOT static void store(float* p, F x) { _mm_storeu_ps(p, x); }
  DIFFKV_BF16_DOT static I all(std::int32_t pair) { return _mm_set1_epi32(pair); }
  DIFFKV_BF16_DOT static F dot(F sum, I a, I b) {
    return _mm_dpbf16_ps(sum, as_bf16(a), as_bf16(b));
  }
  DIFFKV_BF16_DOT static F scaled(F x, float by) { return _mm_mul_ps(x, _mm_set1_ps(by)); }
  DIFFKV_BF16_DOT static F mul_add(F a, F b, F c) { return _mm_fmadd_ps(a, b, c); }
};

template <class T>
DIFFKV_BF16_DOT inline std::int32_t pair_at(const T* from) {
  std::int32_t pair = 0;
  std::memcpy(&pair, from, sizeof(pair));
  return pair;
}

// 8 keys x kVectors of rows stay in registers; the sum has a latency of 6, so 8 hide it.
constexpr int kKeys = 8;
// Pairs of a key in a cache line.
constexpr std::int64_t kPairsOfLine = 16;

template <int kLanes, int kVectors>
DIFFKV_BF16_DOT void scores_of(std::int64_t width, const std::uint32_t* query,
                               const std::byte* const* keys, const NextRows& next,
                               std::int64_t num_keys, std::int64_t head_size_qk, float scale,
                               float* scores) {
  using L = Lanes<kLanes>;
  const std::int64_t pairs = head_size_qk / 2;
  for (std::int64_t k = 0; k < num_keys; k += kKeys) {
    const std::byte* key[kKeys];
    typename L::F sum[kKeys][kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kKeys; ++j) {
      key[j] = keys[k + j];
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) sum[j][v] = L::zero();
    }
    const std::uint32_t* q = query;
    for (std::int64_t line = 0; line < pairs; line += kPairsOfLine) {
      for (int j = 0; 4 * line < next.bytes && j < kKeys; ++j) {
        _mm_prefetch(next.rows[k + j] + 4 * line, _MM_HINT_T0);
      }
      const std::int64_t stop = std::min(line + kPairsOfLine, pairs);
      for (std::int64_t i = line; i < stop; ++i, q += width) {
        typename L::I pair[kVectors];
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) pair[v] = L::load(q + v * kLanes);
#pragma GCC unroll 8
        for (int j = 0; j < kKeys; ++j) {
          const typename L::I x = L::all(pair_at(key[j] + 4 * i));
#pragma GCC unroll 3
          for (int v = 0; v < kVectors; ++v) sum[j][v] = L::dot(sum[j][v], pair[v], x);
        }
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < kKeys; ++j) {
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) {
        L::store(scores + (k + j) * width + v * kLanes, L::scaled(sum[j][v], scale));
      }
    }
  }
}

// kColumns value columns x kVectors of rows.
template <int kLanes, int kVectors, int kColumns>
DIFFKV_BF16_DOT inline void accumulate_columns(std::int64_t width, const std::uint32_t* weights,
                                               const std::uint32_t* values,
                                               const std::byte* const* next, std::int64_t at_byte,
                                               std::int64_t num_pairs, std::int64_t head_size_v,
                                               const float* keep, float* acc) {
  using L = Lanes<kLanes>;
  typename L::F sum[kColumns][kVectors];
#pragma GCC unroll 16
  for (int j = 0; j < kColumns; ++j) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) sum[j][v] = L::zero();
  }
  for (std::int64_t k = 0; k < num_pairs; ++k, weights += width, values += head_size_v) {
    if (next != nullptr) _mm_prefetch(next[2 * k] + at_byte, _MM_HINT_T0);
    typename L::I weight[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) weight[v] = L::load(weights + v * kLanes);
#pragma GCC unroll 16
    for (int j = 0; j < kColumns; ++j) {
      const typename L::I x = L::all(pair_at(values + j));
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) sum[j][v] = L::dot(sum[j][v], weight[v], x);
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < kColumns; ++j) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      float* at = acc + j * width + v * kLanes;
      L::store(at, L::mul_add(L::load(at), L::load(keep + v * kLanes), sum[j][v]));
    }
  }
}

template <int kLanes, int kVectors>
DIFFKV_BF16_DOT void accumulate_of(std::int64_t width, const std::uint32_t* weights,
                                   const std::uint32_t* values, const NextRows& next,
                                   std::int64_t num_pairs, std::int64_t head_size_v,
                                   const float* keep, float* acc) {
  constexpr std::int64_t kMost = kVectors == 1 ? 16 : 8;
  for (std::int64_t c = 0; c < head_size_v;) {
    // Every 16 columns one line of every other row: 16 bf16 columns are half a line.
    const std::int64_t sweep = c / 16;
    const std::int64_t at_byte = sweep / 2 * 64;
    const bool fetches = c % 16 == 0 && at_byte < next.bytes;
    const std::byte* const* rows = fetches ? next.rows + sweep % 2 : nullptr;
    const bool most = c + kMost <= head_size_v;
    auto* const fn = most ? accumulate_columns<kLanes, kVectors, kMost>
                          : accumulate_columns<kLanes, kVectors, 8>;
    fn(width, weights, values + c, rows, at_byte, num_pairs, head_size_v, keep, acc + c * width);
    c += most ? kMost : 8;
  }
}

// The 128 magnitudes of an fp8 type as bf16: their lower and upper bytes, each in two vectors.
struct Fp8Table {
  alignas(64) std::uint8_t lower[128];
  alignas(64) std::uint8_t upper[128];
};

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

const Fp8Table& table_of(DType stored) {
  static const Fp8Table e4m3 = make_table(DType::kE4M3);
  static const Fp8Table e5m2 = make_table(DType::kE5M2);
  return stored == DType::kE4M3 ? e4m3 : e5m2;
}

// Reads 32 elements of a row as bf16; those past n, a multiple of 8, are zeros.
class Bf16Reader {
 public:
  DIFFKV_BF16_DOT explicit Bf16Reader(DType stored) : fp8_(stored != DType::kBF16) {
    if (!fp8_) return;
    const Fp8Table& table = table_of(stored);
    for (int i = 0; i < 2; ++i) {
      lower_[i] = _mm512_load_si512(table.lower + 64 * i);
      upper_[i] = _mm512_load_si512(table.upper + 64 * i);
    }
  }

  DIFFKV_BF16_DOT __m512i load(const std::byte* row, std::int64_t i, std::int64_t n) const {
    const __mmask32 lanes = n - i >= 32 ? ~__mmask32{0} : (__mmask32{1} << (n - i)) - 1;
    if (!fp8_) return _mm512_maskz_loadu_epi16(lanes, row + 2 * i);
    // The byte in the lower half of a word finds its lower byte, in the upper half its upper one;
    // the other half finds that of zero, which is zero.
    const __m512i x = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(lanes, row + i));
    const __m512i moved = _mm512_slli_epi16(x, 8);
    const __m512i lower = _mm512_permutex2var_epi8(lower_[0], x, lower_[1]);
    const __m512i upper = _mm512_permutex2var_epi8(upper_[0], moved, upper_[1]);
    const __m512i sign = _mm512_and_si512(moved, _mm512_set1_epi16(static_cast<short>(0x8000)));
    return _mm512_ternarylogic_epi32(lower, upper, sign, 0xfe);
  }

 private:
  bool fp8_;
  __m512i lower_[2];
  __m512i upper_[2];
};

// Words i of a and of b as pairs: those of words 0 .. 15, then of 16 .. 31.
DIFFKV_BF16_DOT inline __m512i pair_indices(int first) {
  alignas(64) std::uint16_t indices[32];
  for (int i = 0; i < 16; ++i) {
    indices[2 * i] = static_cast<std::uint16_t>(first + i);
    indices[2 * i + 1] = static_cast<std::uint16_t>(first + i + 32);
  }
  return _mm512_load_si512(indices);
}

}  // namespace

bool bf16_dot_available() {
  static const bool available =
      __builtin_cpu_supports("avx512bf16") != 0 && __builtin_cpu_supports("avx512vbmi") != 0 &&
      __builtin_cpu_supports("avx512bw") != 0 && __builtin_cpu_supports("avx512dq") != 0 &&
      __builtin_cpu_supports("avx512vl") != 0;
  return available;
}

void bf16_scores(Bf16Rows rows, const std::uint32_t* query, const std::byte* const* keys,
                 const NextRows& next, std::int64_t num_keys, std::int64_t head_size_qk,
                 float scale, float* scores) {
  auto* const fn = rows.used <= 4    ? scores_of<4, 1>
                   : rows.used <= 8  ? scores_of<8, 1>
                   : rows.used <= 16 ? scores_of<16, 1>
                   : rows.used <= 32 ? scores_of<16, 2>
                                     : scores_of<16, 3>;
  fn(rows.width, query, keys, next, num_keys, head_size_qk, scale, scores);
}

void bf16_accumulate(Bf16Rows rows, const std::uint32_t* weights, const std::uint32_t* values,
                     const NextRows& next, std::int64_t num_keys, std::int64_t head_size_v,
                     const float* keep, float* acc) {
  auto* const fn = rows.used <= 4    ? accumulate_of<4, 1>
                   : rows.used <= 8  ? accumulate_of<8, 1>
                   : rows.used <= 16 ? accumulate_of<16, 1>
                   : rows.used <= 32 ? accumulate_of<16, 2>
                                     : accumulate_of<16, 3>;
  fn(rows.width, weights, values, next, (num_keys + 1) / 2, head_size_v, keep, acc);
}

DIFFKV_BF16_DOT void bf16_keys(DType stored, const std::byte* const* rows, std::int64_t num_keys,
                               std::int64_t n, std::uint16_t* keys) {
  const Bf16Reader reader(stored);
  for (std::int64_t k = 0; k < num_keys; ++k) {
    for (std::int64_t i = 0; i < n; i += 32) {
      const __mmask32 lanes = n - i >= 32 ? ~__mmask32{0} : (__mmask32{1} << (n - i)) - 1;
      _mm512_mask_storeu_epi16(keys + k * n + i, lanes, reader.load(rows[k], i, n));
    }
  }
}

DIFFKV_BF16_DOT bool bf16_values(DType stored, const std::byte* const* rows, std::int64_t num_keys,
                                 std::int64_t head_size_v, std::uint32_t* pairs) {
  const Bf16Reader reader(stored);
  const __m512i first = pair_indices(0);
  const __m512i second = pair_indices(16);
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
      if (left >= 32) {
        _mm512_storeu_si512(pairs + c, _mm512_permutex2var_epi16(a, first, b));
        _mm512_storeu_si512(pairs + c + 16, _mm512_permutex2var_epi16(a, second, b));
        continue;
      }
      const std::uint32_t lanes = (std::uint32_t{1} << left) - 1;
      _mm512_mask_storeu_epi32(pairs + c, static_cast<__mmask16>(lanes),
                               _mm512_permutex2var_epi16(a, first, b));
      _mm512_mask_storeu_epi32(pairs + c + 16, static_cast<__mmask16>(lanes >> 16),
                               _mm512_permutex2var_epi16(a, second, b));
    }
  }
  return _mm512_cmpge_epu16_mask(most, _mm512_set1_epi16(0x7f80)) == 0;
}

void bf16_drop_nonfinite(std::uint32_t* pairs, std::int64_t n) {
  constexpr std::uint32_t kInf = 0x7f80;
  for (std::int64_t i = 0; i < n; ++i) {
    if ((pairs[i] & kInf) == kInf) pairs[i] &= 0xffff0000U;
    if ((pairs[i] >> 16 & kInf) == kInf) pairs[i] &= 0xffffU;
  }
}

DIFFKV_BF16_DOT void bf16_weights(std::int64_t width, const float* p, std::int64_t num_keys,
                                  std::uint32_t* pairs) {
  alignas(64) std::uint16_t indices[32];
  for (int i = 0; i < 16; ++i) {
    indices[2 * i] = static_cast<std::uint16_t>(i);
    indices[2 * i + 1] = static_cast<std::uint16_t>(i + 16);
  }
  const __m512i order = _mm512_load_si512(indices);
  for (std::int64_t k = 0; k < num_keys; k += 2, p += 2 * width, pairs += width) {
    for (std::int64_t r = 0; r < width; r += 16) {
      const __m512 a = _mm512_loadu_ps(p + r);
      const __m512 b = k + 1 < num_keys ? _mm512_loadu_ps(p + width + r) : _mm512_setzero_ps();
      const auto both = (__m512i)_mm512_cvtne2ps_pbh(b, a);  // NOLINT(google-readability-casting)
      _mm512_storeu_si512(pairs + r, _mm512_permutexvar_epi16(order, both));
    }
  }
}

}  // namespace diffkv::cpu

#else  // no such instruction, or no compiler that is known to have it

namespace diffkv::cpu {

bool bf16_dot_available() { return false; }

}  // namespace diffkv::cpu

#endif
