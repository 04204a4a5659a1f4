// The plan: who reads which keys of which tile in one step; shared by all layers of one kind.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "diffkv/attention.h"
#include "diffkv/batch.h"
#include "diffkv/tensor.h"

namespace diffkv {

class Backend;

namespace core {
struct SoftmaxState;
}  // namespace core

// A tile is up to tile_rows query rows, (token, head) pairs that share one KV head of one sequence,
// for each of tile_heads neighbouring KV heads; row r of a sequence's KV head is token r / group,
// head r % group. Plain numbers from
// Backend::limits: the planner knows nothing else of a kernel. Costs are in one unit of time of the
// backend's choice.
struct TileClass {
  std::int32_t tile_rows = 16;  // of each KV head
  std::int32_t tile_heads = 1;  // KV heads of a tile; divides num_kv_heads
  // Largest query_len * group of a sequence of this class; the last class takes the rest. 0: no
  // sequence is of this class.
  std::int32_t max_seq_rows = 0;
  // Whether a balanced plan gives this class the sequences of those before it, too, where a batch
  // needs none behind it: if one kernel with fewer rows than it has room for costs less than two.
  bool takes_smaller = false;
  std::int32_t block_keys = 64;  // keys are walked and cut in blocks aligned to this
  std::int32_t workers = 1;      // shares this class's work is cut into
  // So many workers side by side walk the same keys of as many KV heads, whose rows a cache may
  // keep together. Divides workers and num_kv_heads / tile_heads.
  std::int32_t head_lanes = 1;
  std::int32_t tile_cost = 1;   // fixed cost of a tile
  std::int32_t block_cost = 1;  // cost of one block of keys of a tile
  // No piece of a cut tile has fewer blocks, unless it is at least half of a share.
  std::int32_t least_cut = 4;
  std::int32_t uncut_per_share = 16;  // a tile cheaper than 1 / this of a share is never cut
  // Shares cheaper than this are made only while there are fewer than threads; 0: no such limit.
  std::int32_t least_share_cost = 0;
  // kBatchInvariant cuts only sequences of at most so many tiles a head, each in at most so many
  // pieces (S_max), at multiples of at least so many keys, which are whole blocks.
  std::int32_t invariant_max_tiles = 1;
  std::int32_t invariant_max_pieces = 16;
  std::int32_t invariant_least_keys = 2048;
};

inline constexpr int kMaxTileClasses = 3;

struct ScheduleLimits {
  std::array<TileClass, kMaxTileClasses> classes;
  std::int32_t num_classes = 0;
  std::int32_t threads = 1;        // that run workers at the same time
  std::int64_t scratch_bytes = 0;  // a thread's own working memory
};

// Sizes that a plan's buffers are made for, once.
struct PlanMaxima {
  std::int64_t max_tokens = 0;   // query rows of a step
  std::int64_t max_seqs = 0;     // sequences of a step
  std::int64_t max_seq_len = 0;  // keys of a sequence: block-table width * block_size
  std::int64_t max_mm_ranges = 0;
  // Threads that plans are made for; 0: as many as the backend would use when the plan is made. A
  // metadata builder fixes it when it is made.
  std::int32_t threads = 0;
};

// Keys [begin, end).
struct KeyRange {
  std::int32_t begin = 0;
  std::int32_t end = 0;

