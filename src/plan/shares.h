// Where the shares of a class's line of work start, and their first pieces: the arithmetic of the
// planners, host and device.
#pragma once

#include <cstdint>

#include "core/host_device.h"
#include "core/mask.h"
#include "diffkv/plan.h"
#include "plan/quotient.h"
#include "plan/schedule.h"
#include "plan/walk.h"

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

// kOneTile, here and below: every sequence has one tile a head at most, of the first class, and a
// causal mask, with a window or not; or the result is not used.
template <bool kOneTile>
DIFFKV_HD SeqTiles tiles_of(const ScheduleView& view, std::int32_t query_len) {
  if constexpr (!kOneTile) return seq_tiles(view, query_len);
  SeqTiles tiles;
  tiles.rows = query_len * view.group;
  tiles.tiles_per_head = tiles.rows > 0 ? 1 : 0;
  tiles.head_groups = divide(view.num_kv_heads, view.limits.classes[0].tile_heads);
  return tiles;
}

// Costs along one KV head of a sequence, or as many as a tile of its class spans. What most
// sequences need is short; the rest is apart.
template <bool kOneTile>
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
    if constexpr (kOneTile) return single_cost();
    return single_ ? single_cost() : sum_before(view_, seq_, tiles_, closed_, index);
  }

  // The tile that the unit of cost `at` is in: the last with before(tile) <= at.
  DIFFKV_HD std::int32_t tile_at_cost(std::int64_t at) const {
    if constexpr (kOneTile) return 0;
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

template <bool kOneTile = false>
DIFFKV_HD SeqWork seq_work(const ScheduleView& view, const SeqMask& seq) {
  const SeqTiles tiles = tiles_of<kOneTile>(view, seq.query_len);
  SeqWork work;
  work.tile_class = tiles.tile_class;
  work.cost = tiles.head_groups * HeadCost<kOneTile>(view, seq, tiles).before(tiles.tiles_per_head);
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

// Where a share starts, and the tile that it starts in, of the first lane; of seq = num_seqs only
// `at` says something.
struct Start {
  WorkStart at;
  SeqMask mask;  // of the sequence
  SeqTiles tiles;
  Tile tile;
  std::int64_t share_cost = 0;
};

// The virtual block of a tile that a share starts with whose start is `rest` units of cost into the
// tile; num_blocks, if it starts behind the tile. Of an empty tile 0 either way.
DIFFKV_HD inline std::int32_t first_block(const ScheduleView& view, const Start& in,
                                          std::int64_t rest, std::int64_t share) {
  const TileClass& cls = view.limits.classes[in.tiles.tile_class];
  const Tile& tile = in.tile;
  const std::int64_t cost = tile_cost(cls, tile);
  const bool invariant = view.policy == SchedulePolicy::kBatchInvariant;
  const InvariantCut cut = invariant_cut(view, in.tiles, in.mask);
  // For a piece of a cut tile: fewer than least_cut, and less than half of a share.
  const auto too_few = [&](std::int64_t blocks) {
    return blocks < cls.least_cut && 2 * blocks * cls.block_cost < share;
  };
  const bool may_cut = cost * cls.uncut_per_share > share &&
                       (invariant ? cut.ranges > 1 : !too_few(tile.num_blocks / 2));
  if (!may_cut) return 2 * rest >= cost ? tile.num_blocks : 0;
  if (rest <= cls.tile_cost) return 0;
  // Where shares cost more than the start of a tile, that counts as spread over the tile, so that
  // tiles that shares divide evenly are cut into equal pieces: the nearest block, of the middle of
  // the unit of cost that the share starts in. Where they cost less, the start is a share's own.
  auto block = static_cast<std::int32_t>(
      share > cls.tile_cost ? quotient((2 * rest + 1) * tile.num_blocks + cost, 2 * cost)
                            : quotient(rest - cls.tile_cost + cls.block_cost / 2, cls.block_cost));
  if (invariant) {
    if (block == 0 || block >= tile.num_blocks) return block;
    const std::int32_t range = tile.block_at(block) / cut.blocks_per_range;
    const std::int32_t below = tile.blocks_below(range * cut.blocks_per_range);
    const std::int32_t above = invariant_piece_end(cut, tile, block);
    return block - below < above - block ? below : above;
  }
  if (too_few(block)) block = 0;
  return too_few(tile.num_blocks - block) ? tile.num_blocks : block;
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
template <bool kOneTile = false, class SeqAt, class OnLine>
DIFFKV_HD Start share_start(const ScheduleView& view, std::int32_t tile_class, std::int32_t index,
                            std::int64_t all, SeqAt&& seq_at, OnLine&& on_line) {
  const TileClass& cls = view.limits.classes[tile_class];
  const LineCuts cuts(view.limits, cls, all);
  const std::int64_t target = cuts.target(index);
  Start start;
  start.share_cost = cuts.share;
  WorkStart& at = start.at;
  at.seq = target * cls.head_lanes < all ? seq_at(target * cls.head_lanes) : view.num_seqs;
  // Two rounds at most, of a loop so that a GPU has the code once: the tile that the target is in,
  // and, where the share starts behind it, the tile behind it.
  for (bool behind = false; at.seq < view.num_seqs; behind = true) {
    const SeqOnLine place = on_line(at.seq);
    std::int64_t rest = 0;  // of the target in its tile
    start.mask = place.mask;
    start.tiles = tiles_of<kOneTile>(view, place.mask.query_len);
    if (!behind) {
      rest = target - quotient(place.before, cls.head_lanes);
      const std::int64_t per_head = quotient(place.cost, start.tiles.head_groups);
      const auto head = static_cast<std::int32_t>(quotient(rest, per_head));
      rest -= head * per_head;
      const HeadCost<kOneTile> costs(view, start.mask, start.tiles);
      const std::int32_t in_head = costs.tile_at_cost(rest);
      rest -= costs.before(in_head);
      at.tile = head * start.tiles.tiles_per_head + in_head;
    }
    start.tile = tile_at(view, start.mask, start.tiles, at.tile);
    if (behind) break;
    at.block = first_block(view, start, rest, cuts.share);
    if (at.block < start.tile.num_blocks) break;
    at.block = 0;
    if (start.tile.num_blocks == 0 && 2 * rest < cls.tile_cost) break;
    // Of this sequence, or of the next one that has work.
    if (++at.tile < divide(start.tiles.count(), cls.head_lanes)) continue;
    at.tile = 0;
    const std::int64_t after = place.before + place.cost;
    at.seq = after < all ? seq_at(after) : view.num_seqs;
  }
  return start;
}

// The same by the tables, once cost_before is filled.
DIFFKV_HD inline Start share_start(const ScheduleView& view, std::int32_t tile_class,
                                   std::int32_t index) {
  const std::int64_t* before = view.tables.cost_before[tile_class];
  return share_start(
      view, tile_class, index, before[view.num_seqs],
      [&](std::int64_t cost) { return last_not_above(before, view.num_seqs, cost); },
      [&](std::int32_t seq) {
        return SeqOnLine{seq, seq_mask(view, seq), before[seq], before[seq + 1] - before[seq]};
      });
}

// The share that a tile starts in, which `share` starts inside.
DIFFKV_HD inline std::int32_t first_share_of(const WorkStart* starts, std::int32_t share) {
  const WorkStart tile = starts[share];
  std::int32_t low = 0;  // the last share that does not start inside
  while (share - low > 1) {
    const std::int32_t middle = low + (share - low) / 2;
    (starts_inside(starts[middle], tile) ? share : low) = middle;
  }
  return low;
}

// That FirstPiece says.
inline constexpr std::int64_t kMostShareCost = 1 << 30;

// What FirstPiece says of a share; `starts` are the class's.
DIFFKV_HD inline detail::FirstPiece first_piece_of(const ScheduleView& view,
                                                   std::int32_t tile_class, std::int32_t share,
                                                   const Start& start, const WorkStart* starts) {
  detail::FirstPiece first;
  const WorkStart& at = start.at;
  const WorkStart stop = starts[share + 1];
  if (at.seq >= view.num_seqs || !before(at, stop)) return first;
  Lane lane;
  lane.lanes = view.limits.classes[tile_class].head_lanes;
  lane.share = share;
  Piece piece = piece_of_tile(lane, start.tiles, at, start.tile);
  const InvariantCut cut = invariant_cut(view, start.tiles, start.mask);
  cut_piece(view, tile_class, lane.worker(share), cut, at, stop, piece);
  const Tile& tile = start.tile;
  first.seq = at.seq;
  first.line_index = at.tile;
  first.tiles_per_head = start.tiles.tiles_per_head;
  first.head_group = tile.head_group;
  first.first_row = tile.first_row;
  first.num_rows = tile.num_rows;
  first.prefix_end = tile.keys.prefix_end;
  first.begin = tile.keys.begin;
  first.end = tile.keys.end;
  first.prefix_blocks = tile.prefix_blocks;
  first.first_block = tile.first_block;
  first.num_blocks = tile.num_blocks;
  first.begin_block = piece.begin_block;
  first.end_block = piece.end_block;
  first.slot = piece.slot;
  first.slot_step = view.policy == SchedulePolicy::kBatchInvariant
                        ? start.tiles.tiles_per_head * cut.slots_per_tile
                        : 2;
  first.share_cost = static_cast<std::int32_t>(start.share_cost < kMostShareCost ? start.share_cost
                                                                                 : kMostShareCost);
  first.first_share = at.block > 0 && share > 0 ? first_share_of(starts, share) : share;
  return first;
}

}  // namespace diffkv::plan
