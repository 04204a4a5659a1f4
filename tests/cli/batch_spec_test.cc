#include "cli/batch_spec.h"

#include <gtest/gtest.h>

#include <string>
#include <string_view>
#include <vector>

#include "diffkv/error.h"

namespace diffkv::cli {
namespace {

std::string written(std::string_view text) {
  std::string out;
  for (const SeqLengths& seq : parse_batch(text)) {
    out += std::to_string(seq.query_len) + "x" + std::to_string(seq.seq_len) + " ";
  }
  return out;
}

TEST(BatchSpec, ReadsLengthsAndCounts) {
  EXPECT_EQ(written("1x8192"), "1x8192 ");
  EXPECT_EQ(written("1x8192,512x512"), "1x8192 512x512 ");
  EXPECT_EQ(written("4x16*3,0x0"), "4x16 4x16 4x16 0x0 ");
  EXPECT_EQ(written("4x16*0,7x1"), "7x1 ");
  EXPECT_EQ(written("2147483647x2147483647"), "2147483647x2147483647 ");
}

TEST(BatchSpec, NamesTheWrongPart) {
  for (const std::string part :
       {"", "x", "1x", "x1", "1", "1x2x3", "-1x2", "1x-2", "1x2*", "1x2*-1", " 1x2", "1x2 ",
        "1.5x2", "axb", "1x2*3*4", "2147483648x1", "1x1*1048577", "99999999999999999999x1"}) {
    try {
      parse_batch("1x2," + part);
      ADD_FAILURE() << "\"" << part << "\" was taken";
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find("\"" + part + "\""), std::string::npos)
          << error.what();
    }
  }
}

TEST(BatchSpec, HoldsTokensInAnInt32) {
  EXPECT_THROW(parse_batch("2147483647x1,1x1"), Error);
  EXPECT_THROW(parse_batch("1x1*1048576,1x1"), Error);
}

void expect_named(const std::string& flag, const std::string& part, const auto& parse) {
  try {
    parse(part);
    ADD_FAILURE() << flag << " took \"" << part << "\"";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find(flag + " has \"" + part + "\""), std::string::npos)
        << error.what();
  }
}

TEST(BatchSpec, ReadsWhichSequencesAreCausal) {
  EXPECT_EQ(parse_causal("yes,no,no"), (std::vector<bool>{true, false, false}));
  for (const std::string part : {"", "y", "true", "yes "}) {
    expect_named("--causal-per-seq", part, parse_causal);
  }
}

TEST(BatchSpec, ReadsRanges) {
  EXPECT_EQ(parse_ranges("0-7,20-150"), (std::vector<PositionRange>{{0, 7}, {20, 150}}));
  for (const std::string part :
       {"", "7", "-7", "7-", "7-7", "8-7", "1-2-3", "a-b", "1-2147483648"}) {
    expect_named("--mm-ranges", part, parse_ranges);
  }
}

}  // namespace
}  // namespace diffkv::cli
