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

// 0 where a driver does not say.
int attribute_if_known(cudaDeviceAttr which, int index) {
  int value = 0;
  if (cudaDeviceGetAttribute(&value, which, index) == cudaSuccess) return value;
  cudaGetLastError();  // which would be the next call's, too
  return 0;
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
  // Two transfers a clock of so many kHz, so many bits wide.
  gpu.memory_rate = 2e3 * attribute_if_known(cudaDevAttrMemoryClockRate, index) *
                    attribute_if_known(cudaDevAttrGlobalMemoryBusWidth, index) / 8;
  return gpu;
}

Gpus find_gpus() {
  Gpus found;
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    cudaGetLastError();  // the caller's own calls must not find it
    count = 0;
  }
  int driver = 0;
  try {
    DIFFKV_CUDA_CALL(cudaDriverGetVersion(&driver));
    for (int i = 0; i < std::min(count, kMostGpus); ++i) found.list.push_back(describe(i));
    found.unavailable = why_unusable(status, driver, CUDART_VERSION, found.list);
  } catch (const Error& error) {
    found.unavailable = error.what();
  }
  if (!found.unavailable.empty()) found.list.clear();
  return found;
}

// "" or why a GPU is too old.
std::string why_too_old(const Gpu& gpu) {
  if (gpu.capability() >= kLeastCapability) return "";
  return fmt::format("cuda:{} ({}) has compute capability {}.{}, expected {}.{} or more", gpu.index,
                     gpu.name, gpu.major, gpu.minor, kLeastCapability / 10, kLeastCapability % 10);
}

std::string cuda_version(int version) {
  return fmt::format("CUDA {}.{}", version / 1000, version % 1000 / 10);
}

}  // namespace

void check(cudaError_t status, std::string_view call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // the error is told here; a later call must not find it again
  throw Error(ErrorCode::kUnavailable,
              fmt::format("{}: {} ({})", call.substr(0, call.find('(')), cudaGetErrorString(status),
                          cudaGetErrorName(status)));
}

std::string why_unusable(cudaError_t status, int driver, int runtime,
                         const std::vector<Gpu>& list) {
  if (status == cudaErrorInsufficientDriver && driver == 0) return "there is no NVIDIA driver";
  if (status == cudaErrorInsufficientDriver) {
    return fmt::format("the NVIDIA driver is for {}, this library was built with {}",
                       cuda_version(driver), cuda_version(runtime));
  }
  if (status == cudaErrorNoDevice || (status == cudaSuccess && list.empty())) {
    return "there is no GPU";
  }
  if (status != cudaSuccess) {
    return fmt::format("no GPU can be used: {} ({})", cudaGetErrorString(status),
                       cudaGetErrorName(status));
  }
  const bool any = std::any_of(list.begin(), list.end(),
                               [](const Gpu& gpu) { return why_too_old(gpu).empty(); });
  return any ? "" : why_too_old(list[0]);
}

const Gpus& gpus() {
  static const Gpus found = find_gpus();
  return found;
}

const Gpu& gpu(int index) {
  const Gpus& found = gpus();
  if (!found.unavailable.empty()) throw Error(ErrorCode::kUnavailable, found.unavailable);
  if (index < 0 || index >= static_cast<int>(found.list.size())) {
    throw Error(
        ErrorCode::kUnavailable,
        fmt::format("there is no cuda:{}, the number of GPUs is {}", index, found.list.size()));
  }
  const Gpu& one = found.list[static_cast<std::size_t>(index)];
  if (const std::string why = why_too_old(one); !why.empty()) {
    throw Error(ErrorCode::kUnavailable, why);
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
