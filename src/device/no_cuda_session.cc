// In place of cuda_session.cu in a build without CUDA.
#include <fmt/format.h>

#include "device/cuda_session.h"
#include "diffkv/error.h"

namespace diffkv::device {

std::unique_ptr<Session> open_cuda_session(const Backend& backend) {
  throw Error(ErrorCode::kUnavailable,
              fmt::format("backend {} computes on a GPU, this program was built without CUDA",
                          backend.name()));
}

}  // namespace diffkv::device
