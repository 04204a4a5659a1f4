// The compiled tensor-core kernels and which problems they run.
#pragma once

#include <string>

#include "cuda/attend_kernel.h"
#include "cuda/device.h"
#include "diffkv/attention.h"

namespace diffkv::cuda {

// A kernel, or why there is none.
struct KernelChoice {
  const AttendKernel* kernel = nullptr;
  std::string reason;
};

// The kernel for plans of this key: the one with the least room for its head sizes.
KernelChoice find_mma_kernel(const PlanKey& key, const Gpu& gpu);

// Whether that kernel also runs the whole problem.
KernelChoice find_mma_kernel(const Problem& problem, const Gpu& gpu);

}  // namespace diffkv::cuda
