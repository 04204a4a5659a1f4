// Partials to output rows. The workers that share a cut tile divide its rows among their thread
// blocks, so that a tile in many parts is merged by many blocks, and a block's warps divide its
// rows or, of tiles in many parts, their parts. What is left is the latency of memory: what a block
// loads depends on what it loaded before as seldom as possible.
#include <algorithm>
#include <cstdint>

#include "core/softmax.h"
#include "cuda/dependent_launch.cuh"
#include "cuda/device.h"
#include "cuda/kv_codec.cuh"
#include "cuda/launch.h"
#include "cuda/row_io.cuh"
#include "cuda/stages.h"
#include "plan/parts.h"
#include "plan/schedule.h"

namespace diffkv::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kVector = 4;  // floats a lane loads at once
constexpr std::uint32_t kAllLanes = 0xffffffffU;

__device__ float warp_max(float x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lanes));
  }
  return x;
}

__device__ float warp_sum(float x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

// A row's accumulator, spread over the lanes: vector i of lane l holds columns
// (i * 32 + l) * 4 and on.
template <int kVectors>
struct Columns {
  float4 x[kVectors];

  __device__ void load(const float* row, int lane, std::int32_t size) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const std::int32_t column = (i * kWarp + lane) * kVector;
      x[i] = column < size ? __ldcg(reinterpret_cast<const float4*>(row + column))
                           : make_float4(0.0F, 0.0F, 0.0F, 0.0F);
    }
  }

  __device__ void scale_and_add(float keep, float add, const Columns& part) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      x[i].x = x[i].x * keep + part.x[i].x * add;
      x[i].y = x[i].y * keep + part.x[i].y * add;
      x[i].z = x[i].z * keep + part.x[i].z * add;
      x[i].w = x[i].w * keep + part.x[i].w * add;
    }
  }
};

// Some parts of a row, merged.
template <int kVectors>
struct Merged {
  core::SoftmaxState state;
  Columns<kVectors> acc{};
};

// What the warps of a block that share a row leave for the one that merges them.
template <int kVectors>
struct Shared {
  float4 acc[kWarps][kVectors][kWarp];
  float max[kWarps];
  float sum[kWarps];
};

// Parts first, first + step, ... of a row, in this order, by one warp.
template <int kVectors, class Parts>
__device__ Merged<kVectors> merge_parts(const AttendKernelParams& p, std::int32_t tile_class,
                                        const Parts& parts, plan::Tile::Row row, std::int32_t first,
                                        std::int32_t step) {
  // Rows that are loaded at a time: one after another, each would cost the latency of memory.
  constexpr int kBatch = kVectors == 1 ? 8 : kVectors == 2 ? 4 : 2;
  static_assert(kWarp % kBatch == 0);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const detail::PlanTables& tables = p.schedule.tables;
  Merged<kVectors> merged;
#pragma unroll 1
  for (; first < parts.count; first += kWarp * step) {
    // Lane i knows part i's slot and state; lanes without a part repeat the first one's row.
    const int count = min(plan::divide(parts.count - first - 1, step) + 1, kWarp);
    const std::int32_t slot = lane < count ? parts.slot(first + lane * step) : plan::kNoSlot;
    const std::uint32_t there = __ballot_sync(kAllLanes, slot >= 0);
    const std::int64_t own_row = plan::partial_row(
        p.schedule, tile_class, slot >= 0 ? slot : parts.slot(0), row.row, row.head);
    core::SoftmaxState own;
    if (slot >= 0) {
      const float2 state = __ldcg(reinterpret_cast<const float2*>(tables.partial_state + own_row));
      own = {state.x, state.y};
    }
    Columns<kVectors> rows[kBatch];
    const auto load = [&](int i) {
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const std::int64_t at = __shfl_sync(kAllLanes, own_row, i + j);
        rows[j].load(tables.partial_acc + at * tables.partial_stride, lane, p.head_size_v);
      }
    };
    load(0);
    // All weights against one maximum.
    const float max = fmaxf(merged.state.max, warp_max(own.max));
    const float weight = core::exp_difference(own.max, max);
    float keep = core::exp_difference(merged.state.max, max);
    // A NaN score leaves the max alone but makes the sum NaN, also of a part whose max is -inf.
    const float added = warp_sum(own.sum != own.sum ? own.sum : own.sum * weight);
    const float kept =
        merged.state.sum != merged.state.sum ? merged.state.sum : merged.state.sum * keep;
    merged.state = {max, kept + added};
#pragma unroll 1
    for (int i = 0; i < count; i += kBatch) {
      if (i > 0) load(i);
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const float add = __shfl_sync(kAllLanes, weight, i + j);
        if ((there >> (i + j) & 1U) == 0) continue;
        merged.acc.scale_and_add(keep, add, rows[j]);
        keep = 1.0F;
      }
    }
  }
  return merged;
}

