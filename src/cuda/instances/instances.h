// What was compiled; instances.cmake says what is.
#pragma once

#include <vector>

#include "cuda/attend_kernel.h"
#include "cuda/device.h"
#include "diffkv/tensor.h"

namespace diffkv::cuda {

// A kernel and the GPUs whose shared memory holds it.
struct MmaKernel {
  AttendKernel attend;
  bool (*fits)(const Gpu& gpu);
};

namespace mma {

// Keys and values of kStored, head sizes up to those given. One translation unit each.
template <DType kStored, int kHeadSizeQk, int kHeadSizeV>
const MmaKernel& kernel();

}  // namespace mma

struct Instance {
  DType stored;
  int head_size_qk;
  int head_size_v;
  const MmaKernel& (*kernel)();
};

const std::vector<Instance>& instances();

}  // namespace diffkv::cuda
