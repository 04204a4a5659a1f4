// What combine merges: the cut tiles and their parts, one after another or by number, so that many
// threads find them at once.
#pragma once

#include <cstdint>

#include "core/host_device.h"
#include "plan/quotient.h"
#include "plan/schedule.h"
#include "plan/walk.h"

namespace diffkv::plan {

// kBatchInvariant: a sequence whose tiles may be cut. Its slots follow from it alone.
struct CutSequence {
  std::int32_t seq;
  SeqMask mask;
  SeqTiles tiles;
  InvariantCut cut;

  DIFFKV_HD CutSequence(const ScheduleView& view, std::int32_t sequence)
      : seq(sequence),
        mask(seq_mask(view, seq)),
        tiles(seq_tiles(view, mask.query_len)),
        cut(invariant_cut(view, tiles, mask)) {}

  // Of the tiles that may be cut.
  DIFFKV_HD std::int32_t num_tiles() const { return cut.ranges > 1 ? tiles.count() : 0; }
  // All of one of them. It is cut if it has several parts.
  DIFFKV_HD Piece tile(const ScheduleView& view, std::int32_t index) const {
    Piece piece;
    piece.seq = seq;
    piece.tile_index = index;
    piece.tile = tile_at(view, mask, tiles, index);
    piece.end_block = piece.tile.num_blocks;
    return piece;
  }
};

// Calls fn(slot) for every partial of the tile whose first piece is `first`, found in `worker`'s
// share, in the order of their keys.
template <class Fn>
DIFFKV_HD void for_each_partial(const ScheduleView& view, std::int32_t tile_class,
                                std::int32_t worker, const Piece& first, Fn&& fn) {
  fn(first.slot);
  if (view.policy == SchedulePolicy::kBatchInvariant) {
    const InvariantCut cut = CutSequence(view, first.seq).cut;
    Piece piece = first;
    while (!piece.last()) {
      piece.begin_block = piece.end_block;
      piece.end_block = invariant_piece_end(cut, piece.tile, piece.begin_block);
      fn(slot_of(view, tile_class, worker, cut, piece));
    }
    return;
  }
  const Lane lane = lane_of(view, tile_class, worker);
  const WorkStart* starts = view.tables.starts[tile_class];
  const WorkStart tile{first.seq, first.line_index, 0};
  for (std::int32_t share = lane.share + 1; share < lane.shares; ++share) {
    if (!same_tile(starts[share], tile) || starts[share].block == 0) return;
    if (before(starts[share], starts[share + 1])) {
      fn(view.tables.first_slot[tile_class] + 2 * lane.worker(share));
    }
  }
}

// Calls fn(piece) for the first piece of every cut tile that starts in a worker's share: each cut
// tile is some worker's.
template <class Fn>
DIFFKV_HD void for_each_cut_tile(const ScheduleView& view, std::int32_t tile_class,
                                 std::int32_t worker, Fn&& fn) {
  if (view.policy == SchedulePolicy::kBatchInvariant) {
    for_each_piece(view, tile_class, worker, [&](const Piece& piece) {
      if (piece.slot >= 0 && piece.first()) fn(piece);
    });
    return;
  }
  // Only the share's last tile can be cut without having been cut before.
  const Lane lane = lane_of(view, tile_class, worker);
  const WorkStart start = view.tables.starts[tile_class][lane.share];
  const WorkStart stop = view.tables.starts[tile_class][lane.share + 1];
  if (stop.block == 0 || stop.seq >= view.num_seqs || !before(start, stop)) return;
  if (same_tile(start, stop) && start.block > 0) return;
  const SeqMask seq = seq_mask(view, stop.seq);
  const SeqTiles tiles = seq_tiles(view, seq.query_len);
  if (stop.tile >= tiles.tiles_per_head * lane.head_groups) return;
  Piece piece = piece_of_tile(lane, tiles, stop, tile_at(view, seq, tiles, stop.tile));
  piece.end_block = stop.block;
  // A mask that changed after planning may have left the tile whole.
  if (stop.block >= piece.tile.num_blocks) return;
  piece.slot = slot_of(view, tile_class, worker, InvariantCut{}, piece);
  fn(static_cast<const Piece&>(piece));
}

// The partial of an empty share: there is none, but others may follow.
inline constexpr std::int32_t kNoSlot = -1;

// kBalanced: a part for each share from the one that the tile starts in to the last that starts
// inside it.
struct BalancedParts {
  const WorkStart* starts;  // of the class
  Lane lane;
  std::int32_t first_slot;   // of the class
  std::int32_t first_share;  // that the tile starts in
  std::int32_t count;

  DIFFKV_HD std::int32_t slot(std::int32_t part) const {
    const std::int32_t share = first_share + part;
    const std::int32_t own = first_slot + 2 * lane.worker(share);
    if (part == 0) return own + 1;
    return before(starts[share], starts[share + 1]) ? own : kNoSlot;
  }
};

// kBatchInvariant: a part for each range between absolute cuts that the tile reaches into.
struct InvariantParts {
  std::int32_t first_slot = 0;  // of the tile
  std::int32_t prefix = 0;      // so many parts are below the prefix
  std::int32_t skipped = 0;     // slots behind these, of ranges that the tile does not reach into
  std::int32_t count = 0;

  InvariantParts() = default;
  DIFFKV_HD InvariantParts(const ScheduleView& view, const InvariantCut& cut, const Piece& piece) {
    const Tile& tile = piece.tile;
    const std::int32_t per_range = cut.blocks_per_range;
    first_slot = view.tables.slot_before[piece.seq] + piece.tile_index * cut.slots_per_tile;
    if (tile.prefix_blocks > 0) prefix = divide(tile.prefix_blocks - 1, per_range) + 1;
    count = prefix;
    if (tile.num_blocks == tile.prefix_blocks) return;
    const std::int32_t window = divide(tile.first_block, per_range);
    const std::int32_t first = window < prefix ? prefix : window;
    const std::int32_t last = divide(tile.block_at(tile.num_blocks - 1), per_range);
    if (prefix > 0) skipped = first - prefix;
    if (last >= first) count += last - first + 1;
  }

  // Counted from the tile's first.
  DIFFKV_HD std::int32_t slot_in_tile(std::int32_t part) const {
    return part < prefix ? part : part + skipped;
  }
  DIFFKV_HD std::int32_t slot(std::int32_t part) const { return first_slot + slot_in_tile(part); }
};

}  // namespace diffkv::plan
