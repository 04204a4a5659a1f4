// Elements to and from fp32, eight at a time: rows start at multiples of 8 elements or 16 bytes and
// their lengths are multiples of 8, so that every access is a whole aligned vector.
#pragma once

#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"
#include "diffkv/tensor.h"

namespace diffkv::cuda {

inline constexpr int kChunk = 8;  // elements

// As core::f16_to_float; the instruction alone loses the sign and payload of a NaN.
__device__ inline float f16_bits_to_float(std::uint32_t bits) {
  const float x = __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  return x == x ? x : core::f16_to_float(static_cast<std::uint16_t>(bits));
}

// Elements [i, i + 8) of a row, i a multiple of 8.
__device__ inline void load_chunk(DType dtype, const std::byte* row, std::int64_t i,
                                  float (&x)[kChunk]) {
  switch (dtype) {
    case DType::kF32: {
      const float4* from = reinterpret_cast<const float4*>(row) + i / 4;
      const float4 low = from[0];
      const float4 high = from[1];
      x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
      x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
      return;
    }
    case DType::kF16:
    case DType::kBF16: {
      const uint4 words = reinterpret_cast<const uint4*>(row)[i / kChunk];
      const std::uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (dtype == DType::kF16) {
          x[2 * j] = f16_bits_to_float(pairs[j] & 0xffffU);
          x[2 * j + 1] = f16_bits_to_float(pairs[j] >> 16);
        } else {
          x[2 * j] = core::float_of(pairs[j] << 16);
          x[2 * j + 1] = core::float_of(pairs[j] & 0xffff0000U);
        }
      }
      return;
    }
    default: {
      const uint2 words = reinterpret_cast<const uint2*>(row)[i / kChunk];
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        const std::uint32_t word = j < 4 ? words.x : words.y;
        const auto byte = static_cast<std::uint8_t>(word >> (8 * (j % 4)));
        // The upper half of an fp16 is an e5m2.
        x[j] = dtype == DType::kE5M2 ? f16_bits_to_float(std::uint32_t{byte} << 8)
                                     : core::e4m3_to_float(byte);
      }
    }
  }
}

// Four floats as fp8 bytes, the same as core/dtype.h gives.
__device__ inline std::uint32_t fp8_word(DType dtype, float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 890
  const auto kind = dtype == DType::kE4M3 ? __NV_E4M3 : __NV_E5M2;
  const std::uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, kind);
  const std::uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, kind);
  const std::uint32_t word = low | (high << 16);
  // The instruction drops the sign of a NaN.
  if (__vcmpeq4(word & 0x7f7f7f7fU, 0x7f7f7f7fU) == 0) return word;
#endif
  const float x[4] = {a, b, c, d};
  std::uint32_t bytes = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const std::uint32_t byte =
        dtype == DType::kE4M3 ? core::float_to_e4m3(x[j]) : core::float_to_e5m2(x[j]);
    bytes |= byte << (8 * j);
  }
  return bytes;
}

// Elements [i, i + 8) of a row, i a multiple of 8.
__device__ inline void store_chunk(DType dtype, const float (&x)[kChunk], std::byte* row,
                                   std::int64_t i) {
  switch (dtype) {
    case DType::kF32: {
      float4* to = reinterpret_cast<float4*>(row) + i / 4;
      to[0] = make_float4(x[0], x[1], x[2], x[3]);
      to[1] = make_float4(x[4], x[5], x[6], x[7]);
      return;
    }
    case DType::kF16:
    case DType::kBF16: {
      std::uint32_t pairs[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool f16 = dtype == DType::kF16;
        const std::uint32_t low =
            f16 ? core::float_to_f16(x[2 * j]) : core::float_to_bf16(x[2 * j]);
        const std::uint32_t high =
            f16 ? core::float_to_f16(x[2 * j + 1]) : core::float_to_bf16(x[2 * j + 1]);
        pairs[j] = low | (high << 16);
      }
      reinterpret_cast<uint4*>(row)[i / kChunk] =
          make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
      return;
    }
    default:
      reinterpret_cast<uint2*>(row)[i / kChunk] = make_uint2(
          fp8_word(dtype, x[0], x[1], x[2], x[3]), fp8_word(dtype, x[4], x[5], x[6], x[7]));
  }
}

// Element i of a row, encoded as `dtype`.
__device__ inline void store_element(DType dtype, float x, std::byte* row, std::int64_t i) {
  core::store_row(dtype, &x, 1, row + i * size_of(dtype));
}

// Copies eight elements of `bytes` bytes each.
__device__ inline void copy_chunk(int bytes, const std::byte* from, std::byte* to, std::int64_t i) {
  if (bytes == 1) {
    reinterpret_cast<uint2*>(to)[i / kChunk] = reinterpret_cast<const uint2*>(from)[i / kChunk];
  } else if (bytes == 2) {
    reinterpret_cast<uint4*>(to)[i / kChunk] = reinterpret_cast<const uint4*>(from)[i / kChunk];
  } else {
    const uint4 low = reinterpret_cast<const uint4*>(from)[i / 4];
    const uint4 high = reinterpret_cast<const uint4*>(from)[i / 4 + 1];
    reinterpret_cast<uint4*>(to)[i / 4] = low;
    reinterpret_cast<uint4*>(to)[i / 4 + 1] = high;
  }
}

}  // namespace diffkv::cuda
