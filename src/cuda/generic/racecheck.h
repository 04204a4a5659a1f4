// What is different in a build for compute-sanitizer's racecheck (DIFFKV_CUDA_RACECHECK in CMake).
// It takes an arrival at an mbarrier for that of its lane alone, and takes warps for out of step
// that met others at different numbers of named barriers. So arrivals that speak for a warp are
// made by all its lanes there, and warps meet at mbarriers where not all of a kind do.
#pragma once

#include <cstdint>

namespace diffkv::cuda::mma {

#if defined(DIFFKV_CUDA_RACECHECK)
inline constexpr bool kForRacecheck = true;
#else
inline constexpr bool kForRacecheck = false;
#endif

// What such a build has in shared memory beside the rest; barriers are ptx::Barrier.
struct RacecheckMemory {
  std::uint64_t met;          // as kMetBarrier
  std::uint64_t together[2];  // as kTogetherBarrier, of a warpgroup each
  std::uint32_t found[2][4];  // what its warps say to each other there
};

}  // namespace diffkv::cuda::mma
