// Keys and values from shared memory to the operands of mma.m16n8k16, whatever the cache stores.
//
// One ldmatrix.x4 always brings 16 keys x 32 bytes. For fp8 that is twice as many columns, in an
// order that costs nothing: a 16-column step of the scores takes, in its slots 2t, 2t + 1, 2t + 8
// and 2t + 9, the columns 4t .. 4t + 3 (queries are stored in that order), and two neighbouring
// tiles of 8 value columns hold the even and the odd ones of 16.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/generic/ptx.cuh"
#include "cuda/generic/tile.h"

namespace diffkv::cuda::mma {

// Bytes of a row that one step covers.
inline constexpr int kStepBytes = 32;

// Halves whose upper bytes are e5m2 bits: their fp16 values. Halves whose upper bytes are e4m3
// bits: likewise, by arithmetic for GPUs that can't convert.
template <DType kStored>
__device__ inline std::uint32_t halves_of_upper_bytes(std::uint32_t x) {
  if constexpr (kStored == DType::kE5M2) return x;
  const std::uint32_t sign = x & 0x80008000U;
  const std::uint32_t magnitude = (x & 0x7f007f00U) >> 1;  // fp16 with a bias of 7
  // Bit 15 of a half is set where the magnitude is all ones: NaN.
  const std::uint32_t nan = (magnitude + 0x40804080U) & 0x80008000U;
  std::uint32_t value;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(value) : "r"(sign | magnitude), "r"(0x5c005c00U));  // 2^8
  return value | (nan - (nan >> 15));
}

// Bytes 0, 1 and 2, 3 of x as pairs of fp16.
template <DType kStored>
__device__ inline void halves_of_bytes(std::uint32_t x, std::uint32_t& first,
                                       std::uint32_t& second) {
#if __CUDA_ARCH__ >= 890
  if constexpr (kStored == DType::kE4M3) {
    asm("{\n\t.reg .b16 low, high;\n\t"
        "mov.b32 {low, high}, %2;\n\t"
        "cvt.rn.f16x2.e4m3x2 %0, low;\n\t"
        "cvt.rn.f16x2.e4m3x2 %1, high;\n\t}"
        : "=r"(first), "=r"(second)
        : "r"(x));
    return;
  }
#endif
  first = halves_of_upper_bytes<kStored>(__byte_perm(x, 0, 0x1404));
  second = halves_of_upper_bytes<kStored>(__byte_perm(x, 0, 0x3424));
}

// Bytes 0, 2 and 1, 3 of x as pairs of fp16.
template <DType kStored>
__device__ inline void halves_of_even_odd(std::uint32_t x, std::uint32_t& even,
                                          std::uint32_t& odd) {
#if __CUDA_ARCH__ >= 890
  if constexpr (kStored == DType::kE4M3) {
    halves_of_bytes<kStored>(__byte_perm(x, 0, 0x3120), even, odd);
    return;
  }
#endif
  even = halves_of_upper_bytes<kStored>(__byte_perm(x, 0, 0x2404));
  odd = halves_of_upper_bytes<kStored>(__byte_perm(x, 0, 0x3414));
}

// The right operands of 16 keys: b[column step][tile of 8 keys][register].
template <class T>
struct KeyStep {
  static constexpr int kSteps = T::kFp8 ? 2 : 1;  // of 16 columns

  // `m`: what ldmatrix gives at_step() of key_address().
  __device__ explicit KeyStep(const std::uint32_t (&m)[4]) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      if constexpr (T::kFp8) {
        halves_of_bytes<T::kStored>(m[2 * n], b[0][n][0], b[0][n][1]);
        halves_of_bytes<T::kStored>(m[2 * n + 1], b[1][n][0], b[1][n][1]);
      } else {
        b[0][n][0] = m[2 * n];
        b[0][n][1] = m[2 * n + 1];
      }
    }
  }

  std::uint32_t b[kSteps][2][2];
};

// Where a lane's row of the first KeyStep is: `box` is the address of 16 keys' box.
template <class T>
__device__ inline std::uint32_t key_address(std::uint32_t box, int lane) {
  return box + static_cast<std::uint32_t>(chunk_at<T>(lane / 16 * 8 + lane % 8, lane / 8 % 2));
}

