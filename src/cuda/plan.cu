// The planner on the device: the same arithmetic as plan_on_host, by one thread block. Lengths are
// in device memory, where nobody could check them: here they are made safe for all later kernels.
// It is a chain of latencies, so each thread has neighbouring sequences, what it finds of them goes
// on in registers, and the sequence that a share starts in is searched for in shared memory.
#include <algorithm>
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
constexpr int kMostWarps = kMostThreads / kWarp;
constexpr std::uint32_t kAllLanes = 0xffffffffU;

// Lengths as they come, or made safe.
struct Lengths {
  const std::int32_t* query_start_loc;  // [num_seqs + 1]
  std::int64_t query_start_loc_stride;
  const std::int32_t* seq_lens;  // [num_seqs]
  std::int64_t seq_lens_stride;
};

// The same pointer, loaded. Where a loop goes from one kernel parameter to another, CUDA 13.0 makes
// that a choice between the parameters' addresses, and reads the first one all the same.
template <class T>
__device__ T* loaded(T* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}

// Sums along some sequences, of the tile classes that the plan has.
template <int kClasses>
struct Sums {
  std::int64_t cost[kClasses] = {};
  std::int32_t slots[kClasses] = {};
};

// Starts that are kept in shared memory, of all classes together.
constexpr int kKeptStarts = 1024;

template <int kClasses>
struct Shared {
  plan::WorkStart starts[kKeptStarts];
  std::int64_t warp_cost[kClasses][kMostWarps];
  std::int32_t warp_slots[kClasses][kMostWarps];
  std::int32_t warp_highest[kMostWarps];
  std::int64_t cost_before[kClasses][kMostThreads];  // each thread's first sequence
  std::int64_t cost[kClasses];                       // of all sequences
};

// Sequences [first, last) of a thread; every thread but the last ones has `each`.
struct Own {
  std::int32_t each;
  std::int32_t first;
  std::int32_t last;
};

template <class T>
__device__ T sum_up_to_lane(T x) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const T below = __shfl_up_sync(kAllLanes, x, step);
    if (lane >= step) x += below;
  }
  return x;
}

// The lengths into the tables: query_start_loc starts at 0, never falls and ends within max_tokens;
// seq_lens are within 0 and max_seq_len. For the batches that need it.
__device__ __noinline__ void make_safe(const Lengths& from, const detail::PlanTables& tables,
                                       Own own, std::int32_t* warp_highest) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  std::int32_t highest = 0;
  for (std::int32_t s = own.first; s < own.last; ++s) {
    const std::int32_t start = from.query_start_loc[(s + 1) * from.query_start_loc_stride];
    highest = max(highest, min(start, tables.max_tokens));
    tables.query_start_loc[s + 1] = highest;
  }
  for (int step = 1; step < kWarp; step *= 2) {
    const std::int32_t below = __shfl_up_sync(kAllLanes, highest, step);
    if (lane >= step) highest = max(highest, below);
  }
  if (lane == kWarp - 1) warp_highest[warp] = highest;
  std::int32_t before = __shfl_up_sync(kAllLanes, highest, 1);
  if (lane == 0) before = 0;
  __syncthreads();
  for (int w = 0; w < warp; ++w) before = max(before, warp_highest[w]);
  for (std::int32_t s = own.first; s < own.last; ++s) {
    if (tables.query_start_loc[s + 1] >= before) break;
    tables.query_start_loc[s + 1] = before;
  }
  __syncthreads();
}

// What the thread's sequences sum up to; the lengths go into the tables, and there each sequence
// but the thread's first finds the sums of those before it. `sane`: the lengths were safe.
template <int kClasses>
__device__ Sums<kClasses> sum_own(const plan::ScheduleView& view, const Lengths& from, Own own,
                                  bool& sane) {
  const detail::PlanTables& tables = view.tables;
  Sums<kClasses> sums;
  sane = true;
  std::int32_t start = own.first == 0 || own.first == own.last
                           ? 0
                           : from.query_start_loc[own.first * from.query_start_loc_stride];
#pragma unroll 1
  for (std::int32_t s = own.first; s < own.last; ++s) {
    const std::int32_t next = from.query_start_loc[(s + 1) * from.query_start_loc_stride];
    const std::int32_t seq_len =
        min(max(from.seq_lens[s * from.seq_lens_stride], 0), tables.max_seq_len);
    sane = sane && start >= 0 && start <= next && next <= tables.max_tokens;
    tables.query_start_loc[s + 1] = next;
    tables.seq_lens[s] = seq_len;
    const plan::SeqWork work =
        plan::seq_work(view, plan::seq_mask(view, s, sane ? next - start : 0, seq_len));
    start = next;
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
      if (s > own.first && c < view.limits.num_classes) tables.cost_before[c][s] = sums.cost[c];
      if (c != work.tile_class) continue;
      if (tables.slot_before != nullptr) tables.slot_before[s] = sums.slots[c];
      sums.cost[c] += work.cost;
      sums.slots[c] += work.slots;
    }
  }
  return sums;
}

