// Decode tiles of up to 16 rows, by blocks of rows, as in rows-inl.h.
#include "cpu/bf16_dot.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <algorithm>

#include "cpu/bf16_vectors.h"
#include "cpu/packed_rows.h"

namespace diffkv::cpu {
namespace {

// Scores of kKeys keys x all rows, and sums of kSummedRows rows x 32 columns.
constexpr int kKeys = 4;
constexpr int kSummedRows = 8;
// Head dimensions of a row of queries in a vector, which holds as many of each of four rows.
constexpr std::int64_t kDims = 2 * kRowWords;
// Those that are multiplied between fetches. By two threads of a Zen 5, 8 x 4096, pages of 16: 2.26
// ms, 48 take 2.28, 192 2.77.
constexpr std::int64_t kDimsPerFetch = 16;
// Two blocks of rows read a pair of keys' 32 columns, which are two units to fetch. The fetches
// stand between loops, not in them: there, with the question whether a last key is alone, they took
// registers from the products (8 x 4096 by two threads of a Zen 5, contiguous keys 2.37 ms instead
// of 2.10, pages of 16 2.53 instead of 2.42). One or two pairs at a time are 0 to 3 % slower.
constexpr std::int64_t kPairsPerFetch = 8;
static_assert(kDecodeRows == 2 * kSummedRows);

// Adds the products of elements i to i + kDims - 1.
DIFFKV_BF16_DOT inline void add_products(const std::uint32_t* query, const std::byte* const* key,
                                         std::int64_t i, __m512 (&sum)[kKeys][kRowParts]) {
  __m512i q[kRowParts];
#pragma GCC unroll 4
  for (std::int64_t v = 0; v < kRowParts; ++v) {
    q[v] = _mm512_loadu_si512(query + (i / kDims * kRowParts + v) * 16);
  }
#pragma GCC unroll 4
  for (int j = 0; j < kKeys; ++j) {
    const auto* at = reinterpret_cast<const __m128i*>(key[j] + 2 * i);
    const __m512i x = _mm512_broadcast_i32x4(_mm_loadu_si128(at));
#pragma GCC unroll 4
    for (int v = 0; v < kRowParts; ++v) sum[j][v] = dot_pairs(sum[j][v], q[v], x);
  }
}

// Reads pairs of values of 32 columns.
class PairedValues {
 public:
  PairedValues(const std::uint32_t* pairs, std::int64_t num_keys, std::int64_t head_size_v)
      : pairs_(pairs), num_pairs_((num_keys + 1) / 2), head_size_v_(head_size_v) {}

  // Of two keys.
  std::int64_t num_pairs() const { return num_pairs_; }

  DIFFKV_BF16_DOT void load(std::int64_t pair, std::int64_t c, __mmask32 columns, __m512i& first,
                            __m512i& second) const {
    const std::uint32_t* from = pairs_ + pair * head_size_v_ + c;
    first = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(columns), from);
    second = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(columns >> 16), from + 16);
  }

  // Whether one key is left, which load_last() pairs with zeros.
  static bool odd() { return false; }
  static void load_last(std::int64_t /*c*/, __mmask32 /*columns*/, __m512i& /*first*/,
                        __m512i& /*second*/) {}

 private:
  const std::uint32_t* pairs_;
  std::int64_t num_pairs_;
  std::int64_t head_size_v_;
};

// The same of bf16 rows.
class ValueRows {
 public:
  DIFFKV_BF16_DOT ValueRows(const std::byte* const* rows, std::int64_t num_keys)
      : rows_(rows),
        num_keys_(num_keys),
        first_(pair_indices(0, 32)),
        second_(pair_indices(16, 32)) {}

  std::int64_t num_pairs() const { return num_keys_ / 2; }

  DIFFKV_BF16_DOT void load(std::int64_t pair, std::int64_t c, __mmask32 columns, __m512i& first,
                            __m512i& second) const {
    const __m512i a = _mm512_maskz_loadu_epi16(columns, rows_[2 * pair] + 2 * c);
    const __m512i b = _mm512_maskz_loadu_epi16(columns, rows_[2 * pair + 1] + 2 * c);
    first = _mm512_permutex2var_epi16(a, first_, b);
    second = _mm512_permutex2var_epi16(a, second_, b);
  }

  bool odd() const { return num_keys_ % 2 != 0; }

  DIFFKV_BF16_DOT void load_last(std::int64_t c, __mmask32 columns, __m512i& first,
                                 __m512i& second) const {
    const __m512i a = _mm512_maskz_loadu_epi16(columns, rows_[num_keys_ - 1] + 2 * c);
    const __m512i none = _mm512_setzero_si512();
    first = _mm512_permutex2var_epi16(a, first_, none);
    second = _mm512_permutex2var_epi16(a, second_, none);
  }

 private:
  const std::byte* const* rows_;
  std::int64_t num_keys_;
  __m512i first_;
  __m512i second_;
};

