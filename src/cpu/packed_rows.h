// How queries lie that are multiplied by blocks of rows (rows-inl.h, bf16_rows.cc).
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace diffkv::cpu {

// A vector of 16 words has kRowWords words of each of four rows, which meet as many words of a key,
// repeated. Rows v, kRowParts + v and so on are in vector v of a group, so that sums are put in
// order by few steps.
inline constexpr std::int64_t kRowWords = 4;
inline constexpr std::int64_t kRowParts = kDecodeRows / 4;
// Where word `word` of row `row` is, a multiple of kRowWords.
constexpr std::int64_t row_word_at(std::int64_t row, std::int64_t word) {
  return (word / kRowWords * kRowParts + row % kRowParts) * 16 + row / kRowParts * kRowWords;
}

}  // namespace diffkv::cpu
