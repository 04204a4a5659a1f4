// The schedule against brute force: blocks, shares, pieces, on random batches.
#include "plan/schedule.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "core/mask.h"
#include "diffkv/plan.h"
#include "plan/shares.h"
#include "plan/walk.h"
#include "tests/plan/random_plan.h"

namespace diffkv::plan {
namespace {

class ScheduleTest : public testing::TestWithParam<SchedulePolicy> {};

// Every tile of every sequence is walked exactly once, block by block, in key order.
TEST_P(ScheduleTest, WalksEveryBlockOnce) {
  on_random_batches(GetParam(), [](const Planned& planned, const ScheduleView& view) {
    std::map<std::pair<int, int>, int> next_block;  // (seq, tile) -> blocks walked
    std::map<std::pair<int, int>, int> num_blocks;
    for (int c = 0; c < planned.limits.num_classes; ++c) {
      for (int w = 0; w < planned.limits.classes[c].workers; ++w) {
        for_each_piece(view, c, w, [&](const Piece& piece) {
          const auto tile = std::make_pair(piece.seq, piece.tile_index);
          if (piece.first()) {
            EXPECT_EQ(next_block.count(tile), 0U);
          }
          EXPECT_EQ(next_block[tile], piece.begin_block);
          EXPECT_TRUE(piece.end_block > piece.begin_block || piece.tile.num_blocks == 0);
          next_block[tile] = piece.end_block;
          num_blocks[tile] = piece.tile.num_blocks;
        });
      }
    }
    EXPECT_EQ(next_block, num_blocks);
    std::size_t expected_tiles = 0;
    for (int s = 0; s < view.num_seqs; ++s) {
      const SeqTiles tiles = seq_tiles(view, seq_mask(view, s).query_len);
      expected_tiles += static_cast<std::size_t>(tiles.count());
    }
    EXPECT_EQ(num_blocks.size(), expected_tiles);
  });
}

TEST_P(ScheduleTest, SharesStartInSequencesThatHaveWork) {
  on_random_batches(GetParam(), [](const Planned& planned, const ScheduleView& view) {
    for (int c = 0; c < planned.limits.num_classes; ++c) {
      for (int share = 0; share <= num_shares(planned.limits.classes[c]); ++share) {
        const int seq = planned.tables.starts[c][share].seq;
        if (seq == view.num_seqs) continue;
        const SeqTiles tiles = seq_tiles(view, seq_mask(view, seq).query_len);
        EXPECT_TRUE(tiles.tile_class == c && tiles.count() > 0) << "share " << share;
      }
    }
  });
}

// A tile's blocks hold exactly the keys that some row may see, each once, and every row's keys.
TEST_P(ScheduleTest, BlocksHoldTheRowsKeys) {
  on_random_batches(GetParam(), [](const Planned& planned, const ScheduleView& view) {
    for (int s = 0; s < view.num_seqs; ++s) {
      const SeqMask seq = seq_mask(view, s);
      const SeqTiles tiles = seq_tiles(view, seq.query_len);
      for (int t = 0; t < tiles.tiles_per_head; ++t) {
        const Tile tile = tile_at(view, seq, tiles, t);
        std::vector<char> held(static_cast<std::size_t>(seq.seq_len), 0);
        for (int v = 0; v < tile.num_blocks; ++v) {
          const KeyRange keys = tile.keys_at(v);
          EXPECT_LE(0, keys.begin);
          EXPECT_LT(keys.begin, keys.end);
          EXPECT_LE(keys.end, seq.seq_len);
          EXPECT_EQ(keys.begin / tile.block_keys, (keys.end - 1) / tile.block_keys);
          for (int key = keys.begin; key < keys.end; ++key) EXPECT_EQ(held[key]++, 0);
        }
        for (int row = tile.first_row; row < tile.first_row + tile.num_rows; ++row) {
          const RowKeys keys = core::row_keys(planned.key.mask, seq, row / view.group);
          for (int key = 0; key < keys.prefix_end; ++key) EXPECT_TRUE(held[key]);
          for (int key = keys.begin; key < keys.end; ++key) EXPECT_TRUE(held[key]);
        }
      }
    }
  });
}

// Costs in closed form are the sums over the tiles, and the tile of a cost is found again.
TEST_P(ScheduleTest, CostsAreSumsOverTiles) {
  on_random_batches(GetParam(), [](const Planned& planned, const ScheduleView& view) {
    for (int s = 0; s < view.num_seqs; ++s) {
      const SeqMask seq = seq_mask(view, s);
      const SeqTiles tiles = seq_tiles(view, seq.query_len);
      const TileClass& cls = planned.limits.classes[tiles.tile_class];
      const HeadCost<false> costs(view, seq, tiles);
      std::int64_t sum = 0;
      for (int t = 0; t < tiles.tiles_per_head; ++t) {
        EXPECT_EQ(costs.before(t), sum) << "sequence " << s << " tile " << t;
        const std::int64_t cost = tile_cost(cls, tile_at(view, seq, tiles, t));
        EXPECT_EQ(costs.tile_at_cost(sum), t);
        EXPECT_EQ(costs.tile_at_cost(sum + cost - 1), t);
        sum += cost;
      }
      EXPECT_EQ(costs.before(tiles.tiles_per_head), sum);
      EXPECT_EQ(seq_work(view, seq).cost, sum * tiles.head_groups);
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Policies, ScheduleTest,
                         testing::Values(SchedulePolicy::kBalanced,
                                         SchedulePolicy::kBatchInvariant),
                         policy_name);

// No share costs more than its part and one tile that may not be cut, or the rounding of a cut.
TEST(Schedule, SharesAreBalanced) {
  on_random_batches(
      SchedulePolicy::kBalanced, [](const Planned& planned, const ScheduleView& view) {
        for (int c = 0; c < planned.limits.num_classes; ++c) {
          const TileClass& cls = planned.limits.classes[c];
          const std::int64_t line = planned.tables.cost_before[c][view.num_seqs] / cls.head_lanes;
          const std::int64_t share = line / shares_of(planned.limits, cls, line);
          const std::int64_t slack = std::max<std::int64_t>(
              share / cls.uncut_per_share, cls.tile_cost + 2 * cls.least_cut * cls.block_cost);
          for (int w = 0; w < cls.workers; ++w) {
            std::int64_t cost = 0;
            for_each_piece(view, c, w, [&](const Piece& piece) {
              cost += (piece.first() ? cls.tile_cost : 0) +
                      std::int64_t{piece.end_block - piece.begin_block} * cls.block_cost;
            });
            EXPECT_LE(cost, share + 2 * slack + 1);
          }
        }
      });
}

// kBatchInvariant: a sequence's pieces are the same alone and among others.
TEST(Schedule, InvariantPiecesDependOnTheSequenceAlone) {
  on_random_batches(SchedulePolicy::kBatchInvariant,
                    [](const Planned& planned, const ScheduleView& view) {
                      std::map<std::pair<int, int>, std::set<int>> cuts;
                      for (int c = 0; c < planned.limits.num_classes; ++c) {
                        for (int w = 0; w < planned.limits.classes[c].workers; ++w) {
                          for_each_piece(view, c, w, [&](const Piece& piece) {
                            cuts[{piece.seq, piece.tile_index}].insert(piece.begin_block);
                          });
                        }
                      }
                      for (const auto& [tile, begins] : cuts) {
                        const SeqMask seq = seq_mask(view, tile.first);
                        const SeqTiles tiles = seq_tiles(view, seq.query_len);
                        const InvariantCut cut = invariant_cut(view, tiles, seq);
                        const Tile whole = tile_at(view, seq, tiles, tile.second);
                        std::set<int> expected{0};
                        for (int v = 1; cut.ranges > 1 && v < whole.num_blocks; ++v) {
                          if (whole.block_at(v) / cut.blocks_per_range !=
                              whole.block_at(v - 1) / cut.blocks_per_range) {
                            expected.insert(v);
                          }
                        }
                        EXPECT_EQ(begins, expected);
                      }
                    });
}

// kBatchInvariant: a window that spans no more than the least L cuts nothing.
TEST(Schedule, TilesOfNarrowWindowsStayWhole) {
  int narrow = 0;
  int cut = 0;
  on_random_batches(SchedulePolicy::kBatchInvariant, [&](const Planned& planned,
                                                         const ScheduleView& view) {
    for (int c = 0; c < planned.limits.num_classes; ++c) {
      const TileClass& cls = planned.limits.classes[c];
      for (int w = 0; w < cls.workers; ++w) {
        for_each_piece(view, c, w, [&](const Piece& piece) {
          const SeqMask seq = seq_mask(view, piece.seq);
          const std::int64_t span = window_span(view.mask, seq.causal, seq.num_mm_ranges > 0, cls);
          if (span == 0) return;
          const bool whole = piece.first() && piece.last();
          if (span <= cls.invariant_least_keys) {
            ++narrow;
            EXPECT_TRUE(whole && piece.slot < 0);
          } else if (!whole) {
            ++cut;
          }
        });
      }
    }
  });
  EXPECT_GT(narrow, 0);
  EXPECT_GT(cut, 0);  // wider ones are
}

}  // namespace
}  // namespace diffkv::plan