template <int kVectors>
__device__ void write_row(const AttendKernelParams& p, const RowPlace& place,
                          const RowScales& scales, const Merged<kVectors>& merged) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const RowEnd end = finish_row(p, place.token, place.head, scales, merged.state, lane == 0);
  std::byte* to = row_at(p.output, place.token, place.head);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const std::int32_t column = (i * kWarp + lane) * kVector;
    if (column >= p.head_size_v) continue;
    const float4 acc = merged.acc.x[i];
    store_four(p.output.dtype, make_float4(end(acc.x), end(acc.y), end(acc.z), end(acc.w)),
               to + column * size_of(p.output.dtype));
  }
}

// Some rows of a tile: of every `step` rows `width` neighbouring ones, from `first` on; of these,
// every `blocks`th from number `block` on.
struct RowSet {
  std::int32_t first;
  std::int32_t width;
  std::int32_t step;
  std::int32_t block = 0;
  std::int32_t blocks = 1;

  __device__ std::int32_t count(std::int32_t num_rows) const {
    const std::int32_t full = plan::divide(num_rows, step);
    const std::int32_t rest = num_rows - full * step - first;
    const std::int32_t all = full * width + max(0, min(rest, width));
    return all > block ? plan::divide(all - block - 1, blocks) + 1 : 0;
  }
  __device__ std::int32_t row(std::int32_t index) const {
    const std::int32_t of_all = block + index * blocks;
    const std::int32_t group = plan::divide(of_all, width);
    return first + group * step + of_all - group * width;
  }
};

// A set of rows of a cut tile, by the whole block.
template <int kVectors, class Parts>
__device__ void merge_rows(const AttendKernelParams& p, std::int32_t tile_class,
                           const plan::Piece& piece, const Parts& parts, const RowSet& set,
                           Shared<kVectors>& shared) {
  const std::int32_t rows = set.count(piece.tile.num_heads * piece.tile.num_rows);
  if (rows == 0) return;
  // Warps that share a row: this depends on the tile alone, and so do the sums.
  int sharing = 1;
  while (sharing < kWarps && 8 * sharing <= parts.count) sharing *= 2;
  const auto warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int member = warp % sharing;
#pragma unroll 1
  for (std::int32_t first = 0; first < rows; first += kWarps / sharing) {
    const std::int32_t index = first + warp / sharing;
    const std::int32_t row = set.row(min(index, rows - 1));
    const plan::Tile::Row at = plan::Tile::row_of(piece.tile.num_heads, piece.tile.num_rows, row);
    const RowPlace place = row_place(p.schedule, piece, at.head, at.row);
    const bool live = index < rows && place.token < p.schedule.tables.num_tokens;
    RowScales scales{};
    Merged<kVectors> merged;
    if (live) {
      scales = row_scales(p, place.head, piece.tile.kv_head + at.head);
      merged = merge_parts<kVectors>(p, tile_class, parts, at, member, sharing);
    }
    if (sharing > 1) {
      __syncthreads();  // a former tile's have been read
#pragma unroll
      for (int i = 0; i < kVectors; ++i) shared.acc[warp][i][lane] = merged.acc.x[i];
      if (lane == 0) {
        shared.max[warp] = merged.state.max;
        shared.sum[warp] = merged.state.sum;
      }
      __syncthreads();
      if (member > 0) continue;
#pragma unroll 1
      for (int other = 1; other < sharing; ++other) {
        Columns<kVectors> acc;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) acc.x[i] = shared.acc[warp + other][i][lane];
        float keep = 0.0F;
        float add = 0.0F;
        core::merge(merged.state, {shared.max[warp + other], shared.sum[warp + other]}, keep, add);
        merged.acc.scale_and_add(keep, add, acc);
      }
    }
    if (live) write_row(p, place, scales, merged);
  }
}

// Blocks of a worker that divide the rows of a tile among them.
__host__ __device__ std::int32_t row_blocks(const TileClass& cls) {
  constexpr std::int32_t kRowsPerBlock = 16;
  constexpr std::int32_t kMost = 4;
  const std::int32_t blocks = cls.tile_rows * cls.tile_heads / kRowsPerBlock;
  return blocks < 1 ? 1 : blocks < kMost ? blocks : kMost;
}

