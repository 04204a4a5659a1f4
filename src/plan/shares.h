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
DIFFKV_HD_APART inline std::int64_t floor_sum(std::int64_t count, std::int64_t divisor,
                                              std::int64_t step, std::int64_t first) {
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

// Costs along one KV head of a sequence, or as many as a tile of its class spans. What most
// sequences need is short; the rest is apart.
class HeadCost {
 public:
  DIFFKV_HD HeadCost(const ScheduleView& view, const SeqMask& seq, const SeqTiles& tiles)
      : view_(view), seq_(seq), tiles_(tiles) {
    const Mask& mask = view.mask;
    const bool plain =
        seq.causal && seq.num_mm_ranges == 0 && mask.chunk_size <= 0 && mask.prefix_window <= 0;
    closed_ = plain && tiles.tiles_per_head >= kLeastClosed;
    single_ = plain && tiles.tiles_per_head == 1;
  }

  // Of its tiles [0, index).
  DIFFKV_HD std::int64_t before(std::int32_t index) const {
    if (index == 0) return 0;
    return single_ ? single_cost() : sum_before(view_, seq_, tiles_, closed_, index);
  }

  // The tile that the unit of cost `at` is in: the last with before(tile) <= at.
  DIFFKV_HD std::int32_t tile_at_cost(std::int64_t at) const {
    return tiles_.tiles_per_head <= 1 ? 0 : search(view_, seq_, tiles_, closed_, at);
  }

 private:
  static constexpr std::int32_t kLeastClosed = 8;  // tiles that are cheaper to sum one by one

  // Of the only tile, which ends with the sequence.
  DIFFKV_HD std::int64_t single_cost() const {
    const TileClass& cls = view_.limits.classes[tiles_.tile_class];
    std::int32_t first_block = 0;
    if (view_.mask.window > 0) {
      const std::int64_t begin = seq_.context_len() - view_.mask.window + 1;
      if (begin > 0) first_block = divide(static_cast<std::int32_t>(begin), cls.block_keys);
    }
    const std::int32_t end_block = divide(seq_.seq_len + cls.block_keys - 1, cls.block_keys);
    return cls.tile_cost + static_cast<std::int64_t>(end_block - first_block) * cls.block_cost;
  }

  DIFFKV_HD_APART static std::int64_t sum_before(const ScheduleView& view, SeqMask seq,
                                                 SeqTiles tiles, bool closed, std::int32_t index) {
    const TileClass& cls = view.limits.classes[tiles.tile_class];
    std::int64_t cost = 0;
    std::int32_t t = 0;
    if (closed) {
      // All tiles but the last are full; see tile_keys: they end at their last row's own key and
      // begin where their first row's window does.
      t = index < tiles.tiles_per_head ? index : index - 1;
      const std::int64_t group = view.group;
      const std::int64_t rows_per_block = group * cls.block_keys;
      std::int64_t blocks =
          floor_sum(t, rows_per_block, cls.tile_rows,
                    (seq.context_len() + cls.block_keys) * group + cls.tile_rows - 1);
      if (view.mask.window > 0) {
        blocks -= floor_sum(t, rows_per_block, cls.tile_rows,
                            (seq.context_len() - view.mask.window + 1) * group);
      }
      cost = std::int64_t{t} * cls.tile_cost + blocks * cls.block_cost;
    }
    for (; t < index; ++t) cost += tile_cost(cls, tile_at(view, seq, tiles, t));
    return cost;
  }

  DIFFKV_HD_APART static std::int32_t search(const ScheduleView& view, SeqMask seq, SeqTiles tiles,
                                             bool closed, std::int64_t at) {
    std::int32_t low = 0;
    if (closed) {
      for (std::int32_t high = tiles.tiles_per_head; high - low > 1;) {
        const std::int32_t middle = low + (high - low) / 2;
        (sum_before(view, seq, tiles, closed, middle) <= at ? low : high) = middle;
      }
      return low;
    }
    const TileClass& cls = view.limits.classes[tiles.tile_class];
    while (low + 1 < tiles.tiles_per_head) {
      at -= tile_cost(cls, tile_at(view, seq, tiles, low));
      if (at < 0) break;
      ++low;
    }
    return low;
  }

  const ScheduleView& view_;
  const SeqMask& seq_;
  const SeqTiles& tiles_;
  bool closed_;
  bool single_;
};

// What planning finds out of a sequence by itself.
struct SeqWork {
  std::int32_t tile_class = 0;
  std::int32_t slots = 0;  // kBatchInvariant: partials of its cut tiles
  std::int64_t cost = 0;   // of all its tiles
};

DIFFKV_HD inline SeqWork seq_work(const ScheduleView& view, const SeqMask& seq) {
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

// Where a class's line of work is cut: share i starts where i shares of equal cost end. All lines
// of a class are alike.
struct LineCuts {
  std::int64_t total = 0;  // cost of one line
  std::int64_t shares = 1;
  std::int64_t share = 0;  // cost of one

  DIFFKV_HD LineCuts(const ScheduleLimits& limits, const TileClass& cls, std::int64_t all_lines)
      : total(quotient(all_lines, cls.head_lanes)), shares(shares_of(limits, cls, total)) {
    share = quotient(total, shares);
  }

  // total / shares * index without overflow.
  DIFFKV_HD std::int64_t target(std::int32_t index) const {
    return share * index + quotient((total - share * shares) * index, shares);
  }
};

// A sequence on the line of its class: costs are of all lines.
struct SeqOnLine {
  std::int32_t seq = 0;
  SeqMask mask;
  std::int64_t before = 0;  // of the sequences before it
  std::int64_t cost = 0;    // its own
};

// Where the share that starts `target` units of cost into a line starts, which is in that sequence.
DIFFKV_HD inline WorkStart start_in(const ScheduleView& view, std::int32_t tile_class,
                                    const SeqOnLine& place, std::int64_t target,
                                    std::int64_t share) {
  const TileClass& cls = view.limits.classes[tile_class];
  const SeqMask& seq = place.mask;
  const SeqTiles tiles = seq_tiles(view, seq.query_len);
  const std::int64_t per_head = quotient(place.cost, tiles.head_groups);
  std::int64_t rest = target - quotient(place.before, cls.head_lanes);
  const std::int32_t head = static_cast<std::int32_t>(quotient(rest, per_head));
  rest -= head * per_head;
  const HeadCost costs(view, seq, tiles);
  const std::int32_t index = costs.tile_at_cost(rest);
  rest -= costs.before(index);
  WorkStart at{place.seq, head * tiles.tiles_per_head + index, 0};
  const Tile tile = tile_at(view, seq, tiles, at.tile);
  const InvariantCut cut = invariant_cut(view, tiles, seq);
  const bool invariant = view.policy == SchedulePolicy::kBatchInvariant;
  // For a piece of a cut tile: fewer than least_cut, and less than half of a share.
  const auto too_few = [&](std::int64_t blocks) {
    return blocks < cls.least_cut && 2 * blocks * cls.block_cost < share;
  };
  const bool may_cut = tile_cost(cls, tile) * cls.uncut_per_share > share &&
                       (invariant ? cut.ranges > 1 : !too_few(tile.num_blocks / 2));
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
    if (!invariant && too_few(at.block)) at.block = 0;
    if (!invariant && too_few(tile.num_blocks - at.block)) at.block = tile.num_blocks;
  }
  if (at.block >= tile.num_blocks && (at.block > 0 || 2 * rest >= tile_cost(cls, tile))) {
    at = WorkStart{at.seq, at.tile + 1, 0};
    const std::int32_t in_line = tiles.count() / cls.head_lanes;
    if (at.tile == in_line) at = WorkStart{at.seq + 1, 0, 0};
  }
  return at;
}

// The last of sums [0, count), the first of which is not above `value`, that is not above it; of
// costs before sequences: the sequence that the unit of cost `value` is in.
DIFFKV_HD inline std::int32_t last_not_above(const std::int64_t* sums, std::int32_t count,
                                             std::int64_t value) {
  std::int32_t low = 0;
  for (std::int32_t high = count; high - low > 1;) {
    const std::int32_t middle = low + (high - low) / 2;
    (sums[middle] <= value ? low : high) = middle;
  }
  return low;
}

// Where a line's share starts. `all` is the cost of all lines; seq_at(cost) is the sequence that a
// unit of it is in, on_line(seq) what SeqOnLine says of one. A start is never in a sequence without
// work: whoever looks for the share's first piece would have to walk over it.
template <class SeqAt, class OnLine>
DIFFKV_HD WorkStart share_start(const ScheduleView& view, std::int32_t tile_class,
                                std::int32_t index, std::int64_t all, SeqAt&& seq_at,
                                OnLine&& on_line) {
  const TileClass& cls = view.limits.classes[tile_class];
  const LineCuts cuts(view.limits, cls, all);
  const std::int64_t target = cuts.target(index);
  if (target * cls.head_lanes >= all) return WorkStart{view.num_seqs, 0, 0};
  const SeqOnLine place = on_line(seq_at(target * cls.head_lanes));
  WorkStart at = start_in(view, tile_class, place, target, cuts.share);
  if (at.seq > place.seq) {
    const std::int64_t after = place.before + place.cost;
    at.seq = after < all ? seq_at(after) : view.num_seqs;
  }
  return at;
}

// The same by the tables, once cost_before is filled.
DIFFKV_HD inline WorkStart share_start(const ScheduleView& view, std::int32_t tile_class,
                                       std::int32_t index) {
  const std::int64_t* before = view.tables.cost_before[tile_class];
  return share_start(
      view, tile_class, index, before[view.num_seqs],
      [&](std::int64_t cost) { return last_not_above(before, view.num_seqs, cost); },
      [&](std::int32_t seq) {
        return SeqOnLine{seq, seq_mask(view, seq), before[seq], before[seq + 1] - before[seq]};
      });
}

}  // namespace diffkv::plan
