// The kernels of one set of types and head sizes: decode, speculative decode and prefill.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/attend_kernel.h"
#include "cuda/device.h"
#include "cuda/generic/attend_mma.cuh"
#include "cuda/generic/tile.h"
#include "cuda/instances/instances.h"

namespace diffkv::cuda::mma {

// Warps of a decode tile share nothing but the merge, so blocks of keys are as large as keeps a few
// of them in shared memory, 16 keys a warp.
using DecodeGrid = WarpGrid<1, 4, 1, 64, 32>;
using DecodeGridFp8 = WarpGrid<1, 8, 1, 128, 32>;
// Up to 4 tokens of a group of 16.
using WideDecodeGrid = WarpGrid<4, 2, 1, 64, 32>;
using PrefillGrid = WarpGrid<8, 1, 1, 64, 32>;

enum TileClassIndex : std::int32_t { kDecode, kWideDecode, kPrefill, kNumClasses };

// The deepest rings that fit; no stages if none do.
template <class T>
Depth depth_on(const Gpu& gpu) {
  const auto fits = [&](std::int32_t stages, std::int32_t buffers) {
    return SharedLayout<T>({stages, buffers}).bytes <= gpu.shared_bytes_per_block;
  };
  Depth depth;
  for (std::int32_t buffers = 1; buffers <= 3; ++buffers) {
    std::int32_t stages = kMaxStages;
    while (stages > 0 && !fits(stages, buffers)) --stages;
    // A second tile's queries may cost stages, a third's may not.
    const std::int32_t least = buffers < 3 ? 2 : depth.stages;
    if (depth.stages == 0 || stages >= least) depth = {stages, buffers};
  }
  return depth;
}

template <class T>
void launch_tile(const AttendKernelParams& params, std::int32_t tile_class, cudaStream_t stream) {
  const Depth depth = depth_on<T>(current_gpu());
  const int bytes = SharedLayout<T>(depth).bytes;
  DIFFKV_CUDA_CALL(
      cudaFuncSetAttribute(attend_mma<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  const auto workers =
      static_cast<unsigned>(params.schedule.limits.classes[tile_class].workers);
  attend_mma<T><<<workers, T::Grid::kThreads, bytes, stream>>>(params, depth, tile_class);
  DIFFKV_CUDA_CALL(cudaGetLastError());
}

template <DType kQuery, DType kStored, int kHeadSizeQk, int kHeadSizeV>
struct Family {
  template <class Grid>
  using TileOf = Tile<Grid, kQuery, kStored, kHeadSizeQk, kHeadSizeV>;
  using Decode = TileOf<std::conditional_t<is_fp8(kStored), DecodeGridFp8, DecodeGrid>>;
  using WideDecode = TileOf<WideDecodeGrid>;
  using Prefill = TileOf<PrefillGrid>;

  template <class T>
  static TileClass tile_class(const Gpu& gpu) {
    TileClass cls;
    cls.tile_rows = T::Grid::kRows;
    cls.max_seq_rows = T::Grid::kRows;
    cls.block_keys = T::Grid::kBlockKeys;
    cls.workers = gpu.num_sms;
    return cls;
  }

  static ScheduleLimits limits(const PlanKey& /*key*/, const Gpu& gpu) {
    ScheduleLimits limits;
    limits.num_classes = kNumClasses;
    limits.classes[kDecode] = tile_class<Decode>(gpu);
    limits.classes[kWideDecode] = tile_class<WideDecode>(gpu);
    limits.classes[kPrefill] = tile_class<Prefill>(gpu);
    // A decode tile's end costs as much as reading half a block.
    for (const std::int32_t c : {kDecode, kWideDecode}) {
      limits.classes[c].block_cost = 2;
      limits.classes[c].tile_cost = 1;
    }
    // Its partials are wide: fewer of them.
    limits.classes[kPrefill].invariant_max_pieces = 4;
    return limits;
  }

  static void launch(const AttendKernelParams& params, std::int32_t tile_class,
                     cudaStream_t stream) {
    switch (tile_class) {
      case kDecode:
        launch_tile<Decode>(params, tile_class, stream);
        return;
      case kWideDecode:
        launch_tile<WideDecode>(params, tile_class, stream);
        return;
      default:
        launch_tile<Prefill>(params, tile_class, stream);
    }
  }

  static bool fits(const Gpu& gpu) {
    return depth_on<Decode>(gpu).stages > 0 && depth_on<WideDecode>(gpu).stages > 0 &&
           depth_on<Prefill>(gpu).stages > 0;
  }
};

template <DType kQuery, DType kStored, int kHeadSizeQk, int kHeadSizeV>
const MmaKernel& kernel() {
  using F = Family<kQuery, kStored, kHeadSizeQk, kHeadSizeV>;
  static const MmaKernel instance{{"mma", F::limits, F::launch}, F::fits};
  return instance;
}

}  // namespace diffkv::cuda::mma
