// Partials to output rows: a warp merges one row of a cut tile, in the order of its keys. Bound by
// memory latency, so the parts' weights are found by the lanes at once and then many parts' loads
// are under way together.
#include <cstdint>

#include "core/softmax.h"
#include "cuda/device.h"
#include "cuda/kv_codec.cuh"
#include "cuda/row_io.cuh"
#include "cuda/stages.h"
#include "plan/schedule.h"

namespace diffkv::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kRowsPerBlock = 4;
constexpr int kVector = 4;  // floats a lane loads at once
constexpr std::uint32_t kAllLanes = 0xffffffffU;

// Parts of a tile in the order of their keys, 32 at a time: lane i knows part i's slot.
class Parts {
 public:
  __device__ Parts(const plan::ScheduleView& view, std::int32_t tile_class, std::int32_t worker,
                   const plan::Piece& first)
      : view_(view), tile_class_(tile_class), worker_(worker), piece_(first) {}

  // The slot of part `first_part + lane`, -1 past the last. Calls must go up in steps of 32.
  __device__ std::int32_t slots_from(std::int32_t first_part, int lane) {
    return view_.policy == SchedulePolicy::kBatchInvariant ? invariant_slots(lane)
                                                           : balanced_slots(first_part + lane);
  }

 private:
  // The shares after the first that start inside this tile, as for_each_partial walks them.
  __device__ std::int32_t balanced_slots(std::int32_t part) {
    if (part == 0) return piece_.slot;
    const plan::Lane lane = plan::lane_of(view_, tile_class_, worker_);
    const std::int32_t share = lane.share + part;
    const plan::WorkStart* starts = view_.tables.starts[tile_class_];
    if (share >= lane.shares) return -1;
    const plan::WorkStart tile{piece_.seq, piece_.line_index, 0};
    if (!plan::same_tile(starts[share], tile) || starts[share].block == 0) return -1;
    if (!plan::before(starts[share], starts[share + 1])) return kNoPart;
    return view_.tables.first_slot[tile_class_] + 2 * lane.worker(share);
  }

  __device__ std::int32_t invariant_slots(int lane) {
    std::int32_t own = -1;
    std::int32_t count = 0;
    const plan::SeqMask seq = plan::seq_mask(view_, piece_.seq);
    const plan::InvariantCut cut =
        plan::invariant_cut(view_, plan::seq_tiles(view_, seq.query_len), seq);
    while (!done_ && count < kWarp) {
      if (count++ == lane) own = plan::slot_of(view_, tile_class_, worker_, cut, piece_);
      done_ = piece_.last();
      piece_.begin_block = piece_.end_block;
      if (!done_)
        piece_.end_block = plan::invariant_piece_end(cut, piece_.tile, piece_.begin_block);
    }
    return own;
  }

 public:
  static constexpr std::int32_t kNoPart = -2;  // an empty share: no part, but others may follow

 private:
  const plan::ScheduleView& view_;
  std::int32_t tile_class_;
  std::int32_t worker_;
  plan::Piece piece_;
  bool done_ = false;
};

__device__ float warp_max(float x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lanes));
  }
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

