// The SIMD targets the CPU kernels are built for; included before any Highway header.
// SSSE3 gains nothing over SSE4 and the portable fallback here. The kernels keep arrays of vectors
// in registers, which targets of a length unknown at compile time do not allow.
#pragma once

#ifdef DIFFKV_FEW_SIMD_TARGETS  // builds that compile slowly and do not measure: the fuzzers
#define HWY_DISABLED_TARGETS \
  (HWY_SSSE3 | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV | HWY_SSE4 | HWY_AVX3)
#else
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
#endif
