// fp8 keys and values become fp16 in shared memory, once for all rows of a tile, for warpgroups:
// wgmma multiplies 16-bit queries with nothing else.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/generic/fragments.cuh"
#include "cuda/generic/tile.h"

namespace diffkv::cuda::mma {

// Of the kWarpKeys keys that lie from `stored` on in a stage, whose first is the first of a group;
// by the four warps of a warpgroup. What `converted` holds then is what Operands says.
template <class T>
__device__ inline void convert_keys(const std::byte* stored, std::byte* converted) {
  using Operands = typename T::Operands;
  constexpr int kThreads = 4 * kWarp;
  constexpr int kRowChunks = T::kSlabChunks;  // of a slab, each of which becomes two
  constexpr int kRows = kThreads / kRowChunks;
  static_assert(T::kHeads == 1 && kRows % T::kGroupKeys == 0 && T::Grid::kWarpKeys % kRows == 0);
  // Two rows of stored chunks, and one of converted ones, go through all banks.
  const auto thread = static_cast<int>(threadIdx.x) % kThreads;
  const int row = thread / kRowChunks;
  const int chunk = thread % kRowChunks;
  const std::byte* from = stored + chunk_at<T>(row, chunk);
  std::byte* to[2] = {converted + chunk_at<Operands>(row, 2 * chunk),
                      converted + chunk_at<Operands>(row, 2 * chunk + 1)};
  // All loads before the stores, which the compiler must take to write what they read.
  constexpr int kSlabs = T::kKeySlabs + T::kValueSlabs;
  constexpr int kParts = T::Grid::kWarpKeys / kRows;
  uint4 x[kSlabs][kParts];
#pragma unroll
  for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      x[slab][part] = *reinterpret_cast<const uint4*>(from + row_of_key<T>(part * kRows) +
                                                      slab * T::kSlabBytes);
    }
  }
#pragma unroll
  for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const uint4& bytes = x[slab][part];
      uint4 half[2];
      halves_of_bytes<T::kStored>(bytes.x, half[0].x, half[0].y);
      halves_of_bytes<T::kStored>(bytes.y, half[0].z, half[0].w);
      halves_of_bytes<T::kStored>(bytes.z, half[1].x, half[1].y);
      halves_of_bytes<T::kStored>(bytes.w, half[1].z, half[1].w);
      const int at = slab * Operands::kSlabBytes + row_of_key<Operands>(part * kRows);
      *reinterpret_cast<uint4*>(to[0] + at) = half[0];
      *reinterpret_cast<uint4*>(to[1] + at) = half[1];
    }
  }
}

}  // namespace diffkv::cuda::mma