template <int kVectors>
__device__ void combine_row(const AttendKernelParams& p, std::int32_t tile_class,
                            std::int32_t worker, const plan::Piece& first, std::int32_t row,
                            int lane) {
  const plan::ScheduleView& view = p.schedule;
  const detail::PlanTables& tables = view.tables;
  const RowPlace place = row_place(view, first, row);
  if (place.token >= tables.num_tokens) return;
  Columns<kVectors> acc{};
  core::SoftmaxState state;
  Parts parts(view, tile_class, worker, first);
  for (std::int32_t part = 0;; part += kWarp) {
    const std::int32_t slot = parts.slots_from(part, lane);
    // Parts are contiguous: the first lane without one ends them.
    const std::uint32_t ends = __ballot_sync(kAllLanes, slot == -1);
    const int count = ends == 0 ? kWarp : __ffs(static_cast<int>(ends)) - 1;
    core::SoftmaxState own;
    std::int64_t own_row = 0;
    if (lane < count && slot >= 0) {
      own_row = plan::partial_row(view, tile_class, slot, row);
      own.max = __ldcg(tables.partial_max + own_row);
      own.sum = __ldcg(tables.partial_sum + own_row);
    }
    // All weights against one maximum; then sums in the order of the parts.
    const float max = fmaxf(state.max, warp_max(own.max));
    const float keep = core::exp_difference(state.max, max);
    const float weight = core::exp_difference(own.max, max);
    // A NaN score leaves the max alone but makes the sum NaN, also of a part whose max is -inf.
    const float weighted = own.sum != own.sum ? own.sum : own.sum * weight;
    float sum = state.sum != state.sum ? state.sum : state.sum * keep;
    float kept = keep;
    // Parts' rows are loaded several at a time: one after another, each would cost the latency of
    // memory.
    constexpr int kBatch = kVectors == 1 ? 8 : kVectors == 2 ? 4 : 2;
    for (int i = 0; i < count; i += kBatch) {
      Columns<kVectors> rows[kBatch];
      float add[kBatch];
      bool there[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int source = min(i + j, kWarp - 1);
        const std::int64_t at = __shfl_sync(kAllLanes, own_row, source);
        const std::int32_t slot_there = __shfl_sync(kAllLanes, slot, source);
        there[j] = i + j < count && slot_there >= 0;
        add[j] = __shfl_sync(kAllLanes, weight, source);
        const float sum_there = __shfl_sync(kAllLanes, weighted, source);
        if (i + j < count) sum += sum_there;
        rows[j].load(tables.partial_acc + at * tables.partial_stride, lane,
                     there[j] ? p.head_size_v : 0);
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (!there[j]) continue;
        acc.scale_and_add(kept, add[j], rows[j]);
        kept = 1.0F;
      }
    }
    state.max = max;
    state.sum = sum;
    if (count < kWarp) break;
  }
  const RowEnd end = finish_row(p, place.token, place.head, first.tile.kv_head, state, lane == 0);
  std::byte* to = row_at(p.output, place.token, place.head);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const std::int32_t column = (i * kWarp + lane) * kVector;
    if (column >= p.head_size_v) continue;
    const float x[kVector] = {end(acc.x[i].x), end(acc.x[i].y), end(acc.x[i].z), end(acc.x[i].w)};
    core::store_row(p.output.dtype, x, kVector, to + column * size_of(p.output.dtype));
  }
}

// Blocks that share the rows of one tile: all classes are launched, whatever work they have, so a
// block must be worth its start.
constexpr int kMostRowBlocks = 8;
__host__ __device__ std::int32_t row_blocks(const TileClass& cls) {
  const std::int32_t blocks = (cls.tile_rows + kRowsPerBlock - 1) / kRowsPerBlock;
  return blocks < kMostRowBlocks ? blocks : kMostRowBlocks;
}

// Block: worker of all classes, part of its tile's rows.
template <int kVectors>
__global__ void __launch_bounds__(kWarp* kRowsPerBlock)
    combine_kernel(const __grid_constant__ AttendKernelParams p) {
  auto block = static_cast<std::int32_t>(blockIdx.x);
  std::int32_t tile_class = 0;
  std::int32_t parts = row_blocks(p.schedule.limits.classes[0]);
  while (block >= p.schedule.limits.classes[tile_class].workers * parts) {
    block -= p.schedule.limits.classes[tile_class++].workers * parts;
    parts = row_blocks(p.schedule.limits.classes[tile_class]);
  }
  const std::int32_t worker = block / parts;
  const std::int32_t part = block - worker * parts;
  const auto warp = static_cast<std::int32_t>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  plan::for_each_cut_tile(p.schedule, tile_class, worker, [&](const plan::Piece& first) {
    for (std::int32_t row = part * kRowsPerBlock + warp; row < first.tile.num_rows;
         row += parts * kRowsPerBlock) {
      combine_row<kVectors>(p, tile_class, worker, first, row, lane);
    }
  });
}

}  // namespace

void combine(const AttendKernelParams& params, cudaStream_t stream) {
  const ScheduleLimits& limits = params.schedule.limits;
  if (params.schedule.tables.num_slots == 0) return;
  std::int32_t blocks = 0;
  for (std::int32_t c = 0; c < limits.num_classes; ++c) {
    blocks += limits.classes[c].workers * row_blocks(limits.classes[c]);
  }
  const std::int32_t vectors = (params.head_size_v + kWarp * kVector - 1) / (kWarp * kVector);
  const auto kernel = vectors == 1   ? combine_kernel<1>
                      : vectors == 2 ? combine_kernel<2>
                                     : combine_kernel<5>;  // 576 and less
  kernel<<<static_cast<unsigned>(blocks), kWarp * kRowsPerBlock, 0, stream>>>(params);
  check(cudaGetLastError(), "combine");
}

}  // namespace diffkv::cuda
