// The CPU backend.
#pragma once

#include "diffkv/backend.h"

namespace diffkv::cpu {

const Backend& backend();

}  // namespace diffkv::cpu
