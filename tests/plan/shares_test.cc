// The arithmetic of shares by itself.
#include "plan/shares.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <utility>
#include <vector>

#include "diffkv/plan.h"

namespace diffkv::plan {
namespace {

TEST(Shares, FloorSumsAreSums) {
  std::mt19937 rng(7);
  const auto uniform = [&](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(rng);
  };
  for (int i = 0; i < 2000; ++i) {
    const int count = uniform(0, 60);
    const int divisor = uniform(1, 1 << uniform(0, 20));
    const int step = uniform(1, 1 << uniform(0, 20));
    const int first = uniform(-(1 << 22), 1 << 22);
    std::int64_t sum = 0;
    for (int k = 0; k < count; ++k) {
      sum += std::max(std::int64_t{0}, first + std::int64_t{step} * k) / divisor;
    }
    EXPECT_EQ(floor_sum(count, divisor, step, first), sum)
        << count << " " << divisor << " " << step << " " << first;
  }
}

// Little work is cut into as many shares as there are threads, much into all.
TEST(Shares, ThereAreNoMoreSharesThanTheWorkIsWorth) {
  ScheduleLimits limits;
  limits.threads = 3;
  TileClass cls;
  cls.workers = 12;
  EXPECT_EQ(shares_of(limits, cls, 1), 12);  // no such limit
  cls.least_share_cost = 100;
  EXPECT_EQ(shares_of(limits, cls, 1), 3);
  EXPECT_EQ(shares_of(limits, cls, 599), 5);
  EXPECT_EQ(shares_of(limits, cls, 5000), 12);
  cls.head_lanes = 4;  // of which each thread has at most one
  EXPECT_EQ(shares_of(limits, cls, 1), 1);
  EXPECT_EQ(shares_of(limits, cls, 5000), 3);
}

// Tiles of so many blocks, one a sequence, on a line cut for so many workers.
struct Line {
  ScheduleView view;
  std::vector<std::int32_t> query_start_loc{0};
  std::vector<std::int32_t> seq_lens;
  std::vector<std::int64_t> cost_before{0};

  // The view points into the vectors.
  Line(const Line&) = delete;
  Line& operator=(const Line&) = delete;

  Line(const std::vector<std::int32_t>& blocks, std::int32_t workers, std::int32_t tile_cost) {
    view.num_seqs = static_cast<std::int32_t>(blocks.size());
    view.group = 16;
    view.num_kv_heads = 1;
    view.limits.num_classes = 1;
    TileClass& cls = view.limits.classes[0];
    cls.tile_rows = cls.max_seq_rows = 16;
    cls.workers = workers;
    cls.tile_cost = tile_cost;
    for (const std::int32_t count : blocks) {
      query_start_loc.push_back(query_start_loc.back() + 1);
      seq_lens.push_back(count * 64);
      cost_before.push_back(cost_before.back() + tile_cost + std::int64_t{count} * cls.block_cost);
    }
    view.tables.query_start_loc = query_start_loc.data();
    view.tables.seq_lens = seq_lens.data();
    view.tables.cost_before[0] = cost_before.data();
  }
};

// Where share `index` of such a line starts: the sequence and the block.
std::pair<int, int> cut(const std::vector<std::int32_t>& blocks, std::int32_t workers,
                        std::int32_t tile_cost = 1, std::int32_t index = 1) {
  const Line line(blocks, workers, tile_cost);
  const detail::WorkStart at = share_start(line.view, 0, index).at;
  return {at.seq, at.block};
}

// A piece has four blocks, so that what it costs beside them is worth it; but where shares are
// short nobody works through several blocks while others have nothing to do.
TEST(Shares, PiecesAreShortOnlyWhereSharesAre) {
  EXPECT_EQ(cut({24, 20}, 2), std::pair(1, 0));  // one block would be left for the second
  EXPECT_EQ(cut({18, 22}, 2), std::pair(1, 0));  // two would be the first's
  EXPECT_EQ(cut({14, 26}, 2), std::pair(1, 6));
  EXPECT_EQ(cut({40}, 10), std::pair(0, 4));
  EXPECT_EQ(cut({32}, 16), std::pair(0, 2));
  EXPECT_EQ(cut({4}, 2), std::pair(0, 2));
}

// Where the start of a tile costs more than a share, who has it has little else.
TEST(Shares, AStartBeyondAShareIsItsOwn) {
  EXPECT_EQ(cut({32}, 16, 7), std::pair(0, 0));
  for (const int workers : {16, 64, 132}) {
    int longest = 0;
    for (int share = 0; share < workers; ++share) {
      const auto end_of = [&](int index) {
        return index == workers ? 32 : cut({32}, workers, 8, index).second;
      };
      longest = std::max(longest, end_of(share + 1) - end_of(share));
    }
    EXPECT_LE(longest, 40 / workers + 1) << workers;
  }
}

// Elsewhere it does not matter what that costs: every piece has one.
TEST(Shares, PiecesOfATileAreEqual) {
  for (const std::int32_t tile_cost : {1, 3, 7}) {
    for (const std::int32_t workers : {2, 8, 32}) {
      for (std::int32_t share = 0; share < workers; ++share) {
        EXPECT_EQ(cut({512}, workers, tile_cost, share), std::pair(0, 512 / workers * share))
            << "for " << workers << ", a start of " << tile_cost;
      }
    }
  }
}

// What a share costs is said with its first piece, of all shares the same.
TEST(Shares, SayWhatTheyCost) {
  const auto expect_cost = [](Line& line, std::int32_t head_lanes, std::int32_t expected) {
    TileClass& cls = line.view.limits.classes[0];
    cls.head_lanes = line.view.num_kv_heads = head_lanes;
    const std::int32_t shares = num_shares(cls);
    std::vector<detail::WorkStart> starts;
    for (std::int32_t share = 0; share <= shares; ++share) {
      starts.push_back(share_start(line.view, 0, share).at);
    }
    std::int32_t said = 0;
    for (std::int32_t share = 0; share < shares; ++share) {
      const Start start = share_start(line.view, 0, share);
      const detail::FirstPiece first = first_piece_of(line.view, 0, share, start, starts.data());
      if (first.seq < 0) continue;
      EXPECT_EQ(first.share_cost, expected) << "share " << share << " of " << shares;
      ++said;
    }
    EXPECT_GT(said, 0);
  };
  Line one({512}, 8, 8);
  expect_cost(one, 1, 65);
  Line several({100, 0, 20, 10, 110}, 4, 2);
  expect_cost(several, 1, 62);
  Line lanes({100, 60}, 4, 2);  // two lines of one head each, of which the costs are given together
  for (std::int64_t& cost : lanes.cost_before) cost *= 2;
  expect_cost(lanes, 2, 82);
  Line short_shares({3}, 16, 1);  // not all of them have work
  expect_cost(short_shares, 1, 0);
  Line long_shares({1 << 24}, 1, 1);
  long_shares.view.limits.classes[0].block_cost = 1 << 8;
  long_shares.cost_before[1] = std::int64_t{1} << 32;
  expect_cost(long_shares, 1, 1 << 30);
}

}  // namespace
}  // namespace diffkv::plan
