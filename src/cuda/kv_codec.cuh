// Elements to and from fp32, eight at a time: rows start at multiples of 8 elements or 16 bytes and
// their lengths are multiples of 8, so that every access is a whole aligned vector.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"
#include "diffkv/tensor.h"

namespace diffkv::cuda {

inline constexpr int kChunk = 8;  // elements

// Eight elements of kBytes each, as they are in memory.
template <int kBytes>
struct Chunk {
  static constexpr int kWords = 2 * kBytes;
  std::uint32_t words[kWords];

  __device__ void load(const std::byte* from) {
    if constexpr (kBytes == 1) {
      const uint2 x = *reinterpret_cast<const uint2*>(from);
      words[0] = x.x, words[1] = x.y;
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        const uint4 x = reinterpret_cast<const uint4*>(from)[i / 4];
        words[i] = x.x, words[i + 1] = x.y, words[i + 2] = x.z, words[i + 3] = x.w;
      }
    }
  }

  __device__ void store(std::byte* to) const {
    if constexpr (kBytes == 1) {
      *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        reinterpret_cast<uint4*>(to)[i / 4] =
            make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
      }
    }
  }
};

// Two fp16 numbers; the instruction alone loses the sign and payload of a NaN, which does not
// matter where only numbers do (kNumbers).
template <bool kNumbers = false>
__device__ inline float2 f16_pair_to_floats(std::uint32_t bits) {
  const __half2 pair = *reinterpret_cast<const __half2*>(&bits);
  float2 x = __half22float2(pair);
  if (!kNumbers && (x.x != x.x || x.y != x.y)) {
    x.x = core::f16_to_float(static_cast<std::uint16_t>(bits));
    x.y = core::f16_to_float(static_cast<std::uint16_t>(bits >> 16));
  }
  return x;
}

// kNumbers: a NaN may become another one.
template <DType kDType, bool kNumbers = false>
__device__ inline void decode_chunk(const Chunk<static_cast<int>(size_of(kDType))>& chunk,
                                    float (&x)[kChunk]) {
#pragma unroll
  for (int j = 0; j < kChunk; ++j) {
    if constexpr (kDType == DType::kF32) {
      x[j] = core::float_of(chunk.words[j]);
    } else if constexpr (kDType == DType::kBF16) {
      const std::uint32_t pair = chunk.words[j / 2];
      x[j] = core::float_of(j % 2 == 0 ? pair << 16 : pair & 0xffff0000U);
    } else if constexpr (kDType == DType::kF16) {
      if (j % 2 == 1) continue;
      const float2 pair = f16_pair_to_floats<kNumbers>(chunk.words[j / 2]);
      x[j] = pair.x, x[j + 1] = pair.y;
    } else if constexpr (kDType == DType::kE5M2) {
      if (j % 2 == 1) continue;
      // An e5m2 is the upper half of an fp16.
      const std::uint32_t pair = chunk.words[j / 4] >> (8 * (j % 4));
      const float2 floats =
          f16_pair_to_floats<kNumbers>(((pair & 0xffU) << 8) | ((pair & 0xff00U) << 16));
      x[j] = floats.x, x[j + 1] = floats.y;
    } else {
      x[j] = core::e4m3_to_float(static_cast<std::uint8_t>(chunk.words[j / 4] >> (8 * (j % 4))));
    }
  }
}

template <DType kDType>
__device__ inline void load_chunk(const std::byte* row, std::int64_t i, float (&x)[kChunk]) {
  Chunk<static_cast<int>(size_of(kDType))> chunk;
  chunk.load(row + i * size_of(kDType));
  decode_chunk<kDType>(chunk, x);
}

// Elements [i, i + 8) of a row, i a multiple of 8.
__device__ inline void load_chunk(DType dtype, const std::byte* row, std::int64_t i,
                                  float (&x)[kChunk]) {
  switch (dtype) {
    case DType::kF32:
      return load_chunk<DType::kF32>(row, i, x);
    case DType::kF16:
      return load_chunk<DType::kF16>(row, i, x);
    case DType::kBF16:
      return load_chunk<DType::kBF16>(row, i, x);
    case DType::kE5M2:
      return load_chunk<DType::kE5M2>(row, i, x);
    default:
      return load_chunk<DType::kE4M3>(row, i, x);
  }
}

// Four floats as fp8 bytes, the same as core/dtype.h gives. kNumbers: none of them is a NaN.
template <bool kNumbers = false>
__device__ inline std::uint32_t fp8_word(DType dtype, float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 890
  const auto kind = dtype == DType::kE4M3 ? __NV_E4M3 : __NV_E5M2;
  const std::uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, kind);
  const std::uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, kind);
  const std::uint32_t word = low | (high << 16);
  // The instruction drops the sign of a NaN.
  if (kNumbers || __vcmpeq4(word & 0x7f7f7f7fU, 0x7f7f7f7fU) == 0) return word;
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

// Eight numbers, none of them a NaN, as fp8.
__device__ inline void store_fp8_numbers(DType dtype, const float (&x)[kChunk], std::byte* to) {
  *reinterpret_cast<uint2*>(to) = make_uint2(fp8_word<true>(dtype, x[0], x[1], x[2], x[3]),
                                             fp8_word<true>(dtype, x[4], x[5], x[6], x[7]));
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

}  // namespace diffkv::cuda
