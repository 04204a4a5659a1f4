// The two intervals of a row against the masks' predicates, key by key.
#include "core/mask.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

namespace diffkv::core {
namespace {

bool sees(const Mask& mask, const SeqMask& seq, std::int64_t p, std::int64_t j) {
  bool base = !seq.causal || j <= p;
  if (mask.chunk_size > 0) {
    const double size = mask.chunk_size;
    base = base &&
           std::floor(static_cast<double>(p) / size) - std::floor(static_cast<double>(j) / size) <=
               mask.chunk_lookback;
  } else if (mask.prefix_window > 0) {
    base = base && (j < seq.prefix_len || p - j < mask.prefix_window);
  } else if (mask.window > 0) {
    base = base && p - j < mask.window && (seq.causal || j - p < mask.window);
  }
  for (int r = 0; r < seq.num_mm_ranges; ++r) {
    const std::int64_t start = seq.mm_ranges[2 * r];
    const std::int64_t last = seq.mm_ranges[2 * r + 1];
    const bool both = start < last && start <= p && p <= last && start <= j && j <= last;
    const bool clamped = mask.clamp_mm_ranges && mask.window > 0 && p - j >= mask.window;
    base = base || (both && !clamped);
  }
  return base;
}

bool holds(const RowKeys& keys, std::int64_t j) {
  return j < keys.prefix_end || (keys.begin <= j && j < keys.end);
}

struct RandomMask {
  Mask mask;
  SeqMask seq;
  std::vector<std::int32_t> ranges;

  explicit RandomMask(unsigned seed) {
    std::mt19937 rng(seed);
    const auto uniform = [&](int low, int high) {
      return std::uniform_int_distribution<int>(low, high)(rng);
    };
    seq.query_len = uniform(0, 30);
    seq.seq_len = uniform(0, 60);
    seq.causal = uniform(0, 1) == 1;
    mask.window = uniform(-1, 1) * uniform(1, 25);
    if (uniform(0, 2) == 0) {
      mask.chunk_size = uniform(1, 20);
      mask.chunk_lookback = uniform(0, 2);
    } else if (uniform(0, 1) == 0) {
      mask.prefix_window = uniform(1, 20);
      seq.prefix_len = uniform(0, 70);
    }
    mask.clamp_mm_ranges = uniform(0, 1) == 1;
    for (int at = uniform(0, 20); ranges.size() < 6; at += uniform(1, 9)) {
      ranges.push_back(at);
      ranges.push_back(at += uniform(0, 15));
    }
    seq.mm_ranges = ranges.data();
    seq.num_mm_ranges = uniform(0, 3);
  }
};

TEST(Mask, RowKeysAreThePredicate) {
  std::int64_t seen = 0;
  for (unsigned seed = 0; seed < 3000; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    const RandomMask random(seed);
    for (int token = 0; token < random.seq.query_len; ++token) {
      const RowKeys keys = row_keys(random.mask, random.seq, token);
      const std::int64_t p = random.seq.context_len() + token;
      for (int j = 0; j < random.seq.seq_len; ++j) {
        ASSERT_EQ(holds(keys, j), sees(random.mask, random.seq, p, j)) << "p " << p << " j " << j;
        seen += holds(keys, j) ? 1 : 0;
      }
      EXPECT_LE(keys.end, random.seq.seq_len);
      EXPECT_TRUE(keys.prefix_end == 0 || keys.prefix_end < keys.begin) << "not in normal form";
    }
  }
  EXPECT_GT(seen, 100000);
}

TEST(Mask, TileKeysHoldEveryRow) {
  for (unsigned seed = 0; seed < 3000; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    const RandomMask random(seed);
    for (int first = 0; first < random.seq.query_len; first += 7) {
      const int last = std::min(first + 6, random.seq.query_len - 1);
      const RowKeys tile = tile_keys(random.mask, random.seq, first, last);
      EXPECT_GE(tile.begin, 0);
      EXPECT_LE(tile.end, random.seq.seq_len);
      for (int token = first; token <= last; ++token) {
        const RowKeys row = row_keys(random.mask, random.seq, token);
        for (int j = 0; j < random.seq.seq_len; ++j) {
          if (holds(row, j)) {
            ASSERT_TRUE(holds(tile, j)) << "token " << token << " key " << j;
          }
        }
      }
    }
  }
}

// A window tile must not read far below its first row's window.
TEST(Mask, TileOfAWindowIsNarrow) {
  Mask mask;
  mask.window = 128;
  SeqMask seq;
  seq.query_len = 64;
  seq.seq_len = 10000;
  const RowKeys tile = tile_keys(mask, seq, 16, 31);
  EXPECT_EQ(tile.prefix_end, 0);
  EXPECT_EQ(tile.begin, 10000 - 64 + 16 - 127);
  EXPECT_EQ(tile.end, 10000 - 64 + 31 + 1);
}

}  // namespace
}  // namespace diffkv::core
