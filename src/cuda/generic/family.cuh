// The kernels of one type of cache and pair of head sizes: decode, speculative decode and prefill.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/attend_kernel.h"
#include "cuda/device.h"
#include "cuda/generic/attend_mma.cuh"
#include "cuda/generic/tile.h"
#include "cuda/instances/instances.h"
#include "cuda/launch.h"
#include "cuda/tensor_maps.h"

namespace diffkv::cuda::mma {

enum TileClassIndex : std::int32_t { kDecode, kWideDecode, kPrefill, kNumClasses };

// Of a 16-bit key and its value, from which on warpgroups multiply 64 rows while the next keys are
// read. 64 x 8192 keys, one sequence of four tokens among single ones, beside single ones alone:
// 192/128 324 and 324 us, 128/128 279 and 263, 64/64 237 and 144 (H200s, 192/128 in a call of its
// own).
inline constexpr std::int64_t kReadBoundColumns = 256;

// Blocks of a kernel that an SM has room for: fewer than it is made for where shared memory would
// not hold two stages of each.
template <class T>
int blocks_per_sm(const Gpu& gpu) {
  constexpr int kReserved = 1024;  // by the runtime, a block
  const int bytes = SharedLayout<T>({2, 2}).bytes + kReserved;
  return T::Grid::kBlocksPerSm * bytes <= gpu.shared_bytes_per_sm ? T::Grid::kBlocksPerSm : 1;
}

// The deepest rings that fit; no stages if none do.
template <class T>
Depth depth_on(const Gpu& gpu) {
  const int blocks = blocks_per_sm<T>(gpu);
  const int available =
      blocks == 1 ? gpu.shared_bytes_per_block : gpu.shared_bytes_per_sm / blocks - 1024;
  const auto fits = [&](Depth depth) { return SharedLayout<T>(depth).bytes <= available; };
  const auto deepest = [&](std::int32_t buffers) {
    Depth depth{kMaxStages, buffers};
    while (depth.stages > 0 && !fits(depth)) --depth.stages;
    return depth;
  };
  const Depth depth = deepest(1);
  // A second or third tile's queries may cost stages, but a few must be left.
  const Depth second = deepest(2);
  if (second.stages < std::min(depth.stages, 2)) return depth;
  const Depth third = deepest(3);
  return third.stages >= std::min(depth.stages, 4) ? third : second;
}

template <class T>
void launch_tile(const AttendKernelParams& params, std::int32_t tile_class, const Gpu& gpu,
                 cudaStream_t stream) {
  const Depth depth = depth_on<T>(gpu);
  const int bytes = SharedLayout<T>(depth).bytes;
  allow_shared_bytes<attend_mma<T>>(gpu, bytes);
  const auto workers = static_cast<unsigned>(params.schedule.limits.classes[tile_class].workers);
  const KvMaps maps = kv_maps(params, {kLeastBoxKeys, T::kGroupKeys, kSlabColumns, T::kKeySlabs,
                                       T::kValueSlabs, T::kHeads});
  launch_early(gpu, "attend_mma", attend_mma<T>, {workers, T::Grid::kThreads, bytes}, stream,
               params, maps, depth, tile_class);
}

template <DType kStored, int kHeadSizeQk, int kHeadSizeV>
struct Family {
  template <class Grid>
  using TileOf = Tile<Grid, kStored, kHeadSizeQk, kHeadSizeV>;
  using Decode = TileOf<DecodeGrid<kHeadSizeQk, kHeadSizeV>>;
  using HeadsDecode =
      TileOf<HeadsDecodeGrid<(kHeadSizeQk + kHeadSizeV) * static_cast<int>(size_of(kStored))>>;
  using WideDecode = TileOf<WideDecodeGrid>;
  using LongWideDecode = TileOf<LongWideDecodeGrid>;
  using GroupWideDecode = TileOf<GroupWideDecodeGrid>;
  using Prefill = TileOf<PrefillGrid>;
  using TallPrefill = TileOf<TallPrefillGrid>;
  using GroupPrefill = TileOf<GroupPrefillGrid>;

  // Whether the code that runs on a GPU, which is the current one, has the kernel of a tile, and
  // its shared memory room for so many stages of it. No code at all has some: those of types that
  // cannot be multiplied so.
  template <class T>
  static bool can_run(const Gpu& gpu, std::int32_t stages = 1) {
    if constexpr (has_kernel<T>(kHopper - 1) || has_kernel<T>(kHopper) ||
                  has_kernel<T>(kBlackwell)) {
      return has_kernel<T>(code_of<attend_mma<T>>(gpu) / 10) && depth_on<T>(gpu).stages >= stages;
    }
    return false;
  }

  // Calls fn with the tile, as std::type_identity, that speculative decode, or prefill, takes on a
  // GPU, which is the current one.
  template <class Fn>
  static auto with_wide(const Gpu& gpu, Fn&& fn) {
    if (can_run<GroupWideDecode>(gpu)) return fn(std::type_identity<GroupWideDecode>());
    if (gpu.memory_rate > kFastMemory && can_run<LongWideDecode>(gpu, 2)) {
      return fn(std::type_identity<LongWideDecode>());
    }
    return fn(std::type_identity<WideDecode>());
  }
  template <class Fn>
  static auto with_prefill(const Gpu& gpu, Fn&& fn) {
    if (can_run<GroupPrefill>(gpu)) return fn(std::type_identity<GroupPrefill>());
    if (can_run<TallPrefill>(gpu)) return fn(std::type_identity<TallPrefill>());
    if (can_run<Prefill>(gpu)) return fn(std::type_identity<Prefill>());
    return with_wide(gpu, fn);
  }

