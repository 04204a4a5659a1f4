#include "cpu/bf16_dot.h"

#include "cpu/processor.h"

namespace diffkv::cpu {

#if defined(__x86_64__) && defined(__GNUC__)

bool bf16_dot_available() {
  static const bool available =
      __builtin_cpu_supports("avx512bf16") != 0 && __builtin_cpu_supports("avx512vbmi") != 0 &&
      __builtin_cpu_supports("avx512bw") != 0 && __builtin_cpu_supports("avx512dq") != 0 &&
      __builtin_cpu_supports("avx512vl") != 0;
  return available;
}

bool bf16_dot_is_fast() {
  static const bool is_fast = bf16_dot_available() && !made_by_intel();
  return is_fast;
}

#else  // no such instruction, or no compiler that is known to have it

bool bf16_dot_available() { return false; }
bool bf16_dot_is_fast() { return false; }

#endif

}  // namespace diffkv::cpu
