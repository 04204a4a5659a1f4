// Who reads which keys: tiles, blocks, shares, pieces, slots. Allocation-free, host and device; the
// planner, the kernels and combine all walk the plan through these functions. Where shares start is
// found in shares.h, how a worker walks its share in walk.h, what combine merges in parts.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/host_device.h"
#include "core/mask.h"
#include "diffkv/batch.h"
#include "diffkv/plan.h"
#include "plan/quotient.h"

namespace diffkv::plan {

using core::RowKeys;
using core::SeqMask;
using detail::PlanTables;
using detail::WorkStart;

// What the walk needs, as plain pointers in the batch's memory space.
struct ScheduleView {
  Mask mask;
  SchedulePolicy policy = SchedulePolicy::kBalanced;
  std::int32_t num_kv_heads = 1;
  std::int32_t group = 1;
  std::int32_t num_seqs = 0;
  ScheduleLimits limits;
  PlanTables tables;
  const std::uint8_t* causal_per_seq = nullptr;
  std::int64_t causal_stride = 1;
  const std::int32_t* prefix_lens = nullptr;
  std::int64_t prefix_stride = 1;
  const std::int32_t* mm_ranges = nullptr;
  std::int64_t mm_ranges_stride = 0;  // elements from one sequence to the next
  std::int32_t num_mm_ranges = 0;
};

inline ScheduleView schedule_view(const PlanKey& key, const ScheduleLimits& limits,
                                  const PlanTables& tables, const Batch& batch) {
  ScheduleView view;
  view.mask = key.mask;
  view.policy = key.policy;
  view.num_kv_heads = static_cast<std::int32_t>(key.num_kv_heads);
  view.group = static_cast<std::int32_t>(key.group());
  view.num_seqs = static_cast<std::int32_t>(batch.num_seqs);
  view.limits = limits;
  view.tables = tables;
  if (batch.causal_per_seq.given()) {
    view.causal_per_seq = static_cast<const std::uint8_t*>(batch.causal_per_seq.data);
    view.causal_stride = batch.causal_per_seq.strides[0];
  }
  if (batch.prefix_lens.given()) {
    view.prefix_lens = static_cast<const std::int32_t*>(batch.prefix_lens.data);
    view.prefix_stride = batch.prefix_lens.strides[0];
  }
  if (batch.mm_ranges.given()) {
    view.mm_ranges = static_cast<const std::int32_t*>(batch.mm_ranges.data);
    view.mm_ranges_stride = batch.mm_ranges.strides[0];
    view.num_mm_ranges = static_cast<std::int32_t>(batch.mm_ranges.shape[1]);
  }
  return view;
}

// Of a sequence whose lengths are known.
DIFFKV_HD inline SeqMask seq_mask(const ScheduleView& view, std::int32_t seq,
                                  std::int32_t query_len, std::int32_t seq_len) {
  SeqMask mask;
  mask.query_len = query_len;
  mask.seq_len = seq_len;
  mask.causal = view.causal_per_seq != nullptr ? view.causal_per_seq[seq * view.causal_stride] != 0
                                               : view.mask.causal;
  if (view.prefix_lens != nullptr) mask.prefix_len = view.prefix_lens[seq * view.prefix_stride];
  if (view.mm_ranges != nullptr) {
    mask.mm_ranges = view.mm_ranges + seq * view.mm_ranges_stride;
    mask.num_mm_ranges = view.num_mm_ranges;
  }
  return mask;
}

DIFFKV_HD inline SeqMask seq_mask(const ScheduleView& view, std::int32_t seq) {
  const PlanTables& tables = view.tables;
  return seq_mask(view, seq, tables.query_start_loc[seq + 1] - tables.query_start_loc[seq],
                  tables.seq_lens[seq]);
}

// The rows of one KV head of a sequence, cut into tiles of its class, which span so many KV heads.
// Depends on the sequence alone.
struct SeqTiles {
  std::int32_t tile_class = 0;
  std::int32_t rows = 0;            // query_len * group
  std::int32_t tiles_per_head = 0;  // 0 if the sequence has no query
  std::int32_t head_groups = 0;     // num_kv_heads / tile_heads

