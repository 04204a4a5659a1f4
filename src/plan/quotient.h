// Quotients that GPUs find faster than those of signed 64-bit numbers.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace diffkv::plan {

// Divisors are above 0: shapes and tile classes are checked before anything is planned.
// NOLINTBEGIN(clang-analyzer-core.DivideZero)

// a / b of numbers that are not negative, which GPUs divide faster as unsigned ones; of decode most
// quotients are 0 and many divisors 1.
DIFFKV_HD inline std::int32_t divide(std::int32_t a, std::int32_t b) {
  if (a < b) return 0;
  if (b == 1) return a;
  return static_cast<std::int32_t>(static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b));
}

// a / b; most numbers here are small, and GPUs divide those several times faster.
DIFFKV_HD inline std::int64_t quotient(std::int64_t a, std::int64_t b) {
  if (a < b) return 0;
  if (b == 1) return a;
  if (((a | b) >> 32) == 0) return static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b);
  return a / b;
}

// NOLINTEND(clang-analyzer-core.DivideZero)

}  // namespace diffkv::plan