// Adds a pair's products with the weights of kSummedRows rows.
DIFFKV_BF16_DOT inline void add_pair(const std::uint32_t* weights, __m512i first, __m512i second,
                                     __m512 (&sum)[kSummedRows][2]) {
#pragma GCC unroll 8
  for (int r = 0; r < kSummedRows; ++r) {
    const __m512i weight = all_lanes(weights + r);
    sum[r][0] = dot_pairs(sum[r][0], first, weight);
    sum[r][1] = dot_pairs(sum[r][1], second, weight);
  }
}

// Columns c to c + 31, of which the mask says which there are, of kSummedRows rows.
template <class Values>
DIFFKV_BF16_DOT inline void accumulate_block(const std::uint32_t* weights, const Values& values,
                                             Fetch& fetch, std::int64_t c, __mmask32 columns,
                                             std::int64_t head_size_v, const float* keep,
                                             float* acc) {
  const __mmask16 there[2] = {static_cast<__mmask16>(columns),
                              static_cast<__mmask16>(columns >> 16)};
  __m512 sum[kSummedRows][2];
#pragma GCC unroll 8
  for (auto& row : sum) row[0] = row[1] = _mm512_setzero_ps();
  __m512i first;
  __m512i second;
  const std::int64_t num_pairs = values.num_pairs();
  for (std::int64_t begin = 0; begin < num_pairs; begin += kPairsPerFetch) {
    fetch.units(kPairsPerFetch);
    const std::int64_t end = std::min(begin + kPairsPerFetch, num_pairs);
    for (std::int64_t pair = begin; pair < end; ++pair) {
      values.load(pair, c, columns, first, second);
      add_pair(weights + pair * kDecodeRows, first, second, sum);
    }
  }
  if (values.odd()) {
    values.load_last(c, columns, first, second);
    add_pair(weights + num_pairs * kDecodeRows, first, second, sum);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kSummedRows; ++r) {
    const __m512 factor = _mm512_set1_ps(keep[r]);
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      float* at = acc + r * head_size_v + c + std::int64_t{16} * v;
      _mm512_mask_storeu_ps(
          at, there[v], _mm512_fmadd_ps(_mm512_maskz_loadu_ps(there[v], at), factor, sum[r][v]));
    }
  }
}

template <class Values>
DIFFKV_BF16_DOT void accumulate(const std::uint32_t* weights, const Values& values, Fetch& next,
                                std::int64_t head_size_v, const float* keep, float* acc) {
  Fetch fetch = next;
  for (std::int64_t c = 0; c < head_size_v; c += 32) {
    for (std::int64_t row = 0; row < kDecodeRows; row += kSummedRows) {
      const auto block = [&](__mmask32 columns) DIFFKV_BF16_DOT {
        accumulate_block(weights + row, values, fetch, c, columns, head_size_v, keep + row,
                         acc + row * head_size_v);
      };
      if (head_size_v - c >= 32) {
        block(~__mmask32{0});
      } else {
        block(first_lanes<__mmask32>(head_size_v - c));
      }
    }
  }
  next = fetch;
}

}  // namespace

DIFFKV_BF16_DOT void bf16_scores_of_rows(const std::uint32_t* query, const std::byte* const* keys,
                                         Fetch& next, std::int64_t num_keys,
                                         std::int64_t head_size_qk, float scale, float* scores) {
  const __m512 scales = _mm512_set1_ps(scale);
  Fetch fetch = next;
  for (std::int64_t k = 0; k < num_keys; k += kKeys) {
    __m512 sum[kKeys][kRowParts];
#pragma GCC unroll 4
    for (auto& of_key : sum) {
#pragma GCC unroll 4
      for (__m512& each : of_key) each = _mm512_setzero_ps();
    }
    for (std::int64_t begin = 0; begin < head_size_qk; begin += kDimsPerFetch) {
      const std::int64_t end = std::min(begin + kDimsPerFetch, head_size_qk);
      fetch.units((end - begin) * kKeys / Fetch::kUnit);
      for (std::int64_t i = begin; i < end; i += kDims) add_products(query, keys + k, i, sum);
    }
#pragma GCC unroll 4
    for (std::int64_t j = 0; j < kKeys; ++j) {
      _mm512_storeu_ps(scores + (k + j) * kDecodeRows, _mm512_mul_ps(sum_blocks(sum[j]), scales));
    }
  }
  next = fetch;
}

DIFFKV_BF16_DOT void bf16_accumulate_rows(const std::uint32_t* weights,
                                          const std::byte* const* values, Fetch& fetch,
                                          std::int64_t num_keys, std::int64_t head_size_v,
                                          const float* keep, float* acc) {
  accumulate(weights, ValueRows(values, num_keys), fetch, head_size_v, keep, acc);
}

DIFFKV_BF16_DOT void bf16_accumulate_pairs(const std::uint32_t* weights, const std::uint32_t* pairs,
                                           Fetch& fetch, std::int64_t num_keys,
                                           std::int64_t head_size_v, const float* keep,
                                           float* acc) {
  accumulate(weights, PairedValues(pairs, num_keys, head_size_v), fetch, head_size_v, keep, acc);
}

}  // namespace diffkv::cpu

#endif
