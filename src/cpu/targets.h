// Which SIMD instruction sets the CPU kernels were built for, can run here, and use.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace diffkv::cpu {

// Names of the targets that were built and that this machine runs, best first, e.g. {"AVX3_BF16",
// "AVX3", "AVX2", "SSE4", "SCALAR"}: Highway's, and AVX3 with AVX512_BF16's products.
std::vector<std::string> supported_targets();

// Uses that target from now on; "" goes back to the default: the environment variable
// DIFFKV_CPU_TARGET, or the best. Process-wide; not to be called while kernels run.
// Throws Error(kUnavailable) with the names there are.
void set_target(std::string_view name);

// The target in use.
std::string current_target();

// Whether it multiplies pairs of bf16, where queries, keys and values allow it.
bool uses_bf16_dot();

}  // namespace diffkv::cpu
