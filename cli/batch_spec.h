// A batch as it is written on a command line: "1x8192,512x512,4x16384*3".
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

}  // namespace diffkv::cli
