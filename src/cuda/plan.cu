// The planner on the device: the same arithmetic as plan_on_host, by one thread block. Lengths are
// in device memory, where nobody could check them: here they are made safe for all later kernels.
// It is a chain of latencies, one instruction behind the other: so sequences and shares have a
// thread each, what is looked at again stays in shared memory, and plans of decode have code of
// their own, made of the same source, without what they cannot need.
#include <algorithm>
#include <cstdint>
#include <limits>

#include "cuda/dependent_launch.cuh"
#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/stages.h"
#include "cuda/warp.cuh"
#include "plan/quotient.h"
#include "plan/schedule.h"
#include "plan/shares.h"

namespace diffkv::cuda {
namespace {

constexpr int kMostThreads = 1024;

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

// What is kept in shared memory, of all classes together: starts, and costs before sequences, or
// before every `each`-th of them.
constexpr int kKeptStarts = kMostThreads;
constexpr int kKeptCosts = 2048;

template <int kClasses>
struct Shared {
  static constexpr int kKept = kKeptCosts / kClasses;
  plan::WorkStart starts[kKeptStarts];
  std::int64_t cost_before[kClasses][kKept];
  std::int32_t query_len[kKept];  // these two if all sequences are kept
  std::int32_t seq_len[kKept];
  // Each warp's sequences of a round, and of the round before.
  std::int64_t warp_cost[2][kClasses][kWarp];
  std::int32_t warp_slots[2][kClasses][kWarp];
};

// Of numbers that each warp left: the sum of all, and of those of the warps before this one.
template <class T>
struct SumOfWarps {
  T before;
  T all;

  __device__ explicit SumOfWarps(const T* of_warps) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    const T own = lane < static_cast<int>(blockDim.x) / kWarp ? of_warps[lane] : 0;
    const T up_to = sum_up_to_lane(own);
    all = __shfl_sync(kAllLanes, up_to, kWarp - 1);
    before = __shfl_sync(kAllLanes, up_to - own, warp);
  }
};

// The lengths into the tables: query_start_loc starts at 0, never falls and ends within max_tokens;
// seq_lens are within 0 and max_seq_len. For the batches that need it, by the first warp.
__device__ __noinline__ void make_safe(const Lengths& from, const detail::PlanTables& tables,
                                       std::int32_t num_seqs) {
  const auto lane = static_cast<std::int32_t>(threadIdx.x);
  std::int32_t highest = 0;  // of all before
  for (std::int32_t first = 0; first < num_seqs; first += kWarp) {
    const std::int32_t s = first + lane;
    std::int32_t end = highest;
    if (s < num_seqs) {
      end = max(
          end, min(from.query_start_loc[(s + 1) * from.query_start_loc_stride], tables.max_tokens));
    }
    for (int step = 1; step < kWarp; step *= 2) {
      end = max(end, __shfl_up_sync(kAllLanes, end, step));
    }
    if (s < num_seqs) tables.query_start_loc[s + 1] = end;
    highest = __shfl_sync(kAllLanes, end, kWarp - 1);
  }
}

// Costs before sequences and the tables of lengths, a thread a sequence, in rounds. Returns what
// all sequences cost; false in `usable`, and nothing, if some lengths are not safe or some sequence
// has more than most_rows rows a head.
template <bool kDecode, int kClasses>
__device__ __forceinline__ Sums<kClasses> sum_sequences(const plan::ScheduleView& view,
                                                        const Lengths& from, std::int32_t most_rows,
                                                        std::int32_t each, Shared<kClasses>& shared,
                                                        bool& usable) {
  const detail::PlanTables& tables = view.tables;
  const auto thread = static_cast<std::int32_t>(threadIdx.x);
  const int lane = thread % kWarp;
  const int warp = thread / kWarp;
  const bool has_slots = tables.slot_before != nullptr;
  Sums<kClasses> before;  // of the rounds before
  int round = 0;
  usable = true;
#pragma unroll 1
  for (std::int32_t first = 0; first < view.num_seqs; first += blockDim.x, round ^= 1) {
    const std::int32_t s = first + thread;
    const bool mine = s < view.num_seqs;
    plan::SeqWork work;
    if (mine) {
      const std::int32_t start = s == 0 ? 0 : from.query_start_loc[s * from.query_start_loc_stride];
      const std::int32_t next = from.query_start_loc[(s + 1) * from.query_start_loc_stride];
      const std::int32_t seq_len =
          min(max(from.seq_lens[s * from.seq_lens_stride], 0), tables.max_seq_len);
      const bool safe = start >= 0 && start <= next && next <= tables.max_tokens;
      const std::int32_t query_len = safe ? next - start : 0;
      usable = safe && query_len * view.group <= most_rows;
      tables.query_start_loc[s + 1] = next;
      tables.seq_lens[s] = seq_len;
      if (each == 1) {
        shared.query_len[s] = query_len;
        shared.seq_len[s] = seq_len;
      }
      work = plan::seq_work<kDecode>(view, plan::seq_mask(view, s, query_len, seq_len));
    }
    Sums<kClasses> up_to;
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
      up_to.cost[c] = sum_up_to_lane(c == work.tile_class ? work.cost : 0);
      if (has_slots) up_to.slots[c] = sum_up_to_lane(c == work.tile_class ? work.slots : 0);
      if (lane == kWarp - 1) {
        shared.warp_cost[round][c][warp] = up_to.cost[c];
        if (has_slots) shared.warp_slots[round][c][warp] = up_to.slots[c];
      }
    }
    usable = __syncthreads_and(usable) != 0;
    if (!usable) break;
    const std::int32_t kept = each == 1 ? s : plan::divide(s, each);
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
      if (c >= view.limits.num_classes) break;
      const bool in_class = c == work.tile_class;
      const SumOfWarps<std::int64_t> of_warps(shared.warp_cost[round][c]);
      if (mine) {
        const std::int64_t cost_before =
            before.cost[c] + of_warps.before + up_to.cost[c] - (in_class ? work.cost : 0);
        tables.cost_before[c][s] = cost_before;
        if (kept * each == s) shared.cost_before[c][kept] = cost_before;
      }
      before.cost[c] += of_warps.all;
      if (!has_slots) continue;
      const SumOfWarps<std::int32_t> slots_of_warps(shared.warp_slots[round][c]);
      if (mine && in_class) {
        tables.slot_before[s] = tables.first_slot[c] + before.slots[c] + slots_of_warps.before +
                                up_to.slots[c] - work.slots;
      }
      before.slots[c] += slots_of_warps.all;
    }
  }
  return before;
}

