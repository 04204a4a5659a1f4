// Which attention kernel runs what: a tensor-core kernel where there is one for the problem, else
// the fp32 kernel. The environment variable DIFFKV_CUDA_KERNEL, "fp32" or "mma", takes one family
// alone, so that each can be checked against the other.
#pragma once

#include <string>

#include "cuda/attend_kernel.h"
#include "cuda/device.h"
#include "diffkv/attention.h"

namespace diffkv::cuda {

// A kernel, or why none may run it.
struct Choice {
  const AttendKernel* kernel = nullptr;
  std::string reason;
};

// For plans of this key.
Choice choose_kernel(const PlanKey& key, const Gpu& gpu);

// For one problem. A kernel other than that of its plans' key is the fp32 kernel, which takes
// the tile classes of any.
Choice choose_kernel(const Problem& problem, const Gpu& gpu);

}  // namespace diffkv::cuda
