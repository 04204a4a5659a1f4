// Sessions on CUDA devices.
#pragma once

#include <memory>

#include "device/session.h"

namespace diffkv::device {

// Throws Error(kUnavailable) in a build without CUDA, or if the GPU fails.
std::unique_ptr<Session> open_cuda_session(const Backend& backend);

}  // namespace diffkv::device
