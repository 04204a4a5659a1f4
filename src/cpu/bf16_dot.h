// Products of pairs of bf16 with sums in fp32, AVX512_BF16's one instruction, for tiles with bf16
// queries over bf16 or fp8 caches. Highway 1.0.3 has no operation for it, so these are written for
// x86-64 and chosen at run time where they gain; every other tile and machine takes the fp32
// products.
//
// fp8 values are exact in bf16; probabilities are rounded to bf16, as the kernels of GPUs do, which
// adds at most 2^-9 of relative error to a weight.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "core/dtype.h"
#include "cpu/fetch.h"
#include "diffkv/tensor.h"

namespace diffkv::cpu {

// Whether this build has them and this machine runs them.
bool bf16_dot_available();

// Whether one takes less time than two products in fp32. On Intel's processors it does not, and
// fp32 products need no pairing of values: on a Xeon of 2023 by two threads prefill of 512 of 2048
// took 279 to 295 ms in pairs and 143 in fp32, decode of 16384 with 8 rows a KV head 5.6 and 4.5.
// With fewer rows pairs were as fast or faster there, too, and with 8 over fp8, which is converted
// faster to bf16. AMD's multiply twice as fast: decode of 1 x 32768 4.7 ms and 8.3.
bool bf16_dot_is_fast();

// Whether keys or values of that dtype can be multiplied this way.
constexpr bool bf16_dot_reads(DType dtype) {
  return dtype == DType::kBF16 || dtype == DType::kE4M3 || dtype == DType::kE5M2;
}

// Adds p * value to the sums of the rows that see it for every value of the block that is NaN or
// infinite; a hidden key's p is -0. Strides of p are from key to key and row to row, those of acc
// from column to column and row to row.
inline void add_nonfinite(const BlockRows& rows, DType dtype, std::int64_t head_size_v,
                          std::int64_t num_rows, const float* p, std::int64_t p_key,
                          std::int64_t p_row, float* acc, std::int64_t acc_column,
                          std::int64_t acc_row) {
  for (std::int64_t k = 0; k < rows.count(); ++k) {
    for (std::int64_t c = 0; c < head_size_v; ++c) {
      const float x = core::load_element(dtype, rows.value[static_cast<std::size_t>(k)], c);
      if (std::isfinite(x)) continue;
      for (std::int64_t r = 0; r < num_rows; ++r) {
        const float weight = p[k * p_key + r * p_row];
        if (core::bits_of(weight) == core::bits_of(-0.0F)) continue;
        acc[c * acc_column + r * acc_row] += weight * x;
      }
    }
  }
}

// Tiles of many rows: `width` rows (16, 32 or 48) are the vector lanes, as in wide-inl.h. A pair is
// two neighbours of the summed dimension in one 32-bit word, the first in the lower half: two head
// dimensions of a query or key, two keys of a weight or value.

// scores[key, row] = scale * sum over d of query[row, d] * key[key, d], for num_keys rounded up to
// 8. query: [head_size_qk / 2, width] pairs; keys: rows of head_size_qk bf16. The next rows are
// fetched on the way.
void bf16_scores(std::int64_t width, const std::uint32_t* query, const std::byte* const* keys,
                 Fetch& fetch, std::int64_t num_keys, std::int64_t head_size_qk, float scale,
                 float* scores);

// Rows of n fp8 elements to rows of n bf16, n a multiple of 8.
void bf16_keys(DType stored, const std::byte* const* rows, std::int64_t num_keys, std::int64_t n,
               std::uint16_t* keys);

// Where a block's keys are as bf16: the block's own rows, or, of fp8, `converted`, by bf16_keys. As
// many pointers as a block has keys: the last one is repeated.
class Bf16Keys {
 public:
  Bf16Keys(const BlockRows& rows, DType stored, const std::uint16_t* converted, std::int64_t n) {
    if (stored == DType::kBF16) {
      data_ = rows.key.data();
      return;
    }
    for (std::int64_t k = 0; k < kBlockKeys; ++k) {
      rows_[static_cast<std::size_t>(k)] =
          reinterpret_cast<const std::byte*>(converted + std::min(k, rows.count() - 1) * n);
    }
    data_ = rows_.data();
  }
  Bf16Keys(const Bf16Keys&) = delete;
  Bf16Keys& operator=(const Bf16Keys&) = delete;

