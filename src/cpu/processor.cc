#include "cpu/processor.h"

#include <atomic>

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

namespace diffkv::cpu {
namespace {

#if defined(__x86_64__) && defined(__GNUC__)

// AMD's family 26 is Zen 5. GCC knows it by name from version 14 on.
bool is_zen5_or_later() {
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  if (__builtin_cpu_is("amd") == 0 || __get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0) return false;
  const unsigned base = eax >> 8U & 0xFU;
  const unsigned extended = eax >> 20U & 0xFFU;
  return base + extended >= 26;
}

#else

bool is_zen5_or_later() { return false; }

#endif

Tuning own() { return {!made_by_intel(), is_zen5_or_later()}; }

std::atomic<bool> row_blocks{own().row_blocks};
std::atomic<bool> near_fetch{own().near_fetch};

}  // namespace

#if defined(__x86_64__) && defined(__GNUC__)
bool made_by_intel() { return __builtin_cpu_is("intel") != 0; }
#else
bool made_by_intel() { return false; }
#endif

Tuning tuning() { return {row_blocks, near_fetch}; }

void set_tuning(std::optional<Tuning> wanted) {
  const Tuning now = wanted.value_or(own());
  row_blocks = now.row_blocks;
  near_fetch = now.near_fetch;
}

}  // namespace diffkv::cpu
