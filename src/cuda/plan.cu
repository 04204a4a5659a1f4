// The planner on the device: the same arithmetic as plan_on_host, by one thread block. Lengths are
// in device memory, where nobody could check them: here they are made safe for all later kernels.
#include <cstdint>

#include "cuda/dependent_launch.cuh"
#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/stages.h"
#include "plan/schedule.h"
#include "plan/shares.h"
#include "plan/walk.h"

namespace diffkv::cuda {
namespace {

constexpr int kMostThreads = 1024;
constexpr int kWarp = 32;

// Sums that run along the sequences.
struct Sums {
  std::int64_t cost[kMaxTileClasses];
  std::int32_t slots[kMaxTileClasses];

  __device__ Sums& operator+=(const Sums& other) {
#pragma unroll
    for (int c = 0; c < kMaxTileClasses; ++c) {
      cost[c] += other.cost[c];
      slots[c] += other.slots[c];
    }
    return *this;
  }
};

__device__ Sums shuffle_up(const Sums& sums, int lanes) {
  Sums result;
#pragma unroll
  for (int c = 0; c < kMaxTileClasses; ++c) {
    result.cost[c] = __shfl_up_sync(0xffffffffU, sums.cost[c], lanes);
    result.slots[c] = __shfl_up_sync(0xffffffffU, sums.slots[c], lanes);
  }
  return result;
}

struct PlanSource {
  const std::int32_t* query_start_loc;  // [num_seqs + 1]
  std::int64_t query_start_loc_stride;
  const std::int32_t* seq_lens;  // [num_seqs]
  std::int64_t seq_lens_stride;
};

// What all threads before this one have, of a value each has; called by the whole block. `zero` is
// neutral. Totals of warps go through `shared` [kWarp].
template <class T, class Add, class ShuffleUp>
__device__ T sum_before(T own, T zero, T* shared, Add&& add, ShuffleUp&& shuffle) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  T inclusive = own;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const T below = shuffle(inclusive, step);
    if (lane >= step) add(inclusive, below);
  }
  T before = shuffle(inclusive, 1);
  if (lane == 0) before = zero;
  if (lane == kWarp - 1) shared[warp] = inclusive;
  __syncthreads();
  T base = zero;
  for (int w = 0; w < warp; ++w) add(base, shared[w]);
  add(base, before);
  return base;
}

// Copies the lengths into the tables: query_start_loc starts at 0, never falls and ends within
// max_tokens; seq_lens are within 0 and max_seq_len.
__device__ void copy_lengths(const PlanSource& source, const detail::PlanTables& tables,
                             std::int32_t num_seqs, std::int32_t first, std::int32_t last,
                             std::int32_t* shared) {
  std::int32_t highest = 0;
  for (std::int32_t s = first; s < last; ++s) {
    const std::int32_t start = source.query_start_loc[(s + 1) * source.query_start_loc_stride];
    highest = max(highest, min(start, tables.max_tokens));
    tables.query_start_loc[s + 1] = highest;
    const std::int32_t length = source.seq_lens[s * source.seq_lens_stride];
    tables.seq_lens[s] = min(max(length, 0), tables.max_seq_len);
  }
  const std::int32_t before = sum_before(
      highest, 0, shared, [](std::int32_t& a, std::int32_t b) { a = max(a, b); },
      [](std::int32_t x, int lanes) { return __shfl_up_sync(0xffffffffU, x, lanes); });
  for (std::int32_t s = first; s < last; ++s) {
    if (tables.query_start_loc[s + 1] >= before) break;
    tables.query_start_loc[s + 1] = before;
  }
  if (threadIdx.x == 0) tables.query_start_loc[0] = 0;
}

