// Calls of the CUDA runtime with their errors.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "diffkv/error.h"

namespace diffkv::device {

// Throws Error(kUnavailable) unless the call went well.
inline void check_cuda(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  throw Error(ErrorCode::kUnavailable, std::string(call) + ": " + cudaGetErrorString(status));
}

#define DIFFKV_CHECK_CUDA(call) ::diffkv::device::check_cuda((call), #call)

}  // namespace diffkv::device
