// Which SIMD instruction sets the CPU kernels were built for, can run here, and use.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace diffkv::cpu {

// Names of the targets that were built and that this machine runs, best first, e.g. {"AVX3_AMX",
// "AVX3_BF16", "AVX3", "AVX2", "SSE4", "SCALAR"}: Highway's, AVX3 with AVX512_BF16's products, and
// that with those of the matrix unit.
std::vector<std::string> supported_targets();

// Uses that target from now on; "" goes back to the default: the environment variable
// DIFFKV_CPU_TARGET, or the best. Process-wide; not to be called while kernels run, nor between
// asking for the size of a workspace and planning in it.
// Throws Error(kUnavailable) with the names there are.
void set_target(std::string_view name);

// The target in use.
std::string current_target();

// Whether it multiplies pairs of bf16, where queries, keys and values allow it.
bool uses_bf16_dot();

// Whether it multiplies tiles of bf16 in the matrix unit, where many rows share keys and the system
// permits it (amx.h).
bool uses_amx();

}  // namespace diffkv::cpu
