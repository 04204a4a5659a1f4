// Partials to output rows. What is left of it is the latency of memory: what is loaded depends on
// what was loaded before as seldom as possible. Of a balanced plan the shares that have parts of a
// tile divide its rows among their thread blocks. Of a batch-invariant plan, which says of each
// sequence how it is cut, few blocks have all rows in turn: as many as find room beside those of
// 192/128 decode, and so little shared memory as is left there. When attend ends they have found
// out which rows they begin with; blocks that came later would start behind them.
#include <cstdint>

#include "cuda/combine_rows.cuh"
#include "cuda/dependent_launch.cuh"
#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/merged_row.cuh"
#include "cuda/stages.h"
#include "cuda/warp.cuh"
#include "plan/parts.h"
#include "plan/quotient.h"
#include "plan/schedule.h"

namespace diffkv::cuda {
namespace {

using namespace combining;

// Of a batch-invariant plan: rows of a tile that the warps of a block merge at the same time.
struct Round {
  // By number among all of a sequence's.
  std::int32_t seq;
  std::int32_t index;
  std::int32_t sharing;    // warps that share a row
  std::int32_t slot_rows;  // of the partials, from one slot to the next
  plan::InvariantParts parts;
};

// A warp's row of a round.
struct RoundRow {
  MergedRow out;
  std::int64_t first_row = 0;  // of the partials: of part 0
};

constexpr int kMostRounds = 6;  // that a block gets ready for at a time

template <int kVectors>
struct Shared {
  SharedSums<kVectors> sums;
  // Of a batch-invariant plan: this block's next rounds, and sums of their numbers.
  Round rounds[kMostRounds];
  RoundRow rows[kMostRounds][kWarps];
  std::int32_t rounds_of_warp[kWarps];
};

// Blocks of a share for each tile that it cuts, of which there can be two.
__host__ __device__ std::int32_t blocks_of_cut(const TileClass& cls) {
  constexpr std::int32_t kRowsPerBlock = 16;
  constexpr std::int32_t kMost = 4;
  const std::int32_t blocks = cls.tile_rows * cls.tile_heads / kRowsPerBlock;
  return blocks < 1 ? 1 : blocks < kMost ? blocks : kMost;
}

// Block `of_cut` of a share's for the tile that it starts inside of or, `at_end`, for the one that
// it starts and does not end.
template <int kVectors>
__device__ void combine_share(const AttendKernelParams& p, std::int32_t tile_class,
                              std::int32_t worker, bool at_end, std::int32_t of_cut,
                              Shared<kVectors>& shared) {
  const plan::ScheduleView& view = p.schedule;
  const plan::WorkStart* starts = view.tables.starts[tile_class];
  const plan::Lane lane = plan::lane_of(view, tile_class, worker);
  const auto thread = static_cast<std::int32_t>(threadIdx.x);
  // All are loaded before it is known that they matter.
  const plan::WorkStart begin = starts[lane.share];
  const plan::WorkStart end = starts[lane.share + 1];
  plan::WorkStart other = starts[min(thread, lane.shares - 1)];
  const plan::WorkStart tile = at_end ? end : begin;
  if (tile.block == 0 || tile.seq >= view.num_seqs) return;
  if (at_end && plan::starts_inside(begin, tile)) return;  // that is its first tile
  const std::int32_t first_token = view.tables.query_start_loc[tile.seq];
  const std::int32_t end_token = view.tables.query_start_loc[tile.seq + 1];

  std::int32_t up_to_own = 0;  // shares that start inside the tile
  std::int32_t later = 0;
#pragma unroll 1
  for (std::int32_t share = thread;; other = starts[min(share, lane.shares - 1)]) {
    const bool inside = share < lane.shares && plan::starts_inside(other, tile);
    up_to_own += __syncthreads_count(inside && share <= lane.share);
    later += __syncthreads_count(inside && share > lane.share);
    share += kThreads;
    if (share - thread >= lane.shares) break;
  }
  const plan::BalancedParts parts{starts, lane, view.tables.first_slot[tile_class],
                                  lane.share - up_to_own, 1 + up_to_own + later};

  const plan::SeqTiles tiles = plan::seq_tiles(view, end_token - first_token);
  if (tile.tile >= tiles.tiles_per_head * lane.head_groups) return;
  plan::Tile cut = plan::tile_rows(view, tiles, tile.tile);
  cut.kv_head = lane.head_group(cut.head_group) * cut.num_heads;
  const int sharing = warps_of_row(parts.count);
  const std::int32_t at_once = kWarps / sharing;
  const std::int32_t blocks = blocks_of_cut(view.limits.classes[tile_class]);
  const std::int32_t rows = cut.num_heads * cut.num_rows;
  const std::int64_t first_row = plan::partial_row(view, tile_class, parts.first_slot, 0);
#pragma unroll 1
  for (std::int32_t first = (up_to_own * blocks + of_cut) * at_once; first < rows;
       first += parts.count * blocks * at_once) {
    const std::int32_t row = first + warp_of_block() / sharing;
    const plan::Tile::Row at = plan::Tile::row_of(cut.num_heads, cut.num_rows, row);
    MergedRow out;
    if (row < rows) out = {p, first_token, cut.kv_head + at.head, cut.first_row + at.row};
    merge_rows(p, sharing, out, first_row, parts.count, shared.sums, [&](std::int32_t part) {
      const std::int32_t slot = parts.slot(part);
      if (slot == plan::kNoSlot) return kNoRow;
      return static_cast<std::int32_t>(plan::partial_row(view, tile_class, slot, at.row, at.head) -
                                       first_row);
    });
  }
}

// How many rows of a sequence's cut tiles are merged at a time, of a batch-invariant plan.
struct RoundSize {
  int sharing;
  std::int32_t rows;
  std::int32_t per_tile;  // rounds that a full tile takes