// As plan::share_start by the tables; `all`: what all sequences of the class cost.
template <bool kDecode, int kClasses>
__device__ __forceinline__ plan::Start start_of(const plan::ScheduleView& view, int tile_class,
                                                std::int32_t index, std::int64_t all,
                                                std::int32_t each, const Shared<kClasses>& shared) {
  const std::int64_t* before = view.tables.cost_before[tile_class];
  const std::int64_t* kept = shared.cost_before[tile_class];
  return plan::share_start<kDecode>(
      view, tile_class, index, all,
      [&](std::int64_t cost) {
        if (each == 1) return plan::last_not_above(kept, view.num_seqs, cost);
        const std::int32_t first =
            each * plan::last_not_above(kept, plan::divide(view.num_seqs + each - 1, each), cost);
        return first + plan::last_not_above(before + first, min(each, view.num_seqs - first), cost);
      },
      [&](std::int32_t seq) {
        const auto cost_before = [&](std::int32_t s) {
          if (s == view.num_seqs) return all;
          return each == 1 ? kept[s] : before[s];
        };
        const std::int64_t own = cost_before(seq);
        const plan::SeqMask mask =
            each == 1 ? plan::seq_mask(view, seq, shared.query_len[seq], shared.seq_len[seq])
                      : plan::seq_mask(view, seq);
        return plan::SeqOnLine{seq, mask, own, cost_before(seq + 1) - own};
      });
}

