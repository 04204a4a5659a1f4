// GPUs, and the calls of the CUDA runtime with their errors.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "diffkv/tensor.h"

namespace diffkv::cuda {

// Throws Error(kUnavailable) with the call and what the runtime says, unless it went well.
void check(cudaError_t status, std::string_view call);

#define DIFFKV_CUDA_CALL(call) ::diffkv::cuda::check((call), #call)

// One visible GPU: what the choice of kernels and of workers depends on.
struct Gpu {
  std::string name;
  int index = 0;
  int major = 0;  // compute capability
  int minor = 0;
  int num_sms = 0;
  int shared_bytes_per_block = 0;  // with opt-in
  int shared_bytes_per_sm = 0;
  std::int64_t memory_bytes = 0;
  double memory_rate = 0.0;  // bytes/s by clock and width; 0 if unknown

  int capability() const { return 10 * major + minor; }
};

inline constexpr int kLeastCapability = 80;
inline constexpr int kMostGpus = 64;  // later ones are not used

// Every visible GPU, asked for once; none: why not.
struct Gpus {
  std::vector<Gpu> list;
  std::string unavailable;
};
const Gpus& gpus();

// "" or why no GPU of this machine can be used. `status` is of asking for their number; `driver`
// and `runtime` are versions of CUDA as it writes them (12040), a driver of 0 is none.
std::string why_unusable(cudaError_t status, int driver, int runtime, const std::vector<Gpu>& list);

// The GPU of that number, one that this library runs on. Throws Error(kUnavailable).
const Gpu& gpu(int index);

// The calling thread's current GPU. Throws Error(kUnavailable).
const Gpu& current_gpu();

// Makes a tensors' device the thread's current one and restores the former at its end.
class DeviceGuard {
 public:
  // Throws Error(kUnavailable) if there is no such GPU.
  explicit DeviceGuard(const Device& device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int former_ = 0;
  int current_ = 0;
};

inline cudaStream_t handle_of(Stream stream) { return static_cast<cudaStream_t>(stream.handle); }

}  // namespace diffkv::cuda