  __device__ RoundSize(const TileClass& cls, const plan::CutSequence& seq)
      : sharing(warps_of_row(seq.cut.slots_per_tile)), rows(kWarps / sharing) {
    per_tile = plan::divide(min(seq.tiles.rows, cls.tile_rows) * cls.tile_heads + rows - 1, rows);
  }
};

// What a warp does of a round. Warp 0 also completes what all have in common.
__device__ RoundRow round_row(const AttendKernelParams& p, Round& round, int warp) {
  const plan::ScheduleView& view = p.schedule;
  const plan::CutSequence seq(view, round.seq);
  const TileClass& cls = view.limits.classes[seq.tiles.tile_class];
  const RoundSize size(cls, seq);
  const std::int32_t tile_index = plan::divide(round.index, size.per_tile);
  const plan::Piece piece = seq.tile(view, tile_index);
  const plan::InvariantParts parts(view, seq.cut, piece);
  if (warp == 0) {
    round.sharing = size.sharing;
    round.slot_rows = cls.tile_heads * cls.tile_rows;
    round.parts = parts;
  }
  RoundRow row;
  const plan::Tile& tile = piece.tile;
  const std::int32_t in_tile =
      (round.index - tile_index * size.per_tile) * size.rows + warp / size.sharing;
  // A tile in one part attend has written.
  if (parts.count <= 1 || in_tile >= tile.num_heads * tile.num_rows) return row;
  const plan::Tile::Row at = plan::Tile::row_of(tile.num_heads, tile.num_rows, in_tile);
  row.out = {p, view.tables.query_start_loc[seq.seq], tile.kv_head + at.head,
             tile.first_row + at.row};
  row.first_row = plan::partial_row(view, seq.tiles.tile_class, parts.first_slot, at.row, at.head);
  return row;
}

// This block's rounds of a batch-invariant plan: of all of the batch, every gridDim.x-th. They are
// found by a thread a sequence, and then by a thread a row: the first ones before attend has ended.
template <int kVectors>
__device__ void combine_rounds(const AttendKernelParams& p, Shared<kVectors>& shared) {
  const plan::ScheduleView& view = p.schedule;
  const auto thread = static_cast<std::int32_t>(threadIdx.x);
  const auto blocks = static_cast<std::int32_t>(gridDim.x);
  const int warp = warp_of_block();
  bool waited = false;
  std::int32_t begin = 0;                             // the first round of these sequences
  auto next = static_cast<std::int32_t>(blockIdx.x);  // this block's next round
#pragma unroll 1
  for (std::int32_t first = 0; first < view.num_seqs; first += kThreads) {
    const std::int32_t seq = first + thread;
    std::int32_t own = 0;  // rounds of this thread's sequence
    if (seq < view.num_seqs) {
      const plan::CutSequence cut(view, seq);
      const std::int32_t tiles = cut.num_tiles();
      if (tiles > 0) {
        own = tiles * RoundSize(view.limits.classes[cut.tiles.tile_class], cut).per_tile;
      }
    }
    std::int32_t own_end = begin + sum_up_to_lane(own);
    if (lane_of_warp() == kWarp - 1) shared.rounds_of_warp[warp] = own_end - begin;
    __syncthreads();
    std::int32_t end = begin;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp) own_end += end - begin;
      end += shared.rounds_of_warp[w];
    }
#pragma unroll 1
    while (next < end) {
      // At most so many rounds at a time.
      const std::int32_t count = min(plan::divide(end - next - 1, blocks) + 1, kMostRounds);
      const std::int32_t own_begin = own_end - own;
      std::int32_t i = own_begin > next ? plan::divide(own_begin - next - 1, blocks) + 1 : 0;
      for (; i < count && next + i * blocks < own_end; ++i) {
        shared.rounds[i].seq = seq;
        shared.rounds[i].index = next + i * blocks - own_begin;
      }
      __syncthreads();
      if (const int r = thread / kWarps; r < count) {
        shared.rows[r][thread % kWarps] = round_row(p, shared.rounds[r], thread % kWarps);
      }
      __syncthreads();
      if (!waited) wait_for_earlier_kernels();
      waited = true;
#pragma unroll 1
      for (int r = 0; r < count; ++r) {
        const Round& round = shared.rounds[r];
        const RoundRow& row = shared.rows[r][warp];
        merge_rows(
            p, round.sharing, row.out, row.first_row, round.parts.count, shared.sums,
            [&](std::int32_t part) { return round.parts.slot_in_tile(part) * round.slot_rows; });
      }
      next += count * blocks;
      __syncthreads();  // the list has been read
    }
    begin = end;
    __syncthreads();  // the sums have been read
  }
  if (!waited && blockIdx.x == 0) wait_for_earlier_kernels();
}

