// Scalar encode and decode of every element type, host and device. Branch-free where it pays, so
// that plain loops over them vectorise.
#pragma once

#include <bit>
#include <cstdint>

#include "core/host_device.h"
#include "diffkv/tensor.h"

namespace diffkv::core {

DIFFKV_HD inline std::uint32_t bits_of(float x) { return std::bit_cast<std::uint32_t>(x); }
DIFFKV_HD inline float float_of(std::uint32_t bits) { return std::bit_cast<float>(bits); }

inline constexpr std::uint32_t kF32Inf = 0x7f800000U;

DIFFKV_HD inline float bf16_to_float(std::uint16_t x) {
  return float_of(static_cast<std::uint32_t>(x) << 16);
}

// Round to nearest even; NaN stays NaN (made quiet).
DIFFKV_HD inline std::uint16_t float_to_bf16(float x) {
  const std::uint32_t u = bits_of(x);
  const std::uint32_t rounded = (u + 0x7fffU + ((u >> 16) & 1U)) >> 16;
  const std::uint32_t nan = (u >> 16) | 0x40U;
  return static_cast<std::uint16_t>((u & 0x7fffffffU) > kF32Inf ? nan : rounded);
}

DIFFKV_HD inline float f16_to_float(std::uint16_t x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x & 0x8000U) << 16;
  const std::uint32_t mag = x & 0x7fffU;
  // Exponent 31 (inf, NaN) keeps its mantissa under fp32's exponent 255; the rest is scaled by a
  // power of two, exact for normals and subnormals alike.
  if (mag >= 0x7c00U) {
    const std::uint32_t quiet = mag > 0x7c00U ? 0x400000U : 0U;  // as instructions do
    return float_of(sign | kF32Inf | quiet | ((mag & 0x3ffU) << 13));
  }
  const float scaled = float_of((mag << 13) + (112U << 23));
  const float normal = mag >= 0x400U ? scaled : static_cast<float>(mag) * 0x1p-24F;
  return float_of(sign | bits_of(normal));
}

// Round to nearest even; beyond the largest finite value, infinity; NaN stays NaN.
DIFFKV_HD inline std::uint16_t float_to_f16(float x) {
  const std::uint32_t u = bits_of(x);
  const std::uint32_t sign = (u >> 16) & 0x8000U;
  const std::uint32_t mag = u & 0x7fffffffU;
  // Below the least normal, adding 0.5 leaves the rounded subnormal in the low mantissa bits
  // (the spacing of floats at 0.5 is 2^-24).
  const std::uint32_t subnormal = bits_of(float_of(mag) + 0.5F) - bits_of(0.5F);
  const std::uint32_t normal = (mag - (112U << 23) + 0xfffU + ((mag >> 13) & 1U)) >> 13;
  std::uint32_t code = mag < (113U << 23) ? subnormal : normal;
  code = code > 0x7c00U || mag >= (143U << 23) ? 0x7c00U : code;
  code = mag > kF32Inf ? 0x7e00U : code;
  return static_cast<std::uint16_t>(sign | code);
}

DIFFKV_HD inline float e4m3_to_float(std::uint8_t x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x & 0x80U) << 24;
  const std::uint32_t mag = x & 0x7fU;
  if (mag == 0x7fU) return float_of(sign | 0x7fc00000U);
  const float normal = float_of((mag << 20) + (120U << 23));
  return float_of(sign | bits_of(mag >= 8U ? normal : static_cast<float>(mag) * 0x1p-9F));
}

DIFFKV_HD inline float e5m2_to_float(std::uint8_t x) {
  return f16_to_float(static_cast<std::uint16_t>(x << 8));
}

// Round to nearest even, saturated to 448 (infinities too); NaN stays NaN.
DIFFKV_HD inline std::uint8_t float_to_e4m3(float x) {
  const std::uint32_t u = bits_of(x);
  const std::uint32_t sign = (u >> 24) & 0x80U;
  const std::uint32_t mag = u & 0x7fffffffU;
  // Spacing 2^-9 below the least normal 2^-6: floats at 2^14 have that spacing.
  const std::uint32_t subnormal = bits_of(float_of(mag) + 0x1p14F) - bits_of(0x1p14F);
  const std::uint32_t normal = (mag - (120U << 23) + 0x7ffffU + ((mag >> 20) & 1U)) >> 20;
  std::uint32_t code = mag < (121U << 23) ? subnormal : normal;
  code = mag >= 0x43e00000U ? 0x7eU : code;  // 448
  code = mag > kF32Inf ? 0x7fU : code;
  return static_cast<std::uint8_t>(sign | code);
}

// Round to nearest even, saturated to 57344 (infinities too); NaN stays NaN.
DIFFKV_HD inline std::uint8_t float_to_e5m2(float x) {
  const std::uint32_t u = bits_of(x);
  const std::uint32_t sign = (u >> 24) & 0x80U;
  const std::uint32_t mag = u & 0x7fffffffU;
  // Spacing 2^-16 below the least normal 2^-14: floats at 2^7 have that spacing.
  const std::uint32_t subnormal = bits_of(float_of(mag) + 0x1p7F) - bits_of(0x1p7F);
  const std::uint32_t normal = (mag - (112U << 23) + 0xfffffU + ((mag >> 21) & 1U)) >> 21;
  std::uint32_t code = mag < (113U << 23) ? subnormal : normal;
  code = mag >= 0x47600000U ? 0x7bU : code;  // 57344
  code = mag > kF32Inf ? 0x7fU : code;
  return static_cast<std::uint8_t>(sign | code);
}

// Element `i` of a row of `dtype` (a floating-point one).
DIFFKV_HD inline float load_element(DType dtype, const void* row, std::int64_t i) {
  switch (dtype) {
    case DType::kF32:
      return static_cast<const float*>(row)[i];
    case DType::kF16:
      return f16_to_float(static_cast<const std::uint16_t*>(row)[i]);
    case DType::kBF16:
      return bf16_to_float(static_cast<const std::uint16_t*>(row)[i]);
    case DType::kE5M2:
      return e5m2_to_float(static_cast<const std::uint8_t*>(row)[i]);
    default:
      return e4m3_to_float(static_cast<const std::uint8_t*>(row)[i]);
  }
}

// Encodes n elements of src as `dtype` (a floating-point one).
DIFFKV_HD inline void store_row(DType dtype, const float* src, std::int64_t n, void* row) {
  switch (dtype) {
    case DType::kF32:
      for (std::int64_t i = 0; i < n; ++i) static_cast<float*>(row)[i] = src[i];
      return;
    case DType::kF16:
      for (std::int64_t i = 0; i < n; ++i) {
        static_cast<std::uint16_t*>(row)[i] = float_to_f16(src[i]);
      }
      return;
    case DType::kBF16:
      for (std::int64_t i = 0; i < n; ++i) {
        static_cast<std::uint16_t*>(row)[i] = float_to_bf16(src[i]);
      }
      return;
    case DType::kE5M2:
      for (std::int64_t i = 0; i < n; ++i) {
        static_cast<std::uint8_t*>(row)[i] = float_to_e5m2(src[i]);
      }
      return;
    default:
      for (std::int64_t i = 0; i < n; ++i) {
        static_cast<std::uint8_t*>(row)[i] = float_to_e4m3(src[i]);
      }
  }
}

}  // namespace diffkv::core