// Blocks of a worker: a balanced share can cut two tiles, for each of which it has some.
__host__ __device__ std::int32_t worker_blocks(SchedulePolicy policy, const TileClass& cls) {
  return (policy == SchedulePolicy::kBalanced ? 2 : 1) * row_blocks(cls);
}

// Block `at_end ? 1 : 0` of a share: its part of the rows of the tile that it starts inside of, or
// of the one that it starts and does not end.
template <int kVectors>
__device__ void combine_share(const AttendKernelParams& p, std::int32_t tile_class,
                              std::int32_t worker, bool at_end, std::int32_t row_block,
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
  plan::Piece piece;
  piece.seq = tile.seq;
  piece.tile = plan::tile_rows(view, tiles, tile.tile);
  piece.tile.kv_head = lane.head_group(piece.tile.head_group) * piece.tile.num_heads;
  const RowSet rows{up_to_own, 1, parts.count, row_block,
                    row_blocks(view.limits.classes[tile_class])};
  merge_rows<kVectors>(p, tile_class, piece, parts, rows, shared);
}

// Of each cut tile of which the worker had some parts, as many rows. Which these are is found out
// before attend has ended, where this block starts early enough.
template <int kVectors>
__device__ void combine_worker(const AttendKernelParams& p, std::int32_t tile_class,
                               std::int32_t worker, std::int32_t row_block, std::int32_t blocks,
                               Shared<kVectors>& shared) {
  bool waited = false;
  // If attend has counted already, which it need not have.
  const auto* pieces =
      static_cast<volatile std::int32_t*>(p.schedule.tables.cut_pieces[tile_class] + worker);
  if (*pieces == 0) return wait_for_earlier_kernels();
  plan::for_each_cut_run(p.schedule, tile_class, worker, [&](const plan::Piece& piece) {
    const plan::SeqMask seq = plan::seq_mask(p.schedule, piece.seq);
    const plan::SeqTiles tiles = plan::seq_tiles(p.schedule, seq.query_len);
    const plan::InvariantCut cut = plan::invariant_cut(p.schedule, tiles, seq);
    const plan::InvariantParts parts(p.schedule, cut, piece);
    const std::int32_t first = parts.part_of(cut, piece.tile, piece.begin_block);
    const std::int32_t last = parts.part_of(cut, piece.tile, piece.end_block - 1);
    if (!waited) wait_for_earlier_kernels();
    waited = true;
    const RowSet rows{first, last - first + 1, parts.count, row_block, blocks};
    merge_rows<kVectors>(p, tile_class, piece, parts, rows, shared);
  });
  if (!waited) wait_for_earlier_kernels();
}

// Blocks: of all classes, of their workers, of the worker's work.
template <int kVectors, SchedulePolicy kPolicy>
__global__ void __launch_bounds__(kThreads, kVectors == 1 ? 3 : 2)
    combine_kernel(const __grid_constant__ AttendKernelParams p) {
  __shared__ Shared<kVectors> shared;
  let_next_kernel_start();
  auto block = static_cast<std::int32_t>(blockIdx.x);
  std::int32_t tile_class = 0;
  std::int32_t blocks = worker_blocks(kPolicy, p.schedule.limits.classes[0]);
  while (block >= p.schedule.limits.classes[tile_class].workers * blocks) {
    block -= p.schedule.limits.classes[tile_class++].workers * blocks;
    blocks = worker_blocks(kPolicy, p.schedule.limits.classes[tile_class]);
  }
  const std::int32_t worker = plan::divide(block, blocks);
  const std::int32_t of_worker = block - worker * blocks;
  if constexpr (kPolicy == SchedulePolicy::kBalanced) {
    wait_for_earlier_kernels();
    combine_share<kVectors>(p, tile_class, worker, of_worker % 2 != 0, of_worker / 2, shared);
  } else {
    combine_worker<kVectors>(p, tile_class, worker, of_worker, blocks, shared);
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
  std::int32_t blocks = 0;
  for (std::int32_t c = 0; c < limits.num_classes; ++c) {
    blocks += limits.classes[c].workers * worker_blocks(params.schedule.policy, limits.classes[c]);
  }
  const Kernel kernel = params.schedule.policy == SchedulePolicy::kBalanced
                            ? kernel_for<SchedulePolicy::kBalanced>(params.head_size_v)
                            : kernel_for<SchedulePolicy::kBatchInvariant>(params.head_size_v);
  launch_early(gpu, "combine", kernel, {static_cast<unsigned>(blocks), kThreads}, stream, params);
}

}  // namespace diffkv::cuda