// The plan of a batch; false, and no plan, where sum_sequences says so.
template <bool kDecode, int kClasses>
__device__ __forceinline__ bool plan_batch(const plan::ScheduleView& view, const Lengths& lengths,
                                           std::int32_t most_rows, Shared<kClasses>& shared) {
  const detail::PlanTables& tables = view.tables;
  const auto threads = static_cast<std::int32_t>(blockDim.x);
  const auto thread = static_cast<std::int32_t>(threadIdx.x);
  constexpr int kKept = Shared<kClasses>::kKept;
  const std::int32_t each =
      view.num_seqs <= kKept ? 1 : plan::divide(view.num_seqs + kKept - 1, kKept);
  if (thread == 0) tables.query_start_loc[0] = 0;
  bool usable;
  const Sums<kClasses> all = sum_sequences<kDecode>(view, lengths, most_rows, each, shared, usable);
  __syncthreads();
  if (!usable) return false;
  // What is left to clear is cleared by the threads that have no share's start to find.
  std::int32_t num_starts = 0;  // of all classes
#pragma unroll
  for (int c = 0; c < kClasses; ++c) {
    if (c >= view.limits.num_classes) break;
    num_starts += plan::num_shares(view.limits.classes[c]) + 1;
    if (thread == 0) tables.cost_before[c][view.num_seqs] = all.cost[c];
#pragma unroll 1
    for (std::int32_t w = threads - 1 - thread; w < view.limits.classes[c].workers; w += threads) {
      tables.arrivals[c][w] = 0;
    }
  }
  // A share's first piece ends where the next share starts: of each round the last start is found
  // again in the next one.
#pragma unroll 1
  for (std::int32_t first = 0; first + 1 < num_starts; first += threads - 1) {
    const std::int32_t at = first + thread;
    std::int32_t begin = 0;
    int c = 0;
    std::int64_t cost = all.cost[0];
    std::int32_t shares = plan::num_shares(view.limits.classes[0]);
#pragma unroll
    for (int next = 1; next < kClasses; ++next) {
      if (next >= view.limits.num_classes || at - begin <= shares) break;
      begin += shares + 1;
      c = next;
      cost = all.cost[next];
      shares = plan::num_shares(view.limits.classes[next]);
    }
    plan::Start start;
    if (at < num_starts) {
      start = start_of<kDecode>(view, c, at - begin, cost, each, shared);
      if (thread > 0 || first == 0) tables.starts[c][at - begin] = start.at;
      if (first == 0) shared.starts[at] = start.at;  // which are all of them, or not looked at
    }
    __syncthreads();
    if (at - begin < shares && thread < threads - 1) {
      const plan::WorkStart* starts =
          num_starts <= kKeptStarts ? shared.starts + begin : loaded(tables.starts[c]);
      tables.first_pieces[c][at - begin] = plan::first_piece_of(view, c, at - begin, start, starts);
    }
  }
  return true;
}

// What most steps of a server are: sequences that each have one tile a head, of one class, a causal
// mask, with a window or not, and a balanced plan. Their plans are made by the same code, from
// which the compiler takes out what cannot be: how many rows each sequence has is looked at first.
bool is_decode(const plan::ScheduleView& view) {
  return view.limits.num_classes == 1 && view.policy == SchedulePolicy::kBalanced &&
         view.mask.causal && view.mask.chunk_size <= 0 && view.mask.prefix_window <= 0 &&
         view.causal_per_seq == nullptr && view.mm_ranges == nullptr;
}

// The view of such a batch. Constants here are constants to the compiler.
__device__ __forceinline__ plan::ScheduleView decode_view(const plan::ScheduleView& from) {
  plan::ScheduleView view;
  view.policy = SchedulePolicy::kBalanced;
  view.mask.causal = true;
  view.mask.window = from.mask.window;
  view.num_kv_heads = from.num_kv_heads;
  view.group = from.group;
  view.num_seqs = from.num_seqs;
  view.limits.num_classes = 1;
  view.limits.threads = from.limits.threads;
  view.limits.classes[0] = from.limits.classes[0];
  view.tables = from.tables;
  view.tables.slot_before = nullptr;
  return view;
}

// kThreads: at most so many; fewer leave each more registers.
template <int kClasses, int kThreads, bool kDecode>
__global__ void __launch_bounds__(kThreads)
    plan_kernel(const __grid_constant__ plan::ScheduleView view,
                const __grid_constant__ Lengths given) {
  __shared__ Shared<kClasses> shared;
  let_next_kernel_start();
  wait_for_earlier_kernels();
  if constexpr (kDecode) {
    const std::int32_t most_rows = view.limits.classes[0].tile_rows;
    if (plan_batch<true>(decode_view(view), given, most_rows, shared)) return;
  }
  Lengths lengths{loaded(given.query_start_loc), given.query_start_loc_stride,
                  loaded(given.seq_lens), given.seq_lens_stride};
#pragma unroll 1
  while (!plan_batch<false>(view, lengths, std::numeric_limits<std::int32_t>::max(), shared)) {
    if (threadIdx.x < kWarp) make_safe(given, view.tables, view.num_seqs);
    __syncthreads();
    lengths.query_start_loc = loaded(view.tables.query_start_loc);
    lengths.query_start_loc_stride = 1;
  }
}

template <int kClasses, bool kDecode>
void launch(const plan::ScheduleView& view, const Lengths& given, std::int64_t threads,
            const Gpu& gpu, cudaStream_t stream) {
  const auto kernel = threads <= kMostThreads / 2 ? plan_kernel<kClasses, kMostThreads / 2, kDecode>
                                                  : plan_kernel<kClasses, kMostThreads, kDecode>;
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
  const auto plan = limits.num_classes > 1 ? launch<kMaxTileClasses, false>
                    : is_decode(view)      ? launch<1, true>
                                           : launch<1, false>;
  plan(view, given, threads, gpu, stream);
}

}  // namespace diffkv::cuda