  DIFFKV_HD std::int32_t count() const { return tiles_per_head * head_groups; }
};

DIFFKV_HD inline SeqTiles seq_tiles(const ScheduleView& view, std::int32_t query_len) {
  SeqTiles tiles;
  tiles.rows = query_len * view.group;
  while (tiles.tile_class + 1 < view.limits.num_classes &&
         tiles.rows > view.limits.classes[tiles.tile_class].max_seq_rows) {
    ++tiles.tile_class;
  }
  const TileClass& cls = view.limits.classes[tiles.tile_class];
  tiles.tiles_per_head = tiles.rows > 0 ? divide(tiles.rows - 1, cls.tile_rows) + 1 : 0;
  tiles.head_groups = divide(view.num_kv_heads, cls.tile_heads);
  return tiles;
}

// One tile and the blocks of keys it walks. Blocks are aligned to block_keys; virtual block v of
// num_blocks is block v below the prefix, then the window's from first_block on.
struct Tile {
  std::int32_t head_group = 0;  // of num_heads neighbouring KV heads
  std::int32_t kv_head = 0;     // its first
  std::int32_t num_heads = 1;
  std::int32_t first_row = 0;
  std::int32_t num_rows = 0;
  RowKeys keys;  // holds every key that a row sees
  std::int32_t block_keys = 1;
  std::int32_t prefix_blocks = 0;
  std::int32_t first_block = 0;
  std::int32_t num_blocks = 0;

  // The KV head, counted from the first, and the row of it that is row `index` of all heads' rows.
  struct Row {
    std::int32_t head;
    std::int32_t row;
  };
  DIFFKV_HD static Row row_of(std::int32_t num_heads, std::int32_t num_rows, std::int32_t index) {
    // NOLINTNEXTLINE(clang-analyzer-core.DivideZero): a tile has rows
    const std::int32_t head = num_heads > 1 ? divide(index, num_rows) : 0;
    return {head, index - head * num_rows};
  }

