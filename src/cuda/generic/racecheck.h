// What is different in a build for compute-sanitizer's racecheck (DIFFKV_CUDA_RACECHECK in CMake).
// It takes an arrival at an mbarrier for that of its lane alone, and takes warps for out of step
// that met others at different numbers of named barriers. So there all lanes arrive, and warps meet
// at mbarriers where not all of a kind do.
#pragma once

namespace diffkv::cuda::mma {

#if defined(DIFFKV_CUDA_RACECHECK)
inline constexpr bool kForRacecheck = true;
#else
inline constexpr bool kForRacecheck = false;
#endif

}  // namespace diffkv::cuda::mma
