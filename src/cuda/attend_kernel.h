// An attention kernel as the backend and the table of kernels see it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string_view>

#include "cuda/device.h"
#include "cuda/params.h"
#include "diffkv/attention.h"
#include "diffkv/plan.h"

namespace diffkv::cuda {

struct AttendKernel {
  std::string_view name;  // what Support::kernel says
  // Whether it can merge the cut tiles of a kBalanced plan itself
  // (AttendKernelParams::merges_tiles).
  bool can_merge_tiles;

  // The tile classes of plans of this key on this GPU, `workers` included; workers are resident
  // thread blocks. The only thing that the planner learns of a kernel.
  ScheduleLimits (*limits)(const PlanKey& key, const Gpu& gpu);

  // Enqueues one tile class on the stream, on the current device: worker w of the class runs
  //   plan::for_each_piece(params.schedule, tile_class, w, ...)
  // and writes whole tiles to the output and pieces of cut tiles to their partials, which it merges
  // if merges_tiles says so. Throws Error.
  void (*launch)(const AttendKernelParams& params, std::int32_t tile_class, cudaStream_t stream);
};

// The kernel that runs every case, with the tile classes of whatever kernel the plan was made for.
const AttendKernel& attend_fp32();

}  // namespace diffkv::cuda