  DIFFKV_HD std::int32_t block_at(std::int32_t v) const {
    return v < prefix_blocks ? v : v - prefix_blocks + first_block;
  }
  // Virtual blocks whose place is below block `place`.
  DIFFKV_HD std::int32_t blocks_below(std::int32_t place) const {
    if (place <= prefix_blocks) return place;
    const std::int32_t v = prefix_blocks + (place > first_block ? place - first_block : 0);
    return v < num_blocks ? v : num_blocks;
  }
  // Keys of virtual block v that some row may see.
  DIFFKV_HD KeyRange keys_at(std::int32_t v) const {
    const std::int32_t start = block_at(v) * block_keys;
    const std::int32_t stop = start + block_keys;
    KeyRange range{start, stop};
    if (start >= keys.prefix_end && start < keys.begin) range.begin = keys.begin;
    const std::int32_t limit =
        keys.end > keys.prefix_end && stop > keys.begin ? keys.end : keys.prefix_end;
    if (stop > limit) range.end = limit;
    return range;
  }
};

// Tile `index` of a sequence without its keys.
DIFFKV_HD inline Tile tile_rows(const ScheduleView& view, const SeqTiles& tiles,
                                std::int32_t index) {
  const TileClass& cls = view.limits.classes[tiles.tile_class];
  Tile tile;
  // NOLINTNEXTLINE(clang-analyzer-core.DivideZero): a sequence with a tile has a tile a head
  tile.head_group = divide(index, tiles.tiles_per_head);
  tile.kv_head = tile.head_group * cls.tile_heads;
  tile.num_heads = cls.tile_heads;
  tile.first_row = (index - tile.head_group * tiles.tiles_per_head) * cls.tile_rows;
  const std::int32_t rest = tiles.rows - tile.first_row;
  tile.num_rows = rest < cls.tile_rows ? rest : cls.tile_rows;
  return tile;
}

DIFFKV_HD inline Tile tile_at(const ScheduleView& view, const SeqMask& seq, const SeqTiles& tiles,
                              std::int32_t index) {
  const TileClass& cls = view.limits.classes[tiles.tile_class];
  Tile tile = tile_rows(view, tiles, index);
  tile.keys = core::tile_keys(view.mask, seq, divide(tile.first_row, view.group),
                              divide(tile.first_row + tile.num_rows - 1, view.group));
  tile.block_keys = cls.block_keys;
  tile.prefix_blocks = divide(tile.keys.prefix_end + cls.block_keys - 1, cls.block_keys);
  tile.first_block = divide(tile.keys.begin, cls.block_keys);
  if (tile.first_block < tile.prefix_blocks) tile.first_block = tile.prefix_blocks;
  std::int32_t window_blocks = 0;
  if (tile.keys.begin < tile.keys.end) {
    window_blocks = divide(tile.keys.end + cls.block_keys - 1, cls.block_keys) - tile.first_block;
    if (window_blocks < 0) window_blocks = 0;
  }
  tile.num_blocks = tile.prefix_blocks + window_blocks;
  return tile;
}

// Ranges of L keys that `span` neighbouring keys can reach into.
DIFFKV_HD inline std::int64_t ranges_reached(std::int64_t span, std::int64_t length) {
  return (span + length - 2) / length + 1;
}

// Keys that a tile's rows can see among them, where the mask alone bounds them: a causal sliding
// window; 0 where it does not.
DIFFKV_HD inline std::int64_t window_span(const Mask& mask, bool causal, bool mm_ranges,
                                          const TileClass& cls) {
  const bool bounded =
      mask.window > 0 && mask.chunk_size <= 0 && mask.prefix_window <= 0 && causal && !mm_ranges;
  return bounded ? std::int64_t{mask.window} + cls.tile_rows : 0;
}

// Of `ranges` ranges of L keys, those that one tile can reach into whose keys span no more than
// `span`, or are not bounded if that is 0. Tiles of at most the least L stay whole.
DIFFKV_HD inline std::int64_t pieces_of_tile(const TileClass& cls, std::int64_t span,
                                             std::int64_t length, std::int64_t ranges) {
  if (span <= 0) return ranges;
  if (span <= cls.invariant_least_keys) return 1;
  const std::int64_t reached = ranges_reached(span, length);
  return reached < ranges ? reached : ranges;
}

// kBatchInvariant: keys are cut at multiples of L, the least invariant_least_keys * 2^k that leaves
// a sequence at most S_max pieces, which so depend on the sequence alone.
struct InvariantCut {
  std::int32_t ranges = 1;          // of L keys that the sequence has; 1: it is not cut
  std::int32_t slots_per_tile = 1;  // ranges that one of its tiles can reach into
  std::int32_t blocks_per_range = 0;
};

DIFFKV_HD inline InvariantCut invariant_cut(const ScheduleView& view, const SeqTiles& tiles,
                                            const SeqMask& seq) {
  InvariantCut cut;
  if (view.policy != SchedulePolicy::kBatchInvariant) return cut;
  const TileClass& cls = view.limits.classes[tiles.tile_class];
  std::int32_t length = cls.invariant_least_keys;  // at most twice seq_len, which is below 2^30
  while (std::int64_t{length} * cls.invariant_max_pieces < seq.seq_len) length *= 2;
  cut.blocks_per_range = divide(length, cls.block_keys);
  if (tiles.tiles_per_head > cls.invariant_max_tiles) return cut;
  const std::int32_t ranges = divide(seq.seq_len + length - 1, length);
  const std::int64_t span = window_span(view.mask, seq.causal, seq.num_mm_ranges > 0, cls);
  const std::int64_t pieces = pieces_of_tile(cls, span, length, ranges);
  if (pieces <= 1) return cut;
  cut.ranges = ranges;
  cut.slots_per_tile = static_cast<std::int32_t>(pieces);
  return cut;
}

// End of the piece that virtual block v is in, by absolute cuts.
DIFFKV_HD inline std::int32_t invariant_piece_end(const InvariantCut& cut, const Tile& tile,
                                                  std::int32_t v) {
  if (cut.ranges <= 1) return tile.num_blocks;
  // NOLINTNEXTLINE(clang-analyzer-core.DivideZero): ranges are of whole blocks
  const std::int32_t range = tile.block_at(v) / cut.blocks_per_range;
  return tile.blocks_below((range + 1) * cut.blocks_per_range);
}

// Which line of work, and which share of it, is a worker's. Lane l has the head groups l, l +
// head_lanes, ...; all lines cost the same, so that they are cut in the same places.
struct Lane {
  std::int32_t lane = 0;
  std::int32_t share = 0;
  std::int32_t lanes = 1;
  std::int32_t shares = 1;
  std::int32_t head_groups = 1;  // of a lane

