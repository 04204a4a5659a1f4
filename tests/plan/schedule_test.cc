// The schedule against brute force: blocks, shares, pieces, slots, on random batches.
#include "plan/schedule.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "core/mask.h"
#include "diffkv/backend.h"
#include "diffkv/plan.h"
#include "plan/classes.h"
#include "plan/host_plan.h"
#include "plan/parts.h"
#include "plan/shares.h"
#include "plan/walk.h"

namespace diffkv::plan {
namespace {

constexpr int kRandomBatches = 200;

int uniform(std::mt19937& rng, int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(rng);
}

// A batch, limits of small tiles and blocks, and plan tables big enough for them.
struct Planned {
  PlanKey key;
  ScheduleLimits limits;
  std::vector<std::int32_t> query_start_loc{0};
  std::vector<std::int32_t> seq_lens;
  std::vector<std::int32_t> prefix_lens;
  std::vector<std::int32_t> mm_ranges;
  std::vector<std::uint8_t> causal;
  Batch batch;
  std::vector<std::int32_t> loc_copy, len_copy, slot_before;
  std::vector<std::int64_t> cost_before[kMaxTileClasses];
  std::vector<WorkStart> starts[kMaxTileClasses];
  std::vector<detail::FirstPiece> first_pieces[kMaxTileClasses];
  std::vector<std::uint64_t> arrivals[kMaxTileClasses];
  std::vector<std::int32_t> cut_pieces[kMaxTileClasses];
  PlanTables tables;

  explicit Planned(std::mt19937& rng, SchedulePolicy policy) {
    key.num_kv_heads = uniform(rng, 1, 4);
    key.num_heads = key.num_kv_heads * uniform(rng, 1, 5);
    key.head_size_qk = key.head_size_v = 8;
    key.policy = policy;
    key.mask.causal = uniform(rng, 0, 3) != 0;
    const int kind = uniform(rng, 0, 3);
    if (kind == 1) key.mask.window = uniform(rng, 1, 40);
    if (kind == 2) {
      key.mask.chunk_size = uniform(rng, 1, 50);
      key.mask.chunk_lookback = uniform(rng, 0, 2);
    }
    if (kind == 3) key.mask.prefix_window = uniform(rng, 1, 40);
    key.causal_per_seq = uniform(rng, 0, 3) == 0;
    key.mm_ranges = uniform(rng, 0, 2) == 0;
    key.mask.clamp_mm_ranges = key.mm_ranges && uniform(rng, 0, 1) == 0;
    if (key.mask.clamp_mm_ranges) key.mask.window = uniform(rng, 1, 20);

    const int num_seqs = uniform(rng, 0, 6);
    for (int s = 0; s < num_seqs; ++s) {
      const int query_len = uniform(rng, 0, 3) == 0 ? uniform(rng, 0, 90) : uniform(rng, 0, 3);
      // Short ones have fewer blocks than workers.
      constexpr int kLongest[] = {5, 90, 9000, 9000, 9000};
      const int seq_len = uniform(rng, 0, kLongest[uniform(rng, 0, 4)]);
      query_start_loc.push_back(query_start_loc.back() + query_len);
      seq_lens.push_back(seq_len);
      prefix_lens.push_back(uniform(rng, 0, seq_len + 5));
      causal.push_back(static_cast<std::uint8_t>(uniform(rng, 0, 1)));
      const int first = uniform(rng, 0, seq_len + 1);
      const int middle = first + uniform(rng, 0, 30);
      for (int x : {first, middle, middle + 1, middle + uniform(rng, 0, 30)}) {
        mm_ranges.push_back(x);
      }
    }
    batch.num_seqs = num_seqs;
    batch.num_actual_tokens = query_start_loc.back();
    batch.query_start_loc = view_of(std::as_const(query_start_loc).data(), {num_seqs + 1});
    batch.seq_lens = view_of(std::as_const(seq_lens).data(), {num_seqs});
    if (key.mask.prefix_window > 0) {
      batch.prefix_lens = view_of(std::as_const(prefix_lens).data(), {num_seqs});
    }
    if (key.mm_ranges) {
      batch.mm_ranges = view_of(std::as_const(mm_ranges).data(), {num_seqs, 2, 2});
    }
    if (key.causal_per_seq) {
      batch.causal_per_seq = ConstTensorView(causal.data(), DType::kBool, {num_seqs});
    }

    limits.num_classes = uniform(rng, 1, 2);
    limits.threads = uniform(rng, 1, 3);
    for (int c = 0; c < limits.num_classes; ++c) {
      TileClass& cls = limits.classes[c];
      cls.tile_rows = c == 0 ? 4 : 12;
      cls.max_seq_rows = 4;
      cls.block_keys = 16;
      const auto divisor = [&](std::int64_t of) {
        const int n = static_cast<int>(of);
        return uniform(rng, 0, 1) == 0 ? n : n % 2 == 0 ? 2 : 1;
      };
      cls.tile_heads = divisor(key.num_kv_heads);
      cls.head_lanes = divisor(key.num_kv_heads / cls.tile_heads);
      cls.workers = cls.head_lanes * uniform(rng, 1, 5);
      cls.tile_cost = uniform(rng, 1, 20);
      cls.block_cost = uniform(rng, 1, 10);
      cls.least_cut = uniform(rng, 1, 4);
      cls.uncut_per_share = 16;
      cls.least_share_cost = uniform(rng, 0, 1) == 0 ? 0 : uniform(rng, 1, 2000);
      cls.invariant_max_tiles = 3;
      cls.invariant_max_pieces = 4;
      cls.invariant_least_keys = 1024 << uniform(rng, 0, 1);
    }
    // Some queries are longer than the batch says.
    if (uniform(rng, 0, 1) == 0) batch.max_query_len = uniform(rng, 1, 6);
    limits = bounded(limits, key, batch);
    loc_copy.resize(query_start_loc.size());
    len_copy.resize(seq_lens.size() + 1);
    slot_before.resize(query_start_loc.size());
    tables.query_start_loc = loc_copy.data();
    tables.seq_lens = len_copy.data();
    if (policy == SchedulePolicy::kBatchInvariant) tables.slot_before = slot_before.data();
    for (int c = 0; c < limits.num_classes; ++c) {
      cost_before[c].resize(query_start_loc.size());
      starts[c].resize(static_cast<std::size_t>(limits.classes[c].workers) + 1);
      tables.cost_before[c] = cost_before[c].data();
      tables.starts[c] = starts[c].data();
      first_pieces[c].resize(static_cast<std::size_t>(limits.classes[c].workers));
      tables.first_pieces[c] = first_pieces[c].data();
      arrivals[c].resize(static_cast<std::size_t>(limits.classes[c].workers));
      tables.arrivals[c] = arrivals[c].data();
      cut_pieces[c].resize(static_cast<std::size_t>(limits.classes[c].workers));
      tables.cut_pieces[c] = cut_pieces[c].data();
      tables.first_slot[c] = tables.num_slots;
      tables.num_slots += 2 * limits.classes[c].workers;
    }
    plan_on_host(key, limits, batch, tables);
    if (policy == SchedulePolicy::kBatchInvariant) {
      // Each class numbers its slots from its own start on.
      tables.num_slots = 0;
      const ScheduleView counted = view();
      for (int c = 0; c < limits.num_classes; ++c) {
        tables.first_slot[c] = tables.num_slots;
        for (int s = 0; s < num_seqs; ++s) {
          const SeqMask seq = seq_mask(counted, s);
          const SeqTiles tiles = seq_tiles(counted, seq.query_len);
          if (tiles.tile_class != c) continue;
          const InvariantCut cut = invariant_cut(counted, tiles, seq);
          if (cut.ranges <= 1) continue;
          tables.num_slots += cut.slots_per_tile * tiles.count();
        }
      }
      plan_on_host(key, limits, batch, tables);
    }
  }

