// Launches that cost little: kernels that start while the one before them ends, and attributes
// that are set once.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <mutex>
#include <string_view>
#include <type_traits>

#include "cuda/device.h"

namespace diffkv::cuda {

struct LaunchShape {
  dim3 grid;
  dim3 block;
  int shared_bytes = 0;
};

// Whether kernels of this build can start early on that GPU, which is the current one. Those
// compiled for older GPUs would not wait.
bool can_start_early(const Gpu& gpu);

// What kKernel's code that runs on that GPU, which is the current one, was compiled for, as
// capability(): less than the GPU's where it was made from PTX.
template <auto kKernel>
int code_of(const Gpu& gpu) {
  static std::array<std::atomic<int>, kMostGpus> known{};
  std::atomic<int>& code = known[static_cast<std::size_t>(gpu.index)];
  if (code.load(std::memory_order_relaxed) == 0) {
    cudaFuncAttributes attributes{};
    DIFFKV_CUDA_CALL(cudaFuncGetAttributes(&attributes, kKernel));
    code.store(attributes.ptxVersion, std::memory_order_relaxed);
  }
  return code.load(std::memory_order_relaxed);
}

// Enqueues a kernel that does what dependent_launch.cuh asks: where it can, it starts while the
// kernel before it on the stream ends. Throws Error, with `name`, if the launch is refused.
template <class... Params>
void launch_early(const Gpu& gpu, std::string_view name, void (*kernel)(Params...),
                  const LaunchShape& shape, cudaStream_t stream,
                  const std::type_identity_t<Params>&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = static_cast<std::size_t>(shape.shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = can_start_early(gpu) ? 1 : 0;
  // Not cudaLaunchKernelEx, which copies the arguments: some have 2 KB.
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  check(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), addresses), name);
}

// Lets kKernel have so much dynamic shared memory on that GPU, which is the current one. The
// driver is asked only for more than it was.
template <auto kKernel>
void allow_shared_bytes(const Gpu& gpu, int bytes) {
  static std::array<std::atomic<int>, kMostGpus> allowed{};
  static std::mutex asking;
  std::atomic<int>& most = allowed[static_cast<std::size_t>(gpu.index)];
  if (bytes <= most.load(std::memory_order_acquire)) return;
  const std::lock_guard<std::mutex> lock(asking);
  if (bytes <= most.load(std::memory_order_relaxed)) return;
  DIFFKV_CUDA_CALL(
      cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  most.store(bytes, std::memory_order_release);
}

}  // namespace diffkv::cuda