// Adds the sums before the thread to what sum_own left.
template <int kClasses>
__device__ void add_before(const plan::ScheduleView& view, Own own, const Sums<kClasses>& before) {
  const detail::PlanTables& tables = view.tables;
#pragma unroll
  for (int c = 0; c < kClasses; ++c) {
    if (c >= view.limits.num_classes) break;
    if (own.first < own.last) tables.cost_before[c][own.first] = before.cost[c];
#pragma unroll 4
    for (std::int32_t s = own.first + 1; s < own.last; ++s) {
      tables.cost_before[c][s] += before.cost[c];
    }
  }
  if (tables.slot_before == nullptr) return;
#pragma unroll 1
  for (std::int32_t s = own.first; s < own.last; ++s) {
    const std::int32_t start = s == 0 ? 0 : tables.query_start_loc[s];
    const plan::SeqTiles tiles = plan::seq_tiles(view, tables.query_start_loc[s + 1] - start);
    std::int32_t base = 0;
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
      if (c == tiles.tile_class) base = tables.first_slot[c] + before.slots[c];
    }
    tables.slot_before[s] += base;
  }
}

// Sums of all threads before this one; those of all go into the shared memory and the tables.
template <int kClasses>
__device__ Sums<kClasses> sums_before(const plan::ScheduleView& view, const Sums<kClasses>& own,
                                      Shared<kClasses>& shared) {
  const auto thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp;
  const int warp = thread / kWarp;
  const bool has_slots = view.tables.slot_before != nullptr;
  Sums<kClasses> before;
#pragma unroll
  for (int c = 0; c < kClasses; ++c) {
    const std::int64_t cost = sum_up_to_lane(own.cost[c]);
    const std::int32_t slots = has_slots ? sum_up_to_lane(own.slots[c]) : 0;
    if (lane == kWarp - 1) {
      shared.warp_cost[c][warp] = cost;
      shared.warp_slots[c][warp] = slots;
    }
    before.cost[c] = cost - own.cost[c];
    before.slots[c] = slots - own.slots[c];
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < kClasses; ++c) {
#pragma unroll 4
    for (int w = 0; w < warp; ++w) {
      before.cost[c] += shared.warp_cost[c][w];
      before.slots[c] += shared.warp_slots[c][w];
    }
    shared.cost_before[c][thread] = before.cost[c];
    if (thread == static_cast<int>(blockDim.x) - 1 && c < view.limits.num_classes) {
      const std::int64_t all = before.cost[c] + own.cost[c];
      shared.cost[c] = all;
      view.tables.cost_before[c][view.num_seqs] = all;
    }
  }
  return before;
}

// As plan::share_start by the tables; a sequence is found among the threads' first ones, then among
// the thread's own.
template <int kClasses>
__device__ plan::WorkStart share_start(const plan::ScheduleView& view, int tile_class,
                                       std::int32_t index, std::int32_t each,
                                       const Shared<kClasses>& shared) {
  const std::int64_t* before = view.tables.cost_before[tile_class];
  return plan::share_start(
      view, tile_class, index, shared.cost[tile_class],
      [&](std::int64_t cost) {
        const std::int32_t first =
            each * plan::last_not_above(shared.cost_before[tile_class],
                                        static_cast<std::int32_t>(blockDim.x), cost);
        return first + plan::last_not_above(before + first, min(each, view.num_seqs - first), cost);
      },
      [&](std::int32_t seq) {
        const auto cost_before = [&](std::int32_t s) {
          if (each > 1) return before[s];
          return s < static_cast<std::int32_t>(blockDim.x) ? shared.cost_before[tile_class][s]
                                                           : shared.cost[tile_class];
        };
        const std::int64_t own = cost_before(seq);
        return plan::SeqOnLine{seq, plan::seq_mask(view, seq), own, cost_before(seq + 1) - own};
      });
}

