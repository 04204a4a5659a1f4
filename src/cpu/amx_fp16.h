// Products of tiles of fp16 with sums in fp32, by the matrix unit for bf16 (amx.h): an fp16 is the
// sum of two bf16, exactly: its upper part, rounded to nearest, and a lower part of at most 2^-8 of
// it. So is a probability but for 2^-17 of it. Of the four products the one of two lower parts, at
// most 2^-16 of the whole, is left out. Where the whole is NaN or infinite the upper part is, too,
// and the lower part is zero.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/fetch.h"

namespace diffkv::cpu {

// A tile's two parts, in the same layout.
template <class T>
struct Parts {
  T* upper = nullptr;
  T* lower = nullptr;
};

// Where element i of a row is among its parts: of 32 neighbours the i-th and the one 16 after it
// make a pair, the i-th first.
constexpr std::int64_t split_index(std::int64_t i) {
  return i / 32 * 32 + i % 16 * 2 + (i % 32 < 16 ? 0 : 1);
}

// Rows of n fp16, a multiple of 32, at most 64 rows, to rows of parts [rows, n], in the order of
// split_index. Returns which rows hold a number that is not finite, the first one's bit lowest.
std::uint64_t amx_split_rows(const std::byte* const* rows, std::int64_t num_rows, std::int64_t n,
                             Parts<std::uint16_t> parts);

// What amx_split_scores multiplies.
struct SplitScores {
  Parts<const std::uint32_t> query;  // pairs [head_size_qk / 2, width]
  Parts<const std::uint16_t> keys;   // [keys rounded up to 16, head_size_qk]
  std::uint64_t nonfinite_rows = 0;  // of the queries
  std::uint64_t nonfinite_keys = 0;
};

// As amx_scores.
void amx_split_scores(std::int64_t width, const SplitScores& operands, Fetch& fetch,
                      std::int64_t num_keys, std::int64_t head_size_qk, float scale, float* scores);

// The parts of values, rows of fp16, in pairs as bf16_values makes them. Those that are not finite
// become zeros. Returns whether there are none.
bool amx_split_values(const std::byte* const* rows, std::int64_t num_keys, std::int64_t head_size_v,
                      Parts<std::uint32_t> pairs);

// As amx_weights, both parts.
void amx_split_weights(std::int64_t width, const float* p, std::int64_t num_keys,
                       Parts<std::uint32_t> words);

// As amx_accumulate.
void amx_split_accumulate(std::int64_t width, Parts<const std::uint32_t> weights,
                          Parts<std::uint32_t> values, Fetch& fetch, std::int64_t num_keys,
                          std::int64_t head_size_v, const float* keep, float* acc);

}  // namespace diffkv::cpu
