// Which attention kernel runs what: a tensor-core kernel where there is one for the problem, else
// the fp32 kernel. The environment variable DIFFKV_CUDA_KERNEL, "fp32" or "mma", takes one family
// alone, so that each can be checked against the other. It is read once, because every call asks.
#pragma once

#include <string>
#include <string_view>

#include "cuda/attend_kernel.h"
#include "cuda/device.h"
#include "diffkv/attention.h"

namespace diffkv::cuda {

// A kernel, or why none may run it.
struct Choice {
  const AttendKernel* kernel = nullptr;
  std::string reason;
};

// The environment variable when it was first asked for; "" if it was not set.
std::string_view wanted_kernel();

// For plans of this key.
Choice choose_kernel(const PlanKey& key, const Gpu& gpu, std::string_view wanted = wanted_kernel());

// For one problem. A kernel other than that of its plans' key is the fp32 kernel, which takes
// the tile classes of any.
Choice choose_kernel(const Problem& problem, const Gpu& gpu,
                     std::string_view wanted = wanted_kernel());

}  // namespace diffkv::cuda
