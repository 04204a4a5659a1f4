#include <algorithm>
#include <cstdint>

#include "cuda/attend_kernel.h"
#include "cuda/device.h"
#include "cuda/generic/attend_fp32.cuh"
#include "cuda/launch.h"

namespace diffkv::cuda {
namespace {

constexpr int kMostBlocksPerSm = 4;
// Every GPU runs every head size: the least shared memory of a block is sm_86's.
constexpr std::int64_t kMostHeadSize = 576;
static_assert(fp32::shared_bytes(kMostHeadSize, kMostHeadSize) <= 99 * 1024);
// Costs in steps of 32 keys: finding and writing rows takes about as long as two.
constexpr std::int32_t kBlockKeys = 64;
constexpr std::int32_t kBlockCost = 2;
constexpr std::int32_t kTileCost = 2;

ScheduleLimits limits(const PlanKey& key, const Gpu& gpu) {
  const std::int64_t bytes = fp32::shared_bytes(key.head_size_qk, key.head_size_v);
  const auto resident = static_cast<int>(gpu.shared_bytes_per_sm / (bytes + 1024));
  ScheduleLimits limits;
  limits.num_classes = 1;
  TileClass& cls = limits.classes[0];
  cls.tile_rows = fp32::kRows;
  cls.max_seq_rows = fp32::kRows;
  cls.block_keys = kBlockKeys;
  cls.block_cost = kBlockCost;
  cls.tile_cost = kTileCost;
  cls.workers = gpu.num_sms * std::clamp(resident, 1, kMostBlocksPerSm);
  cls.invariant_max_tiles = 4;
  return limits;
}

template <int kColumns>
void launch_columns(const AttendKernelParams& params, std::int32_t tile_class,
                    cudaStream_t stream) {
  const auto bytes = static_cast<int>(fp32::shared_bytes(params.head_size_qk, params.head_size_v));
  allow_shared_bytes<fp32::attend_kernel<kColumns>>(current_gpu(), bytes);
  const auto workers = static_cast<unsigned>(params.schedule.limits.classes[tile_class].workers);
  fp32::attend_kernel<kColumns>
      <<<workers, fp32::kThreads, static_cast<std::size_t>(bytes), stream>>>(params, tile_class);
  check(cudaGetLastError(), "attend_fp32");
}

void launch(const AttendKernelParams& params, std::int32_t tile_class, cudaStream_t stream) {
  const std::int32_t columns = (params.head_size_v + fp32::kThreads - 1) / fp32::kThreads;
  const auto launch_kernel = columns == 1   ? launch_columns<1>
                             : columns == 2 ? launch_columns<2>
                                            : launch_columns<5>;  // 576 and less
  launch_kernel(params, tile_class, stream);
}

}  // namespace

const AttendKernel& attend_fp32() {
  static constexpr AttendKernel kKernel{"fp32", false, limits, launch};
  return kKernel;
}

}  // namespace diffkv::cuda
