// Attention on tensor cores: any GPU from sm_80 on, any mask, one body for decode and prefill. See
// docs/kernels/mma.md.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cuda/dependent_launch.cuh"
#include "cuda/generic/consumer.cuh"
#include "cuda/generic/finish.cuh"
#include "cuda/generic/meeting.cuh"
#include "cuda/generic/merge.cuh"
#include "cuda/generic/producer.cuh"
#include "cuda/generic/ptx.cuh"
#include "cuda/generic/shared.cuh"
#include "cuda/generic/tile.h"
#include "cuda/params.h"
#include "cuda/tensor_maps.h"
#include "plan/schedule.h"
#include "plan/walk.h"

namespace diffkv::cuda::mma {

// The consumers' part before all else; the producers wait for it at their first copy.
template <class T>
__device__ inline void make_rings_ready(const AttendKernelParams& params, const Shared<T>& shared,
                                        Depth depth, bool boxes) {
  constexpr std::int32_t kThreads = T::Grid::kConsumers * kWarp;
  if (threadIdx.x == 0) {
    for (std::int32_t i = 0; i < depth.stages * T::Grid::kKeyWarps; ++i) {
      ptx::init(shared.stage_full + i, boxes ? 1 : Producer<T>::kRowArrivals);
      ptx::init(shared.stage_empty + i, T::Grid::kRowWarps * kWarpArrivals);
    }
    for (std::int32_t i = 0; i < depth.query_buffers; ++i) {
      ptx::init(shared.query_full + i, Producer<T>::kQueryArrivals);
      ptx::init(shared.query_empty + i, T::Grid::kConsumers * kWarpArrivals);
      ptx::init(shared.described + i, kWarpArrivals);
    }
    ptx::init(shared.counted, kWarpArrivals);
    for (int i = 0; i < 2; ++i) {
      ptx::init(shared.written + i, T::Grid::kConsumers * kWarpArrivals);
    }
    if constexpr (kForRacecheck) {
      ptx::init(&shared.racecheck->met, kWarp);
      Together::make_ready(*shared.racecheck);
    }
    ptx::fence_barrier_init();
    shared.cut_pieces[0] = shared.cut_pieces[1] = {};
  }
  if (params.head_size_qk < T::kHeadSizeQk || params.head_size_v < T::kHeadSizeV) {
    // Columns past the true sizes are never copied to; they must not hold NaN.
    const SharedLayout<T> layout(depth);
    for (std::int32_t at = static_cast<std::int32_t>(threadIdx.x) * 16; at < layout.merge;
         at += kThreads * 16) {
      *reinterpret_cast<uint4*>(shared.stages + at) = make_uint4(0, 0, 0, 0);
    }
    ptx::fence_before_tensor_copies();
  }
  Finish<T>::sync();
  // No barrier counts the whole block, whose two kinds of warps would come to it in two places.
  if (threadIdx.x < kWarp) ptx::arrive_at(kRingsBarrier, Producer<T>::kStarting);
}

// What a block without work does of a class that few batches have sequences of, and that many are
// launched for. It starts when the plan is there, beside the kernel of another class.
__device__ inline void leave_idle(std::int32_t worker) {
  let_next_kernel_start();
  if (worker == 0) wait_for_earlier_kernels();
}

template <class T>
__device__ inline void attend(const AttendKernelParams& params, const KvMaps& maps, Depth depth,
                              std::int32_t tile_class) {
  extern __shared__ __align__(1024) std::byte memory[];
  const auto worker = static_cast<std::int32_t>(blockIdx.x);
  if (params.after_sibling && plan::share_is_empty(params.schedule, tile_class, worker)) {
    return leave_idle(worker);
  }
  if (threadIdx.x == T::Grid::kConsumers * kWarp) Producer<T>::prefetch(maps);
  const Shared<T> shared(memory, depth);
  const bool boxes = Producer<T>::by_boxes(maps);
  const bool consumes = threadIdx.x < T::Grid::kConsumers * kWarp;
  if (consumes) make_rings_ready<T>(params, shared, depth, boxes);
  if (!params.after_sibling) wait_for_earlier_kernels();
  // The kernel of another class of the same attend does not wait, and combine reads the plan, sinks
  // and scales before it waits: they may only start when all that came before this one has ended.
  let_next_kernel_start();
  const bool describes = threadIdx.x / kWarp == T::Grid::kConsumers + Producer<T>::kDescriber;
  // Each call has objects of its own: of those that lived on, the compiler spilled the sums.
  const auto merge = [&] { return TileMerge<T>(params, shared, tile_class); };
  const auto meeting = [&] { return Meeting<T>(params, shared, tile_class); };
  const bool merges = params.merges_tiles;
  bool merging = false;
  if (!consumes) {
    if constexpr (T::kGiveRegisters) ptx::leave_registers<T::kProducerRegisters>();
    const bool busy = Producer<T>(params, maps, shared, depth, tile_class).run(worker);
    if (merges && describes) {
      meeting().count_parts();
      merging = T::kRehearses && busy;
      if constexpr (!T::kRehearses) meeting().run();
    }
  } else {
    if constexpr (T::kGiveRegisters) ptx::take_registers<T::kConsumerRegisters>();
    if (threadIdx.x == 0) *shared.began = clock64();
    Consumer<T>(params, shared, depth, boxes).run();
    merging = T::kRehearses && merges;
    if constexpr (!T::kRehearses) {
      if (merges) merge().run(false);
    }
  }
  // One copy of the instructions that merge, which the describer rehearses, unless producers gave
  // up too many registers.
  if constexpr (T::kRehearses) {
    if (merging) merge().run(ptx::opaque(!consumes));
    if (merges && describes) meeting().run();
  }
  if (params.after_sibling && worker == 0) wait_for_earlier_kernels();
}

template <class T>
__global__ void __launch_bounds__(T::Grid::kThreads, T::Grid::kBlocksPerSm)
    attend_mma(const __grid_constant__ AttendKernelParams params,
               const __grid_constant__ KvMaps maps, Depth depth, std::int32_t tile_class) {
  if constexpr (has_kernel<T>(ptx::kMajor)) {
    attend<T>(params, maps, depth, tile_class);
  } else {
    __trap();
  }
}

}  // namespace diffkv::cuda::mma