  const std::byte* const* data() const { return data_; }

 private:
  const std::byte* const* data_ = nullptr;
  std::array<const std::byte*, kBlockKeys> rows_;
};

// pairs[key / 2, c] = (value[key, c], value[key + 1, c]); an odd last key is paired with zero.
// Returns whether every value is finite.
bool bf16_values(DType stored, const std::byte* const* rows, std::int64_t num_keys,
                 std::int64_t head_size_v, std::uint32_t* pairs);

// Sets those of n values that are NaN or infinite to zero.
void bf16_drop_nonfinite(std::uint16_t* values, std::int64_t n);

// pairs[key / 2, row] = (p[key, row], p[key + 1, row]), rounded to nearest even; an odd last key
// is paired with zero. p: [num_keys, width].
void bf16_weights(std::int64_t width, const float* p, std::int64_t num_keys, std::uint32_t* pairs);

// acc[c, row] = acc[c, row] * keep[row] + sum over keys of value[key, c] * weight[key, row].
void bf16_accumulate(std::int64_t width, const std::uint32_t* weights, const std::uint32_t* values,
                     Fetch& fetch, std::int64_t num_keys, std::int64_t head_size_v,
                     const float* keep, float* acc);

// Tiles of up to kDecodeRows rows: rows of sums, as in rows-inl.h.

// scores[key, row] = scale * sum over d of query[row, d] * key[key, d], for num_keys rounded up to
// 4. query: pairs, which lie as row_word_at() says; keys: rows of head_size_qk bf16; scores:
// [kBlockKeys, kDecodeRows]. The next rows are fetched on the way.
void bf16_scores_of_rows(const std::uint32_t* query, const std::byte* const* keys, Fetch& fetch,
                         std::int64_t num_keys, std::int64_t head_size_qk, float scale,
                         float* scores);

// acc[row, c] = acc[row, c] * keep[row] + sum over keys of value[key, c] * weight[key, row].
// weights: by bf16_weights, of kDecodeRows rows; values: rows of head_size_v bf16, kBlockKeys
// pointers; acc: [kDecodeRows, head_size_v].
void bf16_accumulate_rows(const std::uint32_t* weights, const std::byte* const* values,
                          Fetch& fetch, std::int64_t num_keys, std::int64_t head_size_v,
                          const float* keep, float* acc);

// The same of pairs of values, by bf16_values.
void bf16_accumulate_pairs(const std::uint32_t* weights, const std::uint32_t* pairs, Fetch& fetch,
                           std::int64_t num_keys, std::int64_t head_size_v, const float* keep,
                           float* acc);

// Tiles of up to 1, 2, 4 or 8 rows: the head dimension is in the lanes, keys and values are read
// where they are, as in narrow-inl.h.

// Rows of queries and values are padded to so many elements.
inline constexpr std::int64_t kBf16Padding = kFetchUnit;

// scores[row, key] = scale * sum over d of query[row, d] * key[key, d], for num_keys rounded up to
// 16. query: [head_size_qk padded / kBf16Padding, rows, kBf16Padding] bf16, zeros past the end;
// scores: [rows, kBlockKeys]. The next rows are fetched on the way.
void bf16_scores_narrow(int rows, DType stored, const std::uint16_t* query,
                        const std::byte* const* keys, Fetch& fetch, std::int64_t num_keys,
                        std::int64_t head_size_qk, float scale, float* scores);

// weights[row, key] = p[row, key] rounded to nearest even; an odd last key is followed by a zero.
// Both [rows, kBlockKeys].
void bf16_weights_narrow(int rows, const float* p, std::int64_t num_keys, std::uint16_t* weights);

// acc[row, c] = acc[row, c] * keep[row] + sum over keys of weight[row, key] * value[key, c]; acc:
// [rows, head_size_v padded]. The next rows are fetched on the way.
void bf16_accumulate_narrow(int rows, DType stored, const std::uint16_t* weights,
                            const std::byte* const* values, Fetch& fetch, std::int64_t num_keys,
                            std::int64_t head_size_v, const float* keep, float* acc);

}  // namespace diffkv::cpu