// The address of step `step` (of kStepBytes) from that of step 0, of keys or of values. A box
// starts at a multiple of 512 bytes, so that the lower bits are those of the place in the slab.
template <class T>
__device__ inline std::uint32_t at_step(std::uint32_t address, int step) {
  constexpr int kSteps = T::kSlabRowBytes / kStepBytes;  // of a slab
  return (address ^ static_cast<std::uint32_t>(step % kSteps * kStepBytes)) +
         static_cast<std::uint32_t>(step / kSteps * T::kSlabBytes);
}

// The right operands of 16 keys' values: b[tile of 8 columns][register].
template <class T>
struct ValueStep {
  static constexpr int kTiles = T::kFp8 ? 4 : 2;

  // `m`: what ldmatrix.trans gives at_step() of value_address().
  __device__ explicit ValueStep(const std::uint32_t (&m)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = i / 2;  // group of 16 bytes
      if constexpr (T::kFp8) {
        halves_of_even_odd<T::kStored>(m[i], b[2 * n][i % 2], b[2 * n + 1][i % 2]);
      } else {
        b[n][i % 2] = m[i];
      }
    }
  }

  std::uint32_t b[kTiles][2];
};

template <class T>
__device__ inline std::uint32_t value_address(std::uint32_t box, int lane) {
  return box + static_cast<std::uint32_t>(T::kValuesInGroup + chunk_at<T>(lane % 16, lane / 16));
}

// The left operand: 16 rows x 16 columns of queries; `address` from query_address().
template <class T>
__device__ inline std::uint32_t query_address(std::uint32_t rows, int lane) {
  return rows + static_cast<std::uint32_t>(lane % 16 * T::kQueryPitch + lane / 16 * 16);
}

// The column that element i (0 or 1, of row i / 4 or i / 4 + 8 of a lane) of accumulator tile n
// stands for.
template <class T>
__device__ constexpr int column_of(int n, int lane, int i) {
  const int t = lane % 4;
  return T::kMixesColumns ? n / 2 * 16 + 4 * t + 2 * i + n % 2 : n * 8 + 2 * t + i;
}

// Whether some of 16 bytes of stored elements are infinite or NaN.
template <class T>
__device__ inline bool any_not_finite(const uint4& x) {
  bool found = false;
  for (const std::uint32_t word : {x.x, x.y, x.z, x.w}) {
    if constexpr (T::kStored == DType::kE4M3) {
      found |= __vcmpeq4(word & 0x7f7f7f7fU, 0x7f7f7f7fU) != 0;
    } else if constexpr (T::kStored == DType::kE5M2) {
      found |= __vcmpeq4(word & 0x7c7c7c7cU, 0x7c7c7c7cU) != 0;
    } else {
      constexpr std::uint32_t kExponents = T::kHalf ? 0x7c007c00U : 0x7f807f80U;
      found |= __vcmpeq2(word & kExponents, kExponents) != 0;
    }
  }
  return found;
}

// One stored value of a key of a stage.
template <class T>
__device__ inline float value_at(const std::byte* stage, int key, int column) {
  constexpr int kColumns = 16 / T::kStoredBytes;  // of a chunk
  const std::byte* chunk = stage + T::kValuesInGroup + chunk_at<T>(key, column / kColumns);
  column %= kColumns;
  if constexpr (T::kFp8) {
    const auto bits = static_cast<std::uint32_t>(chunk[column]);
    std::uint32_t first;
    std::uint32_t second;
    halves_of_bytes<T::kStored>(bits, first, second);
    return __half2float(__ushort_as_half(static_cast<std::uint16_t>(first)));
  } else {
    const std::uint16_t bits = reinterpret_cast<const std::uint16_t*>(chunk)[column];
    if constexpr (T::kHalf) return __half2float(__ushort_as_half(bits));
    return __uint_as_float(static_cast<std::uint32_t>(bits) << 16);
  }
}

}  // namespace diffkv::cuda::mma
