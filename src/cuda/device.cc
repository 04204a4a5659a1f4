#include "cuda/device.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>

#include "diffkv/error.h"

namespace diffkv::cuda {
namespace {

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  DIFFKV_CUDA_CALL(cudaDeviceGetAttribute(&value, which, index));
  return value;
}

Gpu describe(int index) {
  cudaDeviceProp properties{};
  DIFFKV_CUDA_CALL(cudaGetDeviceProperties(&properties, index));
  Gpu gpu;
  gpu.name = properties.name;
  gpu.index = index;
  gpu.major = properties.major;
  gpu.minor = properties.minor;
  gpu.num_sms = properties.multiProcessorCount;
  gpu.shared_bytes_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  gpu.shared_bytes_per_sm = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
  gpu.memory_bytes = static_cast<std::int64_t>(properties.totalGlobalMem);
  return gpu;
}

Gpus find_gpus() {
  Gpus found;
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    found.unavailable = fmt::format("no GPU can be used: {}", cudaGetErrorString(status));
    return found;
  }
  try {
    for (int i = 0; i < std::min(count, kMostGpus); ++i) found.list.push_back(describe(i));
  } catch (const Error& error) {
    found.list.clear();
    found.unavailable = error.what();
    return found;
  }
  const bool any = std::any_of(found.list.begin(), found.list.end(),
                               [](const Gpu& gpu) { return gpu.capability() >= kLeastCapability; });
  if (!any) {
    found.unavailable =
        found.list.empty()
            ? "there is no GPU"
            : fmt::format("{} has compute capability {}.{}, expected {}.{} or more",
                          found.list[0].name, found.list[0].major, found.list[0].minor,
                          kLeastCapability / 10, kLeastCapability % 10);
  }
  return found;
}

}  // namespace

void check(cudaError_t status, std::string_view call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // the error is told here; a later call must not find it again
  throw Error(ErrorCode::kUnavailable,
              fmt::format("{}: {} ({})", call.substr(0, call.find('(')), cudaGetErrorString(status),
                          cudaGetErrorName(status)));
}

const Gpus& gpus() {
  static const Gpus found = find_gpus();
  return found;
}

const Gpu& gpu(int index) {
  const Gpus& found = gpus();
  if (!found.unavailable.empty()) throw Error(ErrorCode::kUnavailable, found.unavailable);
  if (index < 0 || index >= static_cast<int>(found.list.size())) {
    throw Error(ErrorCode::kUnavailable,
                fmt::format("there is no cuda:{}, there are {} GPUs", index, found.list.size()));
  }
  const Gpu& one = found.list[static_cast<std::size_t>(index)];
  if (one.capability() < kLeastCapability) {
    throw Error(
        ErrorCode::kUnavailable,
        fmt::format("cuda:{} ({}) has compute capability {}.{}, expected {}.{} or more", index,
                    one.name, one.major, one.minor, kLeastCapability / 10, kLeastCapability % 10));
  }
  return one;
}

const Gpu& current_gpu() {
  if (!gpus().unavailable.empty()) throw Error(ErrorCode::kUnavailable, gpus().unavailable);
  int index = 0;
  DIFFKV_CUDA_CALL(cudaGetDevice(&index));
  return gpu(index);
}

DeviceGuard::DeviceGuard(const Device& device) : current_(gpu(device.index).index) {
  DIFFKV_CUDA_CALL(cudaGetDevice(&former_));
  if (former_ != current_) DIFFKV_CUDA_CALL(cudaSetDevice(current_));
}

DeviceGuard::~DeviceGuard() {
  if (former_ != current_) cudaSetDevice(former_);
}

}  // namespace diffkv::cuda