// kThreads: at most so many; fewer leave each more registers.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    plan_kernel(const __grid_constant__ plan::ScheduleView view,
                const __grid_constant__ PlanSource source) {
  __shared__ Sums warp_sums[kWarp];
  __shared__ std::int32_t warp_highest[kWarp];
  let_next_kernel_start();
  const detail::PlanTables& tables = view.tables;
  const int num_classes = view.limits.num_classes;
  const auto threads = static_cast<std::int32_t>(blockDim.x);
  const auto thread = static_cast<std::int32_t>(threadIdx.x);
  // Neighbouring sequences are one thread's.
  const std::int32_t per_thread = (view.num_seqs + threads - 1) / threads;
  const std::int32_t first = min(thread * per_thread, view.num_seqs);
  const std::int32_t last = min(first + per_thread, view.num_seqs);

  wait_for_earlier_kernels();
  copy_lengths(source, tables, view.num_seqs, first, last, warp_highest);
  __syncthreads();

  Sums own{};
  for (std::int32_t s = first; s < last; ++s) {
    const plan::SeqWork work = plan::seq_work(view, plan::seq_mask(view, s));
    if (tables.slot_before != nullptr) tables.slot_before[s] = own.slots[work.tile_class];
#pragma unroll
    for (int c = 0; c < kMaxTileClasses; ++c) {
      if (c == work.tile_class) {
        own.cost[c] += work.cost;
        own.slots[c] += work.slots;
      }
      if (c < num_classes) tables.cost_before[c][s + 1] = own.cost[c];
    }
  }
  const Sums before = sum_before(
      own, Sums{}, warp_sums, [](Sums& a, const Sums& b) { a += b; }, shuffle_up);
  for (std::int32_t s = first; s < last; ++s) {
#pragma unroll
    for (int c = 0; c < kMaxTileClasses; ++c) {
      if (c < num_classes) tables.cost_before[c][s + 1] += before.cost[c];
    }
    if (tables.slot_before != nullptr) {
      const plan::SeqTiles tiles =
          plan::seq_tiles(view, tables.query_start_loc[s + 1] - tables.query_start_loc[s]);
      std::int32_t base = 0;
#pragma unroll
      for (int c = 0; c < kMaxTileClasses; ++c) {
        if (c == tiles.tile_class) base = tables.first_slot[c] + before.slots[c];
      }
      tables.slot_before[s] += base;
    }
  }
  if (thread < num_classes) tables.cost_before[thread][0] = 0;
  for (int c = 0; c < num_classes; ++c) {
    for (std::int32_t w = thread; w < view.limits.classes[c].workers; w += threads) {
      tables.merges[c][w] = detail::MergeProgress{};
    }
  }
  __syncthreads();

  std::int32_t end = 0;  // of the class's starts, counted over all classes
  for (int c = 0; c < num_classes; ++c) {
    const std::int32_t begin = end;
    end += plan::num_shares(view.limits.classes[c]) + 1;
    std::int32_t index = thread;
    if (index < begin) index += (begin - index + threads - 1) / threads * threads;
    for (; index < end; index += threads) {
      tables.starts[c][index - begin] = plan::share_start(view, c, index - begin);
    }
  }
  __syncthreads();
  for (int c = 0; c < num_classes; ++c) {
    for (std::int32_t share = thread; share < plan::num_shares(view.limits.classes[c]);
         share += threads) {
      tables.first_pieces[c][share] = plan::first_piece_of(view, c, share);
    }
  }
}

}  // namespace

void plan_on_device(const PlanKey& key, const ScheduleLimits& limits, const Batch& batch,
                    const detail::PlanTables& tables, const Gpu& gpu, cudaStream_t stream) {
  const plan::ScheduleView view = plan::schedule_view(key, limits, tables, batch);
  PlanSource source{};
  source.query_start_loc = static_cast<const std::int32_t*>(batch.query_start_loc.data);
  source.query_start_loc_stride = batch.query_start_loc.strides[0];
  source.seq_lens = static_cast<const std::int32_t*>(batch.seq_lens.data);
  source.seq_lens_stride = batch.seq_lens.strides[0];
  std::int64_t items = batch.num_seqs;  // that threads share, in one phase or the next
  std::int64_t workers = 0;
  for (std::int32_t c = 0; c < limits.num_classes; ++c)
    workers += plan::num_shares(limits.classes[c]) + 1;
  items = items > workers ? items : workers;
  const std::int64_t threads = items >= kMostThreads ? kMostThreads : (items + 31) / 32 * 32;
  const auto kernel =
      threads <= kMostThreads / 2 ? plan_kernel<kMostThreads / 2> : plan_kernel<kMostThreads>;
  launch_early(gpu, "plan", kernel, {1, static_cast<unsigned>(threads)}, stream, view, source);
}

}  // namespace diffkv::cuda
