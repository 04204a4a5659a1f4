// The CUDA backend.
#pragma once

#include "diffkv/backend.h"

namespace diffkv::cuda {

const Backend& backend();

}  // namespace diffkv::cuda
