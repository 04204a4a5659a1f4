// What the lanes of a warp find out together.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace diffkv::cuda {

inline constexpr int kWarp = 32;
inline constexpr std::uint32_t kAllLanes = 0xffffffffU;

__device__ inline float sum_of_warp(float x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

// Of numbers none of which is NaN.
__device__ inline float max_of_warp(float x) {
  const auto ordered = [](std::int32_t bits) { return bits ^ (bits >> 31 & 0x7fffffff); };
  return __int_as_float(ordered(__reduce_max_sync(kAllLanes, ordered(__float_as_int(x)))));
}

// Of the lanes up to this one.
template <class T>
__device__ T sum_up_to_lane(T x) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const T below = __shfl_up_sync(kAllLanes, x, step);
    if (lane >= step) x += below;
  }
  return x;
}

}  // namespace diffkv::cuda