// kThreads: at most so many; fewer leave each more registers.
template <int kClasses, int kThreads>
__global__ void __launch_bounds__(kThreads)
    plan_kernel(const __grid_constant__ plan::ScheduleView view,
                const __grid_constant__ Lengths given) {
  __shared__ Shared<kClasses> shared;
  let_next_kernel_start();
  const detail::PlanTables& tables = view.tables;
  const auto threads = static_cast<std::int32_t>(blockDim.x);
  const auto thread = static_cast<std::int32_t>(threadIdx.x);
  Own own{};
  own.each = plan::divide(view.num_seqs + threads - 1, threads);
  own.first = min(thread * own.each, view.num_seqs);
  own.last = min(own.first + own.each, view.num_seqs);
  wait_for_earlier_kernels();

  if (thread == 0) tables.query_start_loc[0] = 0;
  Lengths lengths{loaded(given.query_start_loc), given.query_start_loc_stride,
                  loaded(given.seq_lens), given.seq_lens_stride};
  Sums<kClasses> sums;
#pragma unroll 1
  for (bool made_safe = false;; made_safe = true) {
    bool sane = true;
    sums = sum_own<kClasses>(view, lengths, own, sane);
    if (__syncthreads_and(sane || made_safe) != 0) break;
    make_safe(given, tables, own, shared.warp_highest);
    lengths = Lengths{loaded(tables.query_start_loc), 1, loaded(tables.seq_lens), 1};
  }
  add_before(view, own, sums_before(view, sums, shared));
#pragma unroll 1
  for (int c = 0; c < view.limits.num_classes; ++c) {
#pragma unroll 1
    for (std::int32_t w = thread; w < view.limits.classes[c].workers; w += threads) {
      tables.arrivals[c][w] = 0;
      tables.cut_pieces[c][w] = -1;
    }
  }
  __syncthreads();

  std::int32_t end = 0;  // of the class's starts, counted over all classes
#pragma unroll 1
  for (int c = 0; c < view.limits.num_classes; ++c) {
    const std::int32_t begin = end;
    end += plan::num_shares(view.limits.classes[c]) + 1;
    std::int32_t index = thread;
    if (index < begin) index += plan::divide(begin - index + threads - 1, threads) * threads;
#pragma unroll 1
    for (; index < end; index += threads) {
      const plan::WorkStart start = share_start(view, c, index - begin, own.each, shared);
      tables.starts[c][index - begin] = start;
      if (index < kKeptStarts) shared.starts[index] = start;
    }
  }
  __syncthreads();
  std::int32_t begin = 0;
#pragma unroll 1
  for (int c = 0; c < view.limits.num_classes; ++c) {
    const std::int32_t shares = plan::num_shares(view.limits.classes[c]);
    const plan::WorkStart* starts =
        end <= kKeptStarts ? shared.starts + begin : loaded(tables.starts[c]);
    begin += shares + 1;
#pragma unroll 1
    for (std::int32_t share = thread; share < shares; share += threads) {
      tables.first_pieces[c][share] = plan::first_piece_of(view, c, share, starts);
    }
  }
}

template <int kClasses>
void launch(const plan::ScheduleView& view, const Lengths& given, std::int64_t threads,
            const Gpu& gpu, cudaStream_t stream) {
  const auto kernel = threads <= kMostThreads / 2 ? plan_kernel<kClasses, kMostThreads / 2>
                                                  : plan_kernel<kClasses, kMostThreads>;
  launch_early(gpu, "plan", kernel, {1, static_cast<unsigned>(threads)}, stream, view, given);
}

}  // namespace

void plan_on_device(const PlanKey& key, const ScheduleLimits& limits, const Batch& batch,
                    const detail::PlanTables& tables, const Gpu& gpu, cudaStream_t stream) {
  const plan::ScheduleView view = plan::schedule_view(key, limits, tables, batch);
  const Lengths given{static_cast<const std::int32_t*>(batch.query_start_loc.data),
                      batch.query_start_loc.strides[0],
                      static_cast<const std::int32_t*>(batch.seq_lens.data),
                      batch.seq_lens.strides[0]};
  std::int64_t items = batch.num_seqs;  // that threads share, in one phase or the next
  std::int64_t shares = 0;
  for (std::int32_t c = 0; c < limits.num_classes; ++c) {
    shares += plan::num_shares(limits.classes[c]) + 1;
  }
  items = std::max(items, shares);
  const std::int64_t threads =
      std::min<std::int64_t>((items + kWarp - 1) / kWarp * kWarp, kMostThreads);
  if (limits.num_classes == 1) {
    launch<1>(view, given, threads, gpu, stream);
  } else {
    launch<kMaxTileClasses>(view, given, threads, gpu, stream);
  }
}

}  // namespace diffkv::cuda