  friend bool operator==(const KeyRange&, const KeyRange&) = default;
};

// One piece of work, as the kernels walk it.
struct WorkItem {
  std::int32_t tile_class = 0;
  std::int32_t worker = 0;
  std::int32_t seq = 0;
  std::int32_t kv_head = 0;  // the first of num_kv_heads
  std::int32_t num_kv_heads = 1;
  std::int32_t first_row = 0;  // of a KV head's query_len * group rows
  std::int32_t num_rows = 0;
  // What it reads: below a prefix, and in the window. Either may be empty.
  std::array<KeyRange, 2> keys;
  std::int32_t slot = -1;  // partial slot, -1: the tile is whole and its rows are written at once
};

namespace detail {

// Where a share of a class's line of work starts: block `block` of tile `tile` of sequence `seq`,
// counted among the tiles of the line's own KV heads.
struct WorkStart {
  std::int32_t seq = 0;
  std::int32_t tile = 0;
  std::int32_t block = 0;
};

// The first piece of a share, of lane 0; lane l's is of the l-th head group after it. Kernels begin
// with it before they have worked anything out.
struct alignas(16) FirstPiece {
  std::int32_t seq = -1;  // -1: the share is empty
  std::int32_t line_index = 0;
  std::int32_t tiles_per_head = 0;
  std::int32_t head_group = 0;  // in the lane
  std::int32_t first_row = 0;
  std::int32_t num_rows = 0;
  std::int32_t prefix_end = 0;  // keys of the tile
  std::int32_t begin = 0;
  std::int32_t end = 0;
  std::int32_t prefix_blocks = 0;
  std::int32_t first_block = 0;
  std::int32_t num_blocks = 0;
  std::int32_t begin_block = 0;
  std::int32_t end_block = 0;
  std::int32_t slot = -1;
  std::int32_t slot_step = 0;    // from one lane to the next
  std::int32_t first_share = 0;  // kBalanced: that the tile starts in
  std::int32_t share_cost = 0;   // of each share of the class that is not empty, at most 2^30
  std::int32_t unused[2] = {};
};

// The plan in memory, host or device: prefix sums per sequence, one start and one first piece per
// share.
struct PlanTables {
  std::int32_t num_seqs = 0;
  std::int32_t num_tokens = 0;
  // What PlanMaxima allow. Lengths in device memory, which nobody could check, are clamped to them.
  std::int32_t max_tokens = 0;
  std::int32_t max_seq_len = 0;
  std::int32_t num_slots = 0;                                // partial slots that exist
  std::int32_t* query_start_loc = nullptr;                   // [num_seqs + 1], as planned
  std::int32_t* seq_lens = nullptr;                          // [num_seqs], as planned
  std::array<std::int64_t*, kMaxTileClasses> cost_before{};  // [num_seqs + 1]
  std::array<WorkStart*, kMaxTileClasses> starts{};          // [workers / head_lanes + 1]
  std::array<FirstPiece*, kMaxTileClasses> first_pieces{};   // [workers / head_lanes]
  // [workers], for kernels whose thread blocks merge tiles themselves: of the tile that a worker
  // starts and does not end, who has left a partial (see Meeting); 0 before and after an attend.
  std::array<std::uint64_t*, kMaxTileClasses> arrivals{};
  std::array<std::int32_t, kMaxTileClasses> first_slot{};  // each class has slots of its own
  std::int32_t* slot_before = nullptr;  // kBatchInvariant: [num_seqs], the sequence's first slot
  // Partials: a slot of a class has tile_rows rows for each of tile_heads KV heads; a class's first
  // row is first_partial_row.
  std::array<std::int64_t, kMaxTileClasses> first_partial_row{};
  float* partial_acc = nullptr;                 // [partial rows, partial_stride]
  core::SoftmaxState* partial_state = nullptr;  // [partial rows]
  std::int64_t partial_stride = 0;              // next_power_of_2(head_size_v)
  std::byte* scratch = nullptr;                 // [threads, scratch_bytes]
};

}  // namespace detail

// Bytes of workspace that plans of this key within these maxima need on this backend: tables,
// partials and the threads' scratch. Nothing else is allocated by attend. Throws Error.
std::int64_t workspace_bytes(const Backend& backend, const PlanKey& key, const PlanMaxima& maxima);

// A plan for one batch. It points into the workspace it was made in and stays good until the next
// make_plan there; it owns nothing.
class Plan {
 public:
  Plan() = default;

  const PlanKey& key() const { return key_; }
  // The tile classes up to the last that can have work; of the others max_seq_rows is 0 if they
  // cannot.
  const ScheduleLimits& limits() const { return limits_; }
  const detail::PlanTables& tables() const { return tables_; }
  // The batch's, 0 where it was not known.
  std::int64_t max_query_len() const { return max_query_len_; }
  // A hash of the batch's causal_per_seq, prefix_lens and mm_ranges, where they are on the host.
  std::uint64_t mask_fingerprint() const { return mask_fingerprint_; }
  // Where the batch and the workspace are.
  const Device& device() const { return device_; }

  // The pieces of work in the order the workers walk them; `batch` is the one planned for (its
  // causal_per_seq, prefix_lens and mm_ranges are read again). Host memory only. Throws Error for
  // an empty plan or another batch.
  std::vector<WorkItem> work_items(const Batch& batch) const;

 private:
  friend Plan make_plan(const Backend&, const PlanKey&, const PlanMaxima&, const Batch&,
                        const TensorView&, Stream);

  PlanKey key_;
  ScheduleLimits limits_;
  detail::PlanTables tables_;
  Device device_;
  std::int64_t max_query_len_ = 0;
  std::uint64_t mask_fingerprint_ = 0;
};

// Plans the batch in `workspace` (uint8 [workspace_bytes()], 64-byte aligned).
// Throws Error if the batch is malformed or exceeds the maxima, or the workspace is too small.
Plan make_plan(const Backend& backend, const PlanKey& key, const PlanMaxima& maxima,
               const Batch& batch, const TensorView& workspace, Stream stream = {});

}  // namespace diffkv