  template <class T>
  static TileClass tile_class(SchedulePolicy policy, const Gpu& gpu) {
    TileClass cls;
    cls.tile_heads = T::kHeads;
    cls.tile_rows = T::kHeadRows;
    cls.max_seq_rows = T::kHeadRows;
    cls.block_keys = T::Grid::kBlockKeys;
    const bool spares_sms = T::Grid::kSparesSms && policy == SchedulePolicy::kBalanced;
    const int sms = spares_sms ? sms_for_reading(gpu.num_sms) : gpu.num_sms;
    cls.workers = std::min(sms * blocks_per_sm<T>(gpu), kMostParts);
    cls.block_cost = 2;
    // Blocks merge what they cut: with 4, 128 mixed lengths take 0.8 us more and 200 x 448 2.5
    // (H200).
    cls.least_cut = 2;
    cls.tile_cost = T::Grid::kTileCost;
    return cls;
  }

  // Workers side by side that make neighbouring heads' rows one stretch of memory.
  static std::int32_t head_lanes(const PlanKey& key, const TileClass& cls) {
    const std::int64_t groups = key.num_kv_heads / cls.tile_heads;
    std::int32_t lanes = 4;
    while (groups % lanes != 0 || cls.workers % lanes != 0) lanes /= 2;
    return lanes;
  }

  static ScheduleLimits limits(const PlanKey& key, const Gpu& gpu) {
    ScheduleLimits limits;
    limits.num_classes = kNumClasses;
    // Tiles of several heads of windows, where they mostly are short, and of keys of few bytes.
    // Others are no faster so, and leave four times the partials a block.
    const bool pays = key.mask.window > 0 || HeadsDecode::kFp8;
    const bool heads =
        pays && key.num_kv_heads % HeadsDecode::kHeads == 0 && can_run<HeadsDecode>(gpu, 2);
    const auto class_of = [&](auto tile) {
      return tile_class<typename decltype(tile)::type>(key.policy, gpu);
    };
    limits.classes[kDecode] = heads ? class_of(std::type_identity<HeadsDecode>())
                                    : class_of(std::type_identity<Decode>());
    limits.classes[kWideDecode] = with_wide(gpu, class_of);
    limits.classes[kPrefill] = with_prefill(gpu, class_of);
    for (const std::int32_t c : {kDecode, kWideDecode}) {
      limits.classes[c].head_lanes = head_lanes(key, limits.classes[c]);
    }
    if (key.policy == SchedulePolicy::kBatchInvariant) {
      // Absolute cuts make pieces of about the same length: a tile's start weighs no more than one
      // of decode, or shares next to each other would differ by a whole piece.
      TileClass& wide = limits.classes[kWideDecode];
      wide.tile_cost = std::min(wide.tile_cost, Decode::Grid::kTileCost);
      // Of one head, whole tiles of short sequences stand beside pieces of long ones: they weigh
      // more.
      if (!heads) limits.classes[kDecode].tile_cost = 16;
    }
    // Warpgroups multiply for all rows there is room for. Where the memory takes longer, fewer rows
    // cost nothing, and a second kernel without work 3 us. Of small heads it does not, and those of
    // fp8 convert all the time.
    const bool read_bound = key.head_size_qk + key.head_size_v >= kReadBoundColumns;
    const bool by_groups = with_wide(gpu, [](auto tile) {
      using T = typename decltype(tile)::type;
      return T::Grid::kWarpgroups && !T::kFp8;
    });
    limits.classes[kWideDecode].takes_smaller = read_bound && by_groups;
    // Few heads leave many SMs without a piece, unless a long sequence is cut more finely.
    const auto kv_heads = static_cast<std::int32_t>(key.num_kv_heads);
    limits.classes[kDecode].invariant_max_pieces = std::clamp(256 / kv_heads, 16, 64);
    limits.classes[kDecode].invariant_least_keys = kv_heads > 1 ? 2048 : 1024;
    // A piece of 64 rows takes longer to end, and leaves partials four times as large.
    limits.classes[kWideDecode].invariant_least_keys = 4096;
    // Its start and end, queries and results of many rows, take as long as 8 blocks.
    limits.classes[kPrefill].block_cost = 1;
    limits.classes[kPrefill].tile_cost = 8;
    // Its partials are wide: fewer of them.
    limits.classes[kPrefill].invariant_max_pieces = 4;
    return limits;
  }

  static void launch(const AttendKernelParams& params, std::int32_t tile_class,
                     cudaStream_t stream) {
    const Gpu& gpu = current_gpu();
    const auto launch = [&](auto tile) {
      launch_tile<typename decltype(tile)::type>(params, tile_class, gpu, stream);
    };
    switch (tile_class) {
      case kDecode:
        if (params.schedule.limits.classes[kDecode].tile_heads > 1) {
          return launch(std::type_identity<HeadsDecode>());
        }
        return launch(std::type_identity<Decode>());
      case kWideDecode:
        return with_wide(gpu, launch);
      default:
        return with_prefill(gpu, launch);
    }
  }

  static bool fits(const Gpu& gpu) {
    return depth_on<Decode>(gpu).stages > 0 && depth_on<WideDecode>(gpu).stages > 0;
  }
};

template <DType kStored, int kHeadSizeQk, int kHeadSizeV>
const MmaKernel& kernel() {
  using F = Family<kStored, kHeadSizeQk, kHeadSizeV>;
  static const MmaKernel instance{{"mma", true, F::limits, F::launch}, F::fits};
  return instance;
}

}  // namespace diffkv::cuda::mma