  ScheduleView view() const { return schedule_view(key, limits, tables, batch); }
};

// The slots of a cut tile's parts by number.
std::vector<int> numbered_parts(const ScheduleView& view, int tile_class, int worker,
                                const Piece& first) {
  std::vector<int> slots;
  const auto add = [&](const auto& parts) {
    for (int part = 0; part < parts.count; ++part) {
      if (parts.slot(part) != kNoSlot) slots.push_back(parts.slot(part));
    }
  };
  if (view.policy == SchedulePolicy::kBatchInvariant) {
    const SeqMask seq = seq_mask(view, first.seq);
    add(InvariantParts(view, invariant_cut(view, seq_tiles(view, seq.query_len), seq), first));
    return slots;
  }
  const Lane lane = lane_of(view, tile_class, worker);
  const WorkStart* starts = view.tables.starts[tile_class];
  const WorkStart tile{first.seq, first.line_index, 0};
  int count = 1;
  while (lane.share + count < lane.shares && starts_inside(starts[lane.share + count], tile)) {
    ++count;
  }
  add(BalancedParts{starts, lane, view.tables.first_slot[tile_class], lane.share, count});
  return slots;
}

class ScheduleTest : public testing::TestWithParam<SchedulePolicy> {
 protected:
  template <class Fn>
  void on_random_batches(Fn&& fn) {
    for (int seed = 0; seed < kRandomBatches; ++seed) {
      SCOPED_TRACE("seed " + std::to_string(seed));
      std::mt19937 rng(static_cast<unsigned>(seed));
      const Planned planned(rng, GetParam());
      fn(planned, planned.view());
      if (HasFailure()) return;
    }
  }
};

// Every tile of every sequence is walked exactly once, block by block, in key order.
TEST_P(ScheduleTest, WalksEveryBlockOnce) {
  on_random_batches([](const Planned& planned, const ScheduleView& view) {
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
  on_random_batches([](const Planned& planned, const ScheduleView& view) {
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
  on_random_batches([](const Planned& planned, const ScheduleView& view) {
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

// Slots: whole tiles have none; cut ones have one a piece, in range, never shared, and
// for_each_cut_tile with for_each_partial finds exactly these in key order.
TEST_P(ScheduleTest, SlotsAreUniqueAndFoundAgain) {
  on_random_batches([](const Planned& planned, const ScheduleView& view) {
    std::set<int> used;
    std::map<std::pair<int, int>, std::vector<int>> slots_of;
    std::map<std::pair<int, int>, std::vector<int>> found;
    for (int c = 0; c < planned.limits.num_classes; ++c) {
      for (int w = 0; w < planned.limits.classes[c].workers; ++w) {
        for_each_piece(view, c, w, [&](const Piece& piece) {
          const auto tile = std::make_pair(piece.seq, piece.tile_index);
          EXPECT_EQ(piece.slot < 0, piece.first() && piece.last());
          if (piece.slot < 0) return;
          EXPECT_LT(piece.slot, planned.tables.num_slots);
          EXPECT_TRUE(used.insert(piece.slot).second) << "slot " << piece.slot;
          slots_of[tile].push_back(piece.slot);
        });
        for_each_cut_tile(view, c, w, [&](const Piece& piece) {
          const auto tile = std::make_pair(piece.seq, piece.tile_index);
          EXPECT_TRUE(piece.first() && !piece.last());
          EXPECT_EQ(found.count(tile), 0U);
          for_each_partial(view, c, w, piece, [&](int slot) { found[tile].push_back(slot); });
          EXPECT_EQ(numbered_parts(view, c, w, piece), found[tile]);
        });
      }
    }
    EXPECT_EQ(slots_of, found);
  });
}

// Of a batch-invariant plan for_each_cut_run finds the same pieces as for_each_piece, those of a
// share and tile together, and part_of numbers them as slot() does.
TEST(Schedule, RunsOfCutTilesAreThePieces) {
  int runs = 0;
  for (unsigned seed = 0; seed < kRandomBatches; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937 rng(seed);
    const Planned planned(rng, SchedulePolicy::kBatchInvariant);
    const ScheduleView view = planned.view();
    for (int c = 0; c < planned.limits.num_classes; ++c) {
      for (int w = 0; w < planned.limits.classes[c].workers; ++w) {
        std::vector<int> slots;
        for_each_piece(view, c, w, [&](const Piece& piece) {
          if (piece.slot >= 0) slots.push_back(piece.slot);
        });
        std::vector<int> found;
        for_each_cut_run(view, c, w, [&](const Piece& run) {
          ++runs;
          const SeqMask seq = seq_mask(view, run.seq);
          const InvariantCut cut = invariant_cut(view, seq_tiles(view, seq.query_len), seq);
          const InvariantParts parts(view, cut, run);
          const int first = parts.part_of(cut, run.tile, run.begin_block);
          const int last = parts.part_of(cut, run.tile, run.end_block - 1);
          EXPECT_GT(parts.count, 1);
          EXPECT_LT(last, parts.count);
          for (int part = first; part <= last; ++part) found.push_back(parts.slot(part));
        });
        EXPECT_EQ(found, slots);
      }
    }
    if (HasFailure()) return;
  }
  EXPECT_GT(runs, 0);
}

// Costs in closed form are the sums over the tiles, and the tile of a cost is found again.
TEST_P(ScheduleTest, CostsAreSumsOverTiles) {
  on_random_batches([](const Planned& planned, const ScheduleView& view) {
    for (int s = 0; s < view.num_seqs; ++s) {
      const SeqMask seq = seq_mask(view, s);
      const SeqTiles tiles = seq_tiles(view, seq.query_len);
      const TileClass& cls = planned.limits.classes[tiles.tile_class];
      const HeadCost costs(view, seq, tiles);
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
                         [](const auto& policy) {
                           return policy.param == SchedulePolicy::kBalanced ? "Balanced"
                                                                            : "BatchInvariant";
                         });

// No share costs more than its part and one tile that may not be cut, or the rounding of a cut.
TEST(Schedule, SharesAreBalanced) {
  for (int seed = 0; seed < kRandomBatches; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937 rng(static_cast<unsigned>(seed));
    const Planned planned(rng, SchedulePolicy::kBalanced);
    const ScheduleView view = planned.view();
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
  }
}

// kBatchInvariant: a sequence's pieces are the same alone and among others.
TEST(Schedule, InvariantPiecesDependOnTheSequenceAlone) {
  for (int seed = 0; seed < kRandomBatches; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937 rng(static_cast<unsigned>(seed));
    const Planned planned(rng, SchedulePolicy::kBatchInvariant);
    const ScheduleView view = planned.view();
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
  }
}

}  // namespace
}  // namespace diffkv::plan
