// The plan of random batches against brute force: each visible key of each row once, every row
// once, slots unique, shares even.
#include <gtest/gtest.h>
#include <omp.h>

#include <algorithm>
#include <cstddef>
#include <map>
#include <numeric>
#include <set>
#include <tuple>

#include "problem.h"

namespace diffkv::properties {
namespace {

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

// A plan and what it points to.
class Planned {
 public:
  Planned(const Backend& backend, const Problem& problem)
      : tensors(problem, all_seqs(problem)),
        workspace_(at(workspace_bytes(backend, problem.key, tensors.maxima)) + kAlignment) {
    auto address = reinterpret_cast<std::uintptr_t>(workspace_.data());
    address = (address + kAlignment - 1) / kAlignment * kAlignment;
    plan = make_plan(backend, problem.key, tensors.maxima, tensors.batch,
                     TensorView(reinterpret_cast<void*>(address), DType::kU8,
                                {static_cast<std::int64_t>(workspace_.size() - kAlignment)}));
    items = plan.work_items(tensors.batch);
  }

  BatchTensors tensors;
  Plan plan;
  std::vector<WorkItem> items;

 private:
  static constexpr std::size_t kAlignment = 64;
  std::vector<std::byte> workspace_;
};

// A problem for planning only: no numbers, so lengths may be larger.
Problem plan_problem(Rng& rng) {
  Problem problem = random_problem(rng, {.scores = false, .sinks = false});
  PlanKey& key = problem.key;
  key.policy = chance(rng, 0.5) ? SchedulePolicy::kBatchInvariant : SchedulePolicy::kBalanced;
  Mask& mask = key.mask;
  if (chance(rng, 0.3)) {
    mask.window *= 10;
    mask.chunk_size *= 10;
    mask.prefix_window *= 10;
  }
  PlanKey no_numbers = key;
  no_numbers.num_heads = no_numbers.num_kv_heads = 0;
  problem.seqs.clear();
  const std::int64_t num_seqs = uniform(rng, 0, 8);
  for (std::int64_t s = 0; s < num_seqs; ++s) {
    const auto query_len = pick<std::int32_t>(rng, {0, 1, 1, 1, 2, 3, 8, 33, 100, 300});
    auto seq_len = query_len + static_cast<std::int32_t>(uniform(rng, 0, 300));
    if (chance(rng, 0.3)) seq_len += static_cast<std::int32_t>(uniform(rng, 0, 20000));
    if (chance(rng, 0.1)) seq_len = static_cast<std::int32_t>(uniform(rng, 0, query_len));
    if (query_len > 8) seq_len = std::min(seq_len, 3000);
    problem.seqs.push_back(random_seq(rng, no_numbers, query_len, seq_len));
    if (chance(rng, 0.3)) {
      problem.seqs.back().prefix_len = static_cast<std::int32_t>(uniform(rng, 0, 5000));
    }
  }
  return problem;
}

// Calls body(problem, planned) on plans for several numbers of workers.
template <class Body>
void for_plans(int rounds, Body body) {
  const int before = omp_get_max_threads();
  for_random(rounds, [&](const Backend& backend, Rng& rng) {
    omp_set_num_threads(static_cast<int>(uniform(rng, 1, 24)));
    const Problem problem = plan_problem(rng);
    SCOPED_TRACE(describe(problem));
    body(problem, Planned(backend, problem));
  });
  omp_set_num_threads(before);
}

// Pieces by tile.
using TileId = std::tuple<std::int32_t, std::int32_t, std::int32_t>;  // seq, kv_head, first_row
std::map<TileId, std::vector<WorkItem>> by_tile(const std::vector<WorkItem>& items) {
  std::map<TileId, std::vector<WorkItem>> tiles;
  for (const WorkItem& item : items) {
    tiles[{item.seq, item.kv_head, item.first_row}].push_back(item);
  }
  return tiles;
}

TEST(PlanProperties, EveryRowIsInExactlyOneTile) {
  for_plans(300, [](const Problem& problem, const Planned& planned) {
    std::vector<std::vector<int>> tiles_of_row;
    for (const Seq& seq : problem.seqs) {
      tiles_of_row.emplace_back(at(seq.query_len * problem.key.num_heads), 0);
    }
    for (const auto& [id, pieces] : by_tile(planned.items)) {
      const auto& [seq, kv_head, first_row] = id;
      const std::int64_t rows = problem.seqs[at(seq)].query_len * problem.key.group();
      const std::int64_t heads = pieces.front().num_kv_heads;
      ASSERT_TRUE(kv_head >= 0 && heads > 0 && kv_head + heads <= problem.key.num_kv_heads);
      ASSERT_TRUE(first_row >= 0 && first_row + pieces.front().num_rows <= rows);
      for (const WorkItem& piece : pieces) {
        ASSERT_EQ(piece.num_rows, pieces.front().num_rows);
        ASSERT_EQ(piece.num_kv_heads, heads);
        ASSERT_EQ(piece.tile_class, pieces.front().tile_class);
      }
      for (std::int64_t r = 0; r < pieces.front().num_rows; ++r) {
        for (std::int64_t h = 0; h < heads; ++h) {
          ++tiles_of_row[at(seq)][at((kv_head + h) * rows + first_row + r)];
        }
      }
    }
    for (const std::vector<int>& rows : tiles_of_row) {
      for (const int count : rows) ASSERT_EQ(count, 1);
    }
  });
}

TEST(PlanProperties, EveryVisibleKeyIsReadExactlyOnce) {
  for_plans(150, [](const Problem& problem, const Planned& planned) {
    for (const auto& [id, pieces] : by_tile(planned.items)) {
      const Seq& seq = problem.seqs[at(std::get<0>(id))];
      std::vector<int> reads(at(seq.seq_len), 0);
      for (const WorkItem& piece : pieces) {
        for (const KeyRange& keys : piece.keys) {
          if (keys.begin >= keys.end) continue;
          ASSERT_TRUE(keys.begin >= 0 && keys.end <= seq.seq_len)
              << "[" << keys.begin << ", " << keys.end << ") of " << seq.seq_len;
          for (std::int32_t j = keys.begin; j < keys.end; ++j) ++reads[at(j)];
        }
      }
      // Keys that no row sees may be read, but no key twice.
      for (std::size_t j = 0; j < reads.size(); ++j) {
        ASSERT_LE(reads[j], 1) << "key " << j << " of sequence " << std::get<0>(id);
      }
      const std::int64_t group = problem.key.group();
      const std::int64_t first = std::get<2>(id) / group;
      const std::int64_t last = (std::get<2>(id) + pieces.front().num_rows - 1) / group;
      for (std::int64_t i = first; i <= last; ++i) {
        for (std::int64_t j = 0; j < seq.seq_len; ++j) {
          if (!sees(problem.key, seq, i, j)) continue;
          ASSERT_EQ(reads[at(j)], 1)
              << "key " << j << ", query " << i << " of sequence " << std::get<0>(id);
        }
      }
    }
  });
}

TEST(PlanProperties, SlotsAreUniqueInRangeAndOnlyOfCutTiles) {
  for_plans(300, [](const Problem&, const Planned& planned) {
    std::set<std::int32_t> slots;
    for (const auto& [id, pieces] : by_tile(planned.items)) {
      for (const WorkItem& piece : pieces) {
        ASSERT_EQ(piece.slot >= 0, pieces.size() > 1) << "of " << pieces.size() << " pieces";
        if (piece.slot < 0) continue;
        ASSERT_LT(piece.slot, planned.plan.tables().num_slots);
        ASSERT_TRUE(slots.insert(piece.slot).second) << "slot " << piece.slot << " twice";
      }
    }
  });
}

TEST(PlanProperties, ClassFollowsFromTheSequenceAlone) {
  for_plans(300, [](const Problem& problem, const Planned& planned) {
    const ScheduleLimits& limits = planned.plan.limits();
    for (const WorkItem& item : planned.items) {
      const std::int64_t rows = problem.seqs[at(item.seq)].query_len * problem.key.group();
      std::int32_t expected = 0;
      while (expected + 1 < limits.num_classes &&
             rows > limits.classes[at(expected)].max_seq_rows) {
        ++expected;
      }
      ASSERT_EQ(item.tile_class, expected);
      ASSERT_LE(item.num_rows, limits.classes[at(expected)].tile_rows);
      ASSERT_GE(item.num_rows, 1);
      ASSERT_TRUE(item.worker >= 0 && item.worker < limits.classes[at(expected)].workers);
    }
  });
}

std::int64_t blocks_of(const TileClass& cls, const WorkItem& item) {
  std::int64_t blocks = 0;
  for (const KeyRange& keys : item.keys) {
    if (keys.begin >= keys.end) continue;
    blocks += (keys.end + cls.block_keys - 1) / cls.block_keys - keys.begin / cls.block_keys;
  }
  return blocks;
}

// No worker has more than the mean and one thing that could not be cut: a cheap tile, or the least
// pieces. With kBatchInvariant that is a piece between two fixed cuts.
TEST(PlanProperties, SharesAreEven) {
  for_plans(300, [](const Problem& problem, const Planned& planned) {
    const ScheduleLimits& limits = planned.plan.limits();
    for (std::int32_t c = 0; c < limits.num_classes; ++c) {
      const TileClass& cls = limits.classes[at(c)];
      std::vector<std::int64_t> cost(at(cls.workers), 0);
      std::int64_t total = 0;
      std::int64_t largest = 0;
      // A tile's fixed cost is counted once on the line, and once by each worker that has a part.
      std::set<std::tuple<std::int32_t, std::int32_t, std::int32_t>> tiles;
      std::set<std::tuple<std::int32_t, std::int32_t, std::int32_t, std::int32_t>> parts;
      for (const WorkItem& item : planned.items) {
        if (item.tile_class != c) continue;
        const std::int64_t blocks = blocks_of(cls, item) * cls.block_cost;
        if (tiles.emplace(item.seq, item.kv_head, item.first_row).second) total += cls.tile_cost;
        if (parts.emplace(item.worker, item.seq, item.kv_head, item.first_row).second) {
          cost[at(item.worker)] += cls.tile_cost;
        }
        cost[at(item.worker)] += blocks;
        total += blocks;
        largest = std::max(largest, cls.tile_cost + blocks);
      }
      std::int64_t shares = cls.workers;
      if (cls.least_share_cost > 0) {
        shares = std::clamp<std::int64_t>(total / cls.least_share_cost,
                                          std::min(limits.threads, cls.workers), cls.workers);
      }
      const std::int64_t share = total / shares + 1;
      const std::int64_t least = cls.tile_cost + 2 * cls.least_cut * cls.block_cost;
      const std::int64_t uncut = problem.key.policy == SchedulePolicy::kBatchInvariant
                                     ? largest
                                     : std::max<std::int64_t>(share / cls.uncut_per_share, least);
      const std::int64_t most = *std::max_element(cost.begin(), cost.end());
      EXPECT_LE(most, share + uncut + cls.tile_cost)
          << "class " << c << ", " << cls.workers << " workers, total " << total;
    }
  });
}

}  // namespace
}  // namespace diffkv::properties
