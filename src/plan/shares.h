// Where the shares of a class's line of work start: the arithmetic of the planners, host and
// device.
#pragma once

#include <cstdint>

#include "core/host_device.h"
#include "core/mask.h"
#include "diffkv/plan.h"
#include "plan/quotient.h"
#include "plan/schedule.h"

namespace diffkv::plan {

DIFFKV_HD inline std::int64_t tile_cost(const TileClass& cls, const Tile& tile) {
  return cls.tile_cost + static_cast<std::int64_t>(tile.num_blocks) * cls.block_cost;
}

// Sum of floor((first + step * i) / divisor) over i in [0, count), where terms below 0 count 0.
// O(log divisor), as Euclid's algorithm.
DIFFKV_HD inline std::int64_t floor_sum(std::int64_t count, std::int64_t divisor, std::int64_t step,
                                        std::int64_t first) {
  if (first < 0) {
    const std::int64_t skipped = quotient(-first + step - 1, step);
    count -= skipped;
    first += skipped * step;
  }
  std::int64_t sum = 0;
  while (count > 0) {
    const std::int64_t whole_step = quotient(step, divisor);
    const std::int64_t whole_first = quotient(first, divisor);
    sum += count * (count - 1) / 2 * whole_step + count * whole_first;
    step -= whole_step * divisor;
    first -= whole_first * divisor;
    const std::int64_t last = step * count + first;
    if (last < divisor) break;
    // Count the lattice points below the line from the other axis.
    count = quotient(last, divisor);
    first = last - count * divisor;
    const std::int64_t former = divisor;
    divisor = step;
    step = former;
  }
  return sum;
}

// Costs along one KV head of a sequence, or as many as a tile of its class spans.
class HeadCost {
 public:
  DIFFKV_HD HeadCost(const ScheduleView& view, const SeqMask& seq, const SeqTiles& tiles)
      : view_(view), seq_(seq), tiles_(tiles), cls_(view.limits.classes[tiles.tile_class]) {
    const Mask& mask = view.mask;
    closed_ = tiles.tiles_per_head >= kLeastClosed && seq.causal && seq.num_mm_ranges == 0 &&
              mask.chunk_size <= 0 && mask.prefix_window <= 0;
  }

  // Of its tiles [0, index).
  DIFFKV_HD std::int64_t before(std::int32_t index) const {
    std::int64_t cost = 0;
    std::int32_t t = 0;
    if (closed_) {
      // All tiles but the last are full; see tile_keys: they end at their last row's own key and
      // begin where their first row's window does.
      t = index < tiles_.tiles_per_head ? index : index - 1;
      const std::int64_t group = view_.group;
      const std::int64_t rows_per_block = group * cls_.block_keys;
      std::int64_t blocks =
          floor_sum(t, rows_per_block, cls_.tile_rows,
                    (seq_.context_len() + cls_.block_keys) * group + cls_.tile_rows - 1);
      if (view_.mask.window > 0) {
        blocks -= floor_sum(t, rows_per_block, cls_.tile_rows,
                            (seq_.context_len() - view_.mask.window + 1) * group);
      }
      cost = std::int64_t{t} * cls_.tile_cost + blocks * cls_.block_cost;
    }
    for (; t < index; ++t) cost += tile_cost(cls_, tile_at(view_, seq_, tiles_, t));
    return cost;
  }

  // The tile that the unit of cost `at` is in: the last with before(tile) <= at.
  DIFFKV_HD std::int32_t tile_at_cost(std::int64_t at) const {
    std::int32_t low = 0;
    if (closed_) {
      for (std::int32_t high = tiles_.tiles_per_head; high - low > 1;) {
        const std::int32_t middle = low + (high - low) / 2;
        (before(middle) <= at ? low : high) = middle;
      }
      return low;
    }
    while (low + 1 < tiles_.tiles_per_head) {
      at -= tile_cost(cls_, tile_at(view_, seq_, tiles_, low));
      if (at < 0) break;
      ++low;
    }
    return low;
  }

 private:
  static constexpr std::int32_t kLeastClosed = 8;  // tiles that are cheaper to sum one by one