  DIFFKV_HD std::int32_t worker(std::int32_t of_share) const { return of_share * lanes + lane; }
  DIFFKV_HD std::int32_t head_group(std::int32_t in_lane) const { return in_lane * lanes + lane; }
};

DIFFKV_HD inline Lane lane_of(const ScheduleView& view, std::int32_t tile_class,
                              std::int32_t worker) {
  const TileClass& cls = view.limits.classes[tile_class];
  Lane lane;
  lane.lanes = cls.head_lanes;
  lane.share = worker / cls.head_lanes;
  lane.lane = worker - lane.share * cls.head_lanes;
  lane.shares = cls.workers / cls.head_lanes;
  lane.head_groups = view.num_kv_heads / (cls.tile_heads * cls.head_lanes);
  return lane;
}

// A piece of a tile: virtual blocks [begin_block, end_block).
struct Piece {
  std::int32_t seq = 0;
  std::int32_t tile_index = 0;  // among the sequence's tiles, head-major
  std::int32_t line_index = 0;  // among those of its line, as in WorkStart
  Tile tile;
  std::int32_t begin_block = 0;
  std::int32_t end_block = 0;
  std::int32_t slot = -1;        // -1: the whole tile
  std::int32_t first_share = 0;  // kBalanced: that the tile starts in

  DIFFKV_HD bool first() const { return begin_block == 0; }
  DIFFKV_HD bool last() const { return end_block == tile.num_blocks; }
};

DIFFKV_HD inline bool same_tile(const WorkStart& a, const WorkStart& b) {
  return a.seq == b.seq && a.tile == b.tile;
}

DIFFKV_HD inline bool before(const WorkStart& a, const WorkStart& b) {
  if (a.seq != b.seq) return a.seq < b.seq;
  if (a.tile != b.tile) return a.tile < b.tile;
  return a.block < b.block;
}

// Whether the share starts inside `tile`, which is then cut.
DIFFKV_HD inline bool starts_inside(const WorkStart& start, const WorkStart& tile) {
  return start.block > 0 && same_tile(start, tile);
}

// Slot of the piece of (seq, tile) that starts at virtual block `begin`.
DIFFKV_HD inline std::int32_t slot_of(const ScheduleView& view, std::int32_t tile_class,
                                      std::int32_t worker, const InvariantCut& cut,
                                      const Piece& piece) {
  if (piece.first() && piece.last()) return -1;
  if (view.policy == SchedulePolicy::kBatchInvariant) {
    const std::int32_t first = piece.tile.block_at(0) / cut.blocks_per_range;
    return view.tables.slot_before[piece.seq] + piece.tile_index * cut.slots_per_tile +
           piece.tile.block_at(piece.begin_block) / cut.blocks_per_range - first;
  }
  return view.tables.first_slot[tile_class] + 2 * worker + (piece.first() ? 1 : 0);
}

// The whole of a tile that a place of a lane's line is in; `tile` is the first lane's.
DIFFKV_HD inline Piece piece_of_tile(const Lane& lane, const SeqTiles& tiles, const WorkStart& at,
                                     const Tile& tile) {
  Piece piece;
  piece.seq = at.seq;
  piece.line_index = at.tile;
  piece.tile = tile;
  const std::int32_t in_lane = piece.tile.head_group;
  piece.tile.head_group = lane.head_group(in_lane);
  piece.tile.kv_head = piece.tile.head_group * piece.tile.num_heads;
  piece.tile_index = at.tile + (piece.tile.head_group - in_lane) * tiles.tiles_per_head;
  piece.end_block = piece.tile.num_blocks;
  return piece;
}

// Row of the partials that holds row `row` of KV head `head`, counted from the tile's first, of a
// tile's slot.
DIFFKV_HD inline std::int64_t partial_row(const ScheduleView& view, std::int32_t tile_class,
                                          std::int32_t slot, std::int64_t row,
                                          std::int64_t head = 0) {
  const TileClass& cls = view.limits.classes[tile_class];
  const std::int64_t in_class = slot - view.tables.first_slot[tile_class];
  return view.tables.first_partial_row[tile_class] +
         (in_class * cls.tile_heads + head) * cls.tile_rows + row;
}

}  // namespace diffkv::plan
