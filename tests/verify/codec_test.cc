#include "verify/codec.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "diffkv/error.h"

namespace diffkv::verify {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// Sign, exponent and mantissa of e4m3 spelled out: 1, 4 (bias 7) and 3 bits.
double e4m3_by_hand(int byte) {
  const int exponent = byte / 8 % 16;
  const int mantissa = byte % 8;
  const double sign = byte >= 128 ? -1 : 1;
  if (exponent == 15 && mantissa == 7) return std::nan("");
  if (exponent == 0) return sign * mantissa / 512.0;
  return sign * (1 + mantissa / 8.0) * std::pow(2.0, exponent - 7);
}

// e5m2: 1, 5 (bias 15) and 2 bits; the highest exponent as in IEEE types.
double e5m2_by_hand(int byte) {
  const int exponent = byte / 4 % 32;
  const int mantissa = byte % 4;
  const double sign = byte >= 128 ? -1 : 1;
  if (exponent == 31) return mantissa == 0 ? sign * kInf : std::nan("");
  if (exponent == 0) return sign * mantissa / 65536.0;
  return sign * (1 + mantissa / 4.0) * std::pow(2.0, exponent - 15);
}

TEST(Codec, AllBytesOfBothFp8Types) {
  for (int byte = 0; byte < 256; ++byte) {
    const auto bits = static_cast<std::uint32_t>(byte);
    for (const auto& [dtype, expected] :
         {std::pair{DType::kE4M3, e4m3_by_hand(byte)}, {DType::kE5M2, e5m2_by_hand(byte)}}) {
      const double got = decode(dtype, bits);
      if (std::isnan(expected)) {
        EXPECT_TRUE(std::isnan(got)) << byte;
        EXPECT_TRUE(std::isnan(decode(dtype, encode(dtype, got, Overflow::kSaturate)))) << byte;
        continue;
      }
      EXPECT_EQ(got, expected) << byte;
      EXPECT_EQ(encode(dtype, got, Overflow::kInfinity), bits) << byte;
      EXPECT_EQ(load(&byte, dtype, 0), expected) << byte;
    }
  }
}

TEST(Codec, SixteenBitTypesRoundTrip) {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    // bf16 is the upper half of binary32.
    const auto bf16 = static_cast<double>(std::bit_cast<float>(bits << 16U));
    if (!std::isnan(bf16)) {
      ASSERT_EQ(decode(DType::kBF16, bits), bf16) << bits;
      ASSERT_EQ(encode(DType::kBF16, bf16, Overflow::kInfinity), bits);
    }
    const double fp16 = decode(DType::kF16, bits);
    if (!std::isnan(fp16)) {
      ASSERT_EQ(encode(DType::kF16, fp16, Overflow::kInfinity), bits);
    }
  }
  EXPECT_EQ(decode(DType::kF16, 0x3c00), 1.0);
  EXPECT_EQ(decode(DType::kF16, 0xc500), -5.0);
  EXPECT_EQ(decode(DType::kF16, 0x7bff), 65504.0);
  EXPECT_EQ(decode(DType::kF16, 0x0001), std::ldexp(1.0, -24));
  EXPECT_EQ(decode(DType::kF16, 0xfc00), -kInf);
  EXPECT_TRUE(std::isnan(decode(DType::kF16, 0x7c01)));
}

TEST(Codec, Fp32AgreesWithTheCompiler) {
  for (const double x : {0.0, -0.0, 1.0 / 3, -1e-40, 1e-46, 3.4028236e38, 1e39, 1 + 1e-7, -7.25}) {
    const auto bits = encode(DType::kF32, x, Overflow::kInfinity);
    EXPECT_EQ(bits, std::bit_cast<std::uint32_t>(static_cast<float>(x))) << x;
    EXPECT_EQ(decode(DType::kF32, bits), static_cast<double>(static_cast<float>(x))) << x;
  }
}

TEST(Codec, TiesGoToTheEvenNeighbour) {
  const auto round = [](double x) {
    return decode(DType::kE4M3, encode(DType::kE4M3, x, Overflow::kSaturate));
  };
  EXPECT_EQ(round(17), 16);  // between 16 and 18
  EXPECT_EQ(round(19), 20);  // between 18 and 20
  EXPECT_EQ(round(17.001), 18);
  EXPECT_EQ(round(15.75), 16);               // into the next binade
  EXPECT_EQ(round(1.0 / 1024), 0);           // half the smallest
  EXPECT_EQ(round(3.0 / 1024), 4.0 / 1024);  // between the two smallest
  EXPECT_EQ(round(-1.5 / 1024), -2.0 / 1024);
  EXPECT_EQ(encode(DType::kBF16, 1 + 1.0 / 256, Overflow::kInfinity), 0x3f80U);
  EXPECT_EQ(encode(DType::kBF16, 1 + 3.0 / 256, Overflow::kInfinity), 0x3f82U);
}

TEST(Codec, OverflowSaturatesOrIsInfinite) {
  EXPECT_EQ(encode(DType::kE4M3, 464, Overflow::kSaturate), 0x7eU);
  EXPECT_EQ(encode(DType::kE4M3, -1e30, Overflow::kSaturate), 0xfeU);
  EXPECT_EQ(encode(DType::kE4M3, kInf, Overflow::kSaturate), 0x7eU);
  EXPECT_EQ(encode(DType::kE4M3, 480, Overflow::kInfinity), 0x7fU);  // no infinity: NaN
  EXPECT_EQ(encode(DType::kE4M3, 464, Overflow::kInfinity), 0x7eU);  // a tie, 448 is even
  EXPECT_EQ(encode(DType::kE5M2, -kInf, Overflow::kSaturate), 0xfbU);
  EXPECT_EQ(encode(DType::kE5M2, 61440, Overflow::kInfinity), 0x7cU);
  EXPECT_EQ(encode(DType::kF16, 65519, Overflow::kInfinity), 0x7bffU);
  EXPECT_EQ(encode(DType::kF16, 65520, Overflow::kInfinity), 0x7c00U);
  EXPECT_EQ(max_finite(DType::kE4M3), 448);
  EXPECT_EQ(max_finite(DType::kE5M2), 57344);
  EXPECT_EQ(max_finite(DType::kF16), 65504);
  EXPECT_EQ(max_finite(DType::kF32), static_cast<double>(std::numeric_limits<float>::max()));
  EXPECT_EQ(min_normal(DType::kE4M3), 1.0 / 64);
}

TEST(Codec, RowsAndIndices) {
  const std::vector<float> values{1, 2, 3, 4};
  std::vector<double> got(2);
  load_row(values.data(), DType::kF32, 1, 2, got.data());
  EXPECT_EQ(got, (std::vector<double>{2, 3}));
  const std::vector<std::int32_t> table{1, 2, 3, 4, 5, 6};
  ConstTensorView view = view_of(table.data(), {2, 2});
  view.strides[0] = 3;
  EXPECT_EQ(index_at(view, 1, 1), 5);
  EXPECT_THROW(load(values.data(), DType::kI32, 0), Error);
  EXPECT_THROW(index_at(view_of(values.data(), {4}), 0), Error);
}

}  // namespace
}  // namespace diffkv::verify