template <int kVectors, SchedulePolicy kPolicy>
__global__ void __launch_bounds__(kThreads,
                                  kVectors == 1 && kPolicy == SchedulePolicy::kBatchInvariant ? 3
                                                                                              : 2)
    combine_kernel(const __grid_constant__ AttendKernelParams p) {
  __shared__ Shared<kVectors> shared;
  let_next_kernel_start();
  if constexpr (kPolicy == SchedulePolicy::kBatchInvariant) {
    combine_rounds<kVectors>(p, shared);
  } else {
    // Blocks: of all classes, of their shares, of both ends of a share.
    auto block = static_cast<std::int32_t>(blockIdx.x);
    std::int32_t tile_class = 0;
    std::int32_t of_worker = 2 * blocks_of_cut(p.schedule.limits.classes[0]);
    while (block >= p.schedule.limits.classes[tile_class].workers * of_worker) {
      block -= p.schedule.limits.classes[tile_class++].workers * of_worker;
      of_worker = 2 * blocks_of_cut(p.schedule.limits.classes[tile_class]);
    }
    const std::int32_t worker = plan::divide(block, of_worker);
    const std::int32_t index = block - worker * of_worker;
    wait_for_earlier_kernels();
    combine_share<kVectors>(p, tile_class, worker, index % 2 != 0, index / 2, shared);
  }
}

using Kernel = void (*)(AttendKernelParams);

template <SchedulePolicy kPolicy>
Kernel kernel_for(std::int32_t head_size_v) {
  const std::int32_t vectors = (head_size_v + kWarp * kVector - 1) / (kWarp * kVector);
  return vectors == 1   ? combine_kernel<1, kPolicy>
         : vectors == 2 ? combine_kernel<2, kPolicy>
                        : combine_kernel<5, kPolicy>;  // 576 and less
}

}  // namespace

void combine(const AttendKernelParams& params, const Gpu& gpu, cudaStream_t stream) {
  const ScheduleLimits& limits = params.schedule.limits;
  if (params.schedule.tables.num_slots == 0) return;
  Kernel kernel = kernel_for<SchedulePolicy::kBatchInvariant>(params.head_size_v);
  std::int32_t blocks = gpu.num_sms;
  if (params.schedule.policy == SchedulePolicy::kBalanced) {
    kernel = kernel_for<SchedulePolicy::kBalanced>(params.head_size_v);
    blocks = 0;
    for (std::int32_t c = 0; c < limits.num_classes; ++c) {
      blocks += limits.classes[c].workers * 2 * blocks_of_cut(limits.classes[c]);
    }
  }
  launch_early(gpu, "combine", kernel, {static_cast<unsigned>(blocks), kThreads}, stream, params);
}

}  // namespace diffkv::cuda
