// Scalar codecs against their definitions.
#include "core/dtype.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>

namespace diffkv::core {
namespace {

// Value of a small float by definition: sign, exponent and mantissa fields.
double by_definition(std::uint32_t code, int exponent_bits, int mantissa_bits, bool ieee) {
  const std::uint32_t mantissa = code & ((1U << mantissa_bits) - 1);
  const int exponent = static_cast<int>(code >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const bool negative = (code >> (mantissa_bits + exponent_bits)) != 0;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const bool top = exponent == (1 << exponent_bits) - 1;
  double value = 0;
  if (ieee && top) {
    value = mantissa == 0 ? std::numeric_limits<double>::infinity()
                          : std::numeric_limits<double>::quiet_NaN();
  } else if (!ieee && top && mantissa == (1U << mantissa_bits) - 1) {
    value = std::numeric_limits<double>::quiet_NaN();
  } else if (exponent == 0) {
    value = std::ldexp(mantissa, 1 - bias - mantissa_bits);
  } else {
    value = std::ldexp((1U << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
  }
  return negative ? -value : value;
}

struct Format {
  const char* name;
  DType dtype;
  int exponent_bits;
  int mantissa_bits;
  bool ieee;
  double largest;
  bool saturates;

  std::uint32_t codes() const { return 1U << (1 + exponent_bits + mantissa_bits); }
  double value(std::uint32_t code) const {
    return by_definition(code, exponent_bits, mantissa_bits, ieee);
  }
  float decode(std::uint32_t code) const {
    // Little-endian: the code is the first element of any narrower type.
    return load_element(dtype, &code, 0);
  }
  std::uint32_t encode(float x) const {
    std::uint32_t code = 0;
    store_row(dtype, &x, 1, &code);
    return code;
  }
};

class CodecTest : public testing::TestWithParam<Format> {};

TEST_P(CodecTest, DecodesEveryCode) {
  const Format& format = GetParam();
  for (std::uint32_t code = 0; code < format.codes(); ++code) {
    const double expected = format.value(code);
    const float got = format.decode(code);
    if (std::isnan(expected)) {
      EXPECT_TRUE(std::isnan(got)) << "code " << code;
    } else {
      EXPECT_EQ(static_cast<double>(got), expected) << "code " << code;
      EXPECT_EQ(std::signbit(got), std::signbit(expected)) << "code " << code;
    }
  }
}

TEST_P(CodecTest, EncodesEveryValueToItself) {
  const Format& format = GetParam();
  for (std::uint32_t code = 0; code < format.codes(); ++code) {
    const float value = format.decode(code);
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(format.decode(format.encode(value))));
    } else if (!std::isinf(value) || !format.saturates) {
      EXPECT_EQ(format.encode(value), code);
    }
  }
}

// Between two neighbours: the nearer, in the middle the even one.
TEST_P(CodecTest, RoundsToNearestEven) {
  const Format& format = GetParam();
  for (std::uint32_t code = 0; code + 1 < format.codes() / 2; ++code) {
    const double low = format.value(code);
    const double high = format.value(code + 1);
    if (!std::isfinite(low) || !std::isfinite(high)) continue;
    const float middle = static_cast<float>((low + high) / 2);
    const std::uint32_t even = code % 2 == 0 ? code : code + 1;
    EXPECT_EQ(format.encode(middle), even);
    EXPECT_EQ(format.encode(std::nextafter(middle, 0.0F)), code);
    EXPECT_EQ(format.encode(std::nextafter(middle, std::numeric_limits<float>::infinity())),
              code + 1);
    EXPECT_EQ(format.encode(-middle), even + format.codes() / 2);
  }
}

TEST_P(CodecTest, BeyondTheLargest) {
  const Format& format = GetParam();
  for (float x : {std::numeric_limits<float>::infinity(), 3e38F}) {
    if (format.saturates) {
      EXPECT_EQ(format.decode(format.encode(x)), static_cast<float>(format.largest));
      EXPECT_EQ(format.decode(format.encode(-x)), -static_cast<float>(format.largest));
    } else if (format.dtype == DType::kF16 || std::isinf(x)) {
      EXPECT_EQ(format.decode(format.encode(x)), std::numeric_limits<float>::infinity());
    }
  }
  EXPECT_TRUE(std::isnan(format.decode(format.encode(std::nanf("")))));
}

INSTANTIATE_TEST_SUITE_P(Formats, CodecTest,
                         testing::Values(Format{"fp16", DType::kF16, 5, 10, true, 65504, false},
                                         Format{"bf16", DType::kBF16, 8, 7, true,
                                                3.3895313892515355e38, false},
                                         Format{"e4m3", DType::kE4M3, 4, 3, false, 448, true},
                                         Format{"e5m2", DType::kE5M2, 5, 2, true, 57344, true}),
                         [](const auto& format) { return std::string(format.param.name); });

}  // namespace
}  // namespace diffkv::core
