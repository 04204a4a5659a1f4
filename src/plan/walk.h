// How a worker walks its share of the plan, piece by piece.
#pragma once

#include <cstdint>

#include "core/host_device.h"
#include "plan/quotient.h"
#include "plan/schedule.h"

namespace diffkv::plan {

// `piece` is a whole tile: makes it what a worker has of it from `at`, which is in it, to `stop`,
// where the worker's share ends.
DIFFKV_HD inline void cut_piece(const ScheduleView& view, std::int32_t tile_class,
                                std::int32_t worker, const InvariantCut& cut, const WorkStart& at,
                                const WorkStart& stop, Piece& piece) {
  piece.begin_block = at.block;
  if (same_tile(at, stop) && stop.block < piece.tile.num_blocks) piece.end_block = stop.block;
  if (view.policy == SchedulePolicy::kBatchInvariant && piece.tile.num_blocks > 0) {
    const std::int32_t end = invariant_piece_end(cut, piece.tile, piece.begin_block);
    if (end < piece.end_block) piece.end_block = end;
  }
  piece.slot = slot_of(view, tile_class, worker, cut, piece);
}

// The first piece of a worker's share, which ends at `stop`, at or after `at`; false if there is
// none.
DIFFKV_HD inline bool find_piece(const ScheduleView& view, std::int32_t tile_class,
                                 std::int32_t worker, WorkStart at, const WorkStart& stop,
                                 Piece& piece) {
  const Lane lane = lane_of(view, tile_class, worker);
  for (; at.seq < view.num_seqs && before(at, stop); at = WorkStart{at.seq + 1, 0, 0}) {
    const SeqMask seq = seq_mask(view, at.seq);
    const SeqTiles tiles = seq_tiles(view, seq.query_len);
    const InvariantCut cut = invariant_cut(view, tiles, seq);
    const std::int32_t num_tiles =
        tiles.tile_class == tile_class ? tiles.tiles_per_head * lane.head_groups : 0;
    for (; at.tile < num_tiles && before(at, stop); ++at.tile, at.block = 0) {
      piece = piece_of_tile(lane, tiles, at, tile_at(view, seq, tiles, at.tile));
      // Only a mask that changed after planning makes a share start past its tile.
      if (at.block > 0 && at.block >= piece.tile.num_blocks) continue;
      cut_piece(view, tile_class, worker, cut, at, stop, piece);
      piece.first_share = lane.share;
      return true;
    }
  }
  return false;
}

// What follows a piece in its line.
DIFFKV_HD inline WorkStart after(const Piece& piece) {
  if (piece.last()) return WorkStart{piece.seq, piece.line_index + 1, 0};
  return WorkStart{piece.seq, piece.line_index, piece.end_block};
}

// The piece that a worker starts with, from what the planner kept of its share. Few instructions: a
// kernel that starts waits for each to come from memory.
DIFFKV_HD inline Piece unpack(const ScheduleView& view, std::int32_t tile_class, std::int32_t lane,
                              const detail::FirstPiece& first) {
  const TileClass& cls = view.limits.classes[tile_class];
  Piece piece;
  Tile& tile = piece.tile;
  piece.seq = first.seq;
  piece.line_index = first.line_index;
  tile.head_group = first.head_group * cls.head_lanes + lane;
  piece.tile_index = first.line_index + (tile.head_group - first.head_group) * first.tiles_per_head;
  tile.kv_head = tile.head_group * cls.tile_heads;
  tile.num_heads = cls.tile_heads;
  tile.first_row = first.first_row;
  tile.num_rows = first.num_rows;
  tile.keys = RowKeys{first.prefix_end, first.begin, first.end};
  tile.block_keys = cls.block_keys;
  tile.prefix_blocks = first.prefix_blocks;
  tile.first_block = first.first_block;
  tile.num_blocks = first.num_blocks;
  piece.begin_block = first.begin_block;
  piece.end_block = first.end_block;
  piece.slot = first.slot < 0 ? -1 : first.slot + lane * first.slot_step;
  piece.first_share = first.first_share;
  return piece;
}

// A worker's share, piece by piece in order.
class Share {
 public:
  DIFFKV_HD Share(const ScheduleView& view, std::int32_t tile_class, std::int32_t worker)
      : view_(view), tile_class_(tile_class), worker_(worker) {}

  // Both: false if there is none. first() comes before next().
  DIFFKV_HD bool first(Piece& piece) {
    const detail::FirstPiece first = view_.tables.first_pieces[tile_class_][index()];
    stop_ = view_.tables.starts[tile_class_][index() + 1];
    cost_ = first.share_cost;
    if (first.seq < 0) return false;
    piece = unpack(view_, tile_class_, worker_ - index() * lanes(), first);
    return true;
  }
  DIFFKV_HD bool next(Piece& piece) const {
    return find_piece(view_, tile_class_, worker_, after(piece), stop_, piece);
  }

  // After first(), of a share that is not empty: as FirstPiece says.
  DIFFKV_HD std::int32_t cost() const { return cost_; }

 private:
  DIFFKV_HD std::int32_t lanes() const { return view_.limits.classes[tile_class_].head_lanes; }
  DIFFKV_HD std::int32_t index() const { return divide(worker_, lanes()); }

  const ScheduleView& view_;
  const std::int32_t tile_class_;
  const std::int32_t worker_;
  WorkStart stop_;
  std::int32_t cost_ = 0;
};

// Whether a worker has nothing to do.
DIFFKV_HD inline bool share_is_empty(const ScheduleView& view, std::int32_t tile_class,
                                     std::int32_t worker) {
  const std::int32_t share = divide(worker, view.limits.classes[tile_class].head_lanes);
  return view.tables.first_pieces[tile_class][share].seq < 0;
}

// Calls fn(piece) for every piece of a worker's share, in order.
template <class Fn>
DIFFKV_HD void for_each_piece(const ScheduleView& view, std::int32_t tile_class,
                              std::int32_t worker, Fn&& fn) {
  Share share(view, tile_class, worker);
  Piece piece;
  for (bool more = share.first(piece); more; more = share.next(piece)) {
    fn(static_cast<const Piece&>(piece));
  }
}

}  // namespace diffkv::plan
