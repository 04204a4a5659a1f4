// Partials of cut tiles: each has a slot, and combine finds it, on random batches.
#include "plan/parts.h"

#include <gtest/gtest.h>

#include <map>
#include <set>
#include <utility>
#include <vector>

#include "diffkv/plan.h"
#include "plan/schedule.h"
#include "plan/walk.h"
#include "tests/plan/random_plan.h"

namespace diffkv::plan {
namespace {

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
    add(InvariantParts(view, CutSequence(view, first.seq).cut, first));
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

class PartsTest : public testing::TestWithParam<SchedulePolicy> {};

// Slots: whole tiles have none; cut ones have one a piece, in range, never shared, and
// for_each_cut_tile with for_each_partial finds exactly these in key order.
TEST_P(PartsTest, SlotsAreUniqueAndFoundAgain) {
  on_random_batches(GetParam(), [](const Planned& planned, const ScheduleView& view) {
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

// Of a batch-invariant plan each sequence says which slots its cut tiles have: those of the pieces
// that workers have.
TEST(Parts, OfSequencesAreThePieces) {
  int cut_tiles = 0;
  const auto check = [&](const Planned& planned, const ScheduleView& view) {
    std::map<std::pair<int, int>, std::set<int>> slots_of;
    for (int c = 0; c < planned.limits.num_classes; ++c) {
      for (int w = 0; w < planned.limits.classes[c].workers; ++w) {
        for_each_piece(view, c, w, [&](const Piece& piece) {
          if (piece.slot >= 0) slots_of[{piece.seq, piece.tile_index}].insert(piece.slot);
        });
      }
    }
    for (int s = 0; s < view.num_seqs; ++s) {
      const CutSequence seq(view, s);
      for (int t = 0; t < seq.num_tiles(); ++t) {
        const InvariantParts parts(view, seq.cut, seq.tile(view, t));
        if (parts.count <= 1) continue;
        ++cut_tiles;
        EXPECT_LE(parts.count, seq.cut.slots_per_tile);
        std::set<int> slots;
        for (int part = 0; part < parts.count; ++part) slots.insert(parts.slot(part));
        EXPECT_EQ(slots, (slots_of[{s, t}]));
        slots_of.erase({s, t});
      }
    }
    EXPECT_TRUE(slots_of.empty());
  };
  on_random_batches(SchedulePolicy::kBatchInvariant, check);
  EXPECT_GT(cut_tiles, 0);
}

INSTANTIATE_TEST_SUITE_P(Policies, PartsTest,
                         testing::Values(SchedulePolicy::kBalanced,
                                         SchedulePolicy::kBatchInvariant),
                         policy_name);

}  // namespace
}  // namespace diffkv::plan