  const ScheduleView& view_;
  const SeqMask& seq_;
  const SeqTiles& tiles_;
  const TileClass& cls_;
  bool closed_;
};

// What planning finds out of a sequence by itself.
struct SeqWork {
  std::int32_t tile_class = 0;
  std::int32_t slots = 0;  // kBatchInvariant: partials of its cut tiles
  std::int64_t cost = 0;   // of all its tiles
};

DIFFKV_HD inline SeqWork seq_work(const ScheduleView& view, std::int32_t seq_index) {
  const SeqMask seq = seq_mask(view, seq_index);
  const SeqTiles tiles = seq_tiles(view, seq.query_len);
  SeqWork work;
  work.tile_class = tiles.tile_class;
  work.cost = tiles.head_groups * HeadCost(view, seq, tiles).before(tiles.tiles_per_head);
  if (view.policy == SchedulePolicy::kBatchInvariant) {
    const InvariantCut cut = invariant_cut(view, tiles, seq);
    if (cut.ranges > 1) work.slots = cut.slots_per_tile * tiles.count();
  }
  return work;
}

// Where the share that starts `target` units of cost into a class's line of work starts. `share` is
// the cost of one worker's share. All lines of a class are alike.
DIFFKV_HD inline WorkStart locate(const ScheduleView& view, std::int32_t tile_class,
                                  std::int64_t target, std::int64_t share) {
  const TileClass& cls = view.limits.classes[tile_class];
  const std::int64_t* cost_before = view.tables.cost_before[tile_class];  // of all lines
  const std::int64_t all_lines = target * cls.head_lanes;
  if (all_lines >= cost_before[view.num_seqs]) return WorkStart{view.num_seqs, 0, 0};
  std::int32_t low = 0;  // the last sequence whose work starts at or below the target
  for (std::int32_t high = view.num_seqs; high - low > 1;) {
    const std::int32_t middle = low + (high - low) / 2;
    (cost_before[middle] <= all_lines ? low : high) = middle;
  }
  const SeqMask seq = seq_mask(view, low);
  const SeqTiles tiles = seq_tiles(view, seq.query_len);
  const std::int64_t per_head =
      quotient(cost_before[low + 1] - cost_before[low], tiles.head_groups);
  std::int64_t rest = target - quotient(cost_before[low], cls.head_lanes);
  const std::int32_t head = static_cast<std::int32_t>(quotient(rest, per_head));
  rest -= head * per_head;
  const HeadCost costs(view, seq, tiles);
  const std::int32_t index = costs.tile_at_cost(rest);
  rest -= costs.before(index);
  WorkStart at{low, head * tiles.tiles_per_head + index, 0};
  const Tile tile = tile_at(view, seq, tiles, at.tile);
  const InvariantCut cut = invariant_cut(view, tiles, seq);
  const bool invariant = view.policy == SchedulePolicy::kBatchInvariant;
  const bool may_cut = tile_cost(cls, tile) * cls.uncut_per_share > share &&
                       (invariant ? cut.ranges > 1 : tile.num_blocks >= 2 * cls.least_cut);
  if (!may_cut) {
    at.block = 2 * rest >= tile_cost(cls, tile) ? tile.num_blocks : 0;
  } else {
    const std::int64_t past = rest - cls.tile_cost;
    at.block = past <= 0
                   ? 0
                   : static_cast<std::int32_t>(quotient(past + cls.block_cost / 2, cls.block_cost));
    if (invariant && at.block > 0 && at.block < tile.num_blocks) {
      const std::int32_t range = tile.block_at(at.block) / cut.blocks_per_range;
      const std::int32_t below = tile.blocks_below(range * cut.blocks_per_range);
      const std::int32_t above = invariant_piece_end(cut, tile, at.block);
      at.block = at.block - below < above - at.block ? below : above;
    }
    if (!invariant && at.block < cls.least_cut) at.block = 0;
    if (!invariant && tile.num_blocks - at.block < cls.least_cut) at.block = tile.num_blocks;
  }
  if (at.block >= tile.num_blocks && (at.block > 0 || 2 * rest >= tile_cost(cls, tile))) {
    at = WorkStart{at.seq, at.tile + 1, 0};
    const std::int32_t in_line = tiles.count() / cls.head_lanes;
    if (at.tile == in_line) at = WorkStart{at.seq + 1, 0, 0};
  }
  return at;
}

// Shares that a line of work is cut into at most.
DIFFKV_HD inline std::int32_t num_shares(const TileClass& cls) {
  return cls.workers / cls.head_lanes;
}

// Shares that a line of so much work is cut into; the others are empty.
DIFFKV_HD inline std::int64_t shares_of(const ScheduleLimits& limits, const TileClass& cls,
                                        std::int64_t cost) {
  const std::int64_t most = num_shares(cls);
  if (cls.least_share_cost == 0) return most;
  const std::int64_t least = quotient(limits.threads + cls.head_lanes - 1, cls.head_lanes);
  const std::int64_t wanted = quotient(cost, cls.least_share_cost);
  const std::int64_t shares = wanted > least ? wanted : least;
  return shares < most ? shares : most;
}

// Where a line's share starts, once cost_before is filled.
DIFFKV_HD inline WorkStart share_start(const ScheduleView& view, std::int32_t tile_class,
                                       std::int32_t index) {
  const TileClass& cls = view.limits.classes[tile_class];
  const std::int64_t total =
      quotient(view.tables.cost_before[tile_class][view.num_seqs], cls.head_lanes);
  const std::int64_t shares = shares_of(view.limits, cls, total);
  const std::int64_t share = quotient(total, shares);
  // total / shares * index without overflow.
  const std::int64_t target = share * index + quotient((total - share * shares) * index, shares);
  return locate(view, tile_class, target, share);
}

}  // namespace diffkv::plan
