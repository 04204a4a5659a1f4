// A batch as it is written on a command line: "1x8192,512x512,4x16384*3", and its masks.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace diffkv::cli {

struct SeqLengths {
  std::int32_t query_len = 0;
  std::int32_t seq_len = 0;
};

// Sequences QUERY_LENxSEQ_LEN, each with *COUNT if there are several alike, separated by commas.
// Throws Error that names the part that is wrong; at most kMaxSeqs sequences and as many query
// tokens as an int32 holds.
std::vector<SeqLengths> parse_batch(std::string_view text);

inline constexpr std::int64_t kMaxSeqs = 1 << 20;

// "yes,no,yes", of --causal-per-seq. Throws Error that names the part that is wrong.
std::vector<bool> parse_causal(std::string_view text);

// Positions of a sequence, both ends inclusive.
struct PositionRange {
  std::int32_t first = 0;
  std::int32_t last = 0;

  friend bool operator==(const PositionRange&, const PositionRange&) = default;
};

// "20-150,160-290", of --mm-ranges: FIRST is below LAST. Throws Error that names the part that is
// wrong.
std::vector<PositionRange> parse_ranges(std::string_view text);

}  // namespace diffkv::cli
