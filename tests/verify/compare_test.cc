#include "verify/compare.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "verify/codec.h"

namespace diffkv::verify {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// One row of one head: `got` rounded to the dtype, compared with `expected`.
RowCheck compare(const std::vector<double>& got, const std::vector<double>& expected, DType dtype,
                 double tolerance = 1e-3) {
  std::vector<std::uint32_t> memory(got.size());
  for (std::size_t d = 0; d < got.size(); ++d) {
    store_bits(memory.data(), dtype, static_cast<std::int64_t>(d),
               encode(dtype, got[d], is_fp8(dtype) ? Overflow::kSaturate : Overflow::kInfinity));
  }
  AttendArgs args;
  args.output = TensorView(memory.data(), dtype, {1, 1, static_cast<std::int64_t>(got.size())});
  return check_row({expected, 0}, args, 0, 0, {tolerance, 1e-4});
}

RowCheck compare_lse(float got, double expected) {
  float output = 0;
  AttendArgs args;
  args.output = view_of(&output, {1, 1, 1});
  args.lse = view_of(&got, {1, 1});
  return check_row({{0}, expected}, args, 0, 0, {1e-5, 1e-4});
}

TEST(Compare, RelativeToTheRowsNorm) {
  EXPECT_NEAR(compare({3, 4.05}, {3, 4}, DType::kF32).error, 0.01, 1e-6);
  EXPECT_TRUE(compare({3, 4.004}, {3, 4}, DType::kF32).ok);
  EXPECT_FALSE(compare({3, 4.006}, {3, 4}, DType::kF32).ok);
  // The same at any size: an absolute tolerance would pass the second.
  EXPECT_TRUE(compare({3e-6, 4.004e-6}, {3e-6, 4e-6}, DType::kF32).ok);
  EXPECT_FALSE(compare({3e-6, 4.006e-6}, {3e-6, 4e-6}, DType::kF32).ok);
}

TEST(Compare, ZerosNeverPass) {
  EXPECT_FALSE(compare({0, 0}, {1e-3, 1e-3}, DType::kBF16).ok);
  EXPECT_FALSE(compare({0, 0}, {1e-30, 0}, DType::kF32).ok);
  EXPECT_EQ(compare({0, 0}, {3, 4}, DType::kF32).error, 1);
}

TEST(Compare, ZeroRowsMustBeZero) {
  EXPECT_TRUE(compare({0, -0.0}, {0, 0}, DType::kF16).ok);
  EXPECT_FALSE(compare({0, 6e-8}, {0, 0}, DType::kF16).ok);
  EXPECT_FALSE(compare({std::nan(""), 0}, {0, 0}, DType::kF16).ok);
}

TEST(Compare, NanAndInfinityInTheSamePlaces) {
  const double nan = std::nan("");
  EXPECT_TRUE(compare({nan, 1}, {nan, 1}, DType::kF32).ok);
  EXPECT_FALSE(compare({1, 1}, {nan, 1}, DType::kF32).ok);
  EXPECT_FALSE(compare({nan, 1}, {1, 1}, DType::kF32).ok);
  EXPECT_FALSE(compare({1, nan}, {nan, 1}, DType::kF32).ok);
  EXPECT_TRUE(compare({kInf, 1}, {kInf, 1}, DType::kF32).ok);
  EXPECT_FALSE(compare({-kInf, 1}, {kInf, 1}, DType::kF32).ok);
  EXPECT_FALSE(compare({kInf, 1}, {nan, 1}, DType::kF32).ok);
  EXPECT_FALSE(compare({1, 2}, {nan, 1}, DType::kF32).ok);  // the rest is still compared
}

TEST(Compare, Fp16Overflow) {
  EXPECT_TRUE(compare({1e6, 1}, {1e6, 1}, DType::kF16).ok);  // rounds to infinity
  EXPECT_TRUE(compare({kInf, 1}, {65500, 1}, DType::kF16).ok);
  EXPECT_FALSE(compare({kInf, 1}, {60000, 1}, DType::kF16).ok);
  EXPECT_FALSE(compare({-1e6, 1}, {1e6, 1}, DType::kF16).ok);
}

TEST(Compare, TinyFp16ValuesHaveNoRelativePrecision) {
  EXPECT_TRUE(compare({1.01e-6, 0}, {1e-6, 0}, DType::kF16).ok);
  EXPECT_FALSE(compare({1e-6, 0}, {1e-4, 0}, DType::kF16).ok);
}

TEST(Compare, E4m3AllowsItsOwnRoundingAndNoMore) {
  const std::vector<double> exact{1.0624, 0.27, -3.3, 100, 0.004, 1.9999};
  EXPECT_TRUE(compare(exact, exact, DType::kE4M3, 1e-5).ok);
  std::vector<double> off = exact;
  off[3] = 112;  // two values further
  EXPECT_FALSE(compare(off, exact, DType::kE4M3, 1e-2).ok);
  EXPECT_TRUE(compare({448, 1}, {1e5, 1}, DType::kE4M3, 1e-5).ok);
  EXPECT_TRUE(compare({-448, 1}, {-kInf, 1}, DType::kE4M3, 1e-5).ok);
  EXPECT_FALSE(compare({416, 1}, {1e5, 1}, DType::kE4M3, 1e-2).ok);
  EXPECT_FALSE(compare({448, 1}, {std::nan(""), 1}, DType::kE4M3, 1e-2).ok);
}

TEST(Compare, Lse) {
  EXPECT_TRUE(compare_lse(1.00005F, 1).ok);
  EXPECT_FALSE(compare_lse(1.0002F, 1).ok);
  EXPECT_TRUE(compare_lse(100.005F, 100).ok);
  EXPECT_TRUE(compare_lse(-INFINITY, -kInf).ok);
  EXPECT_FALSE(compare_lse(0, -kInf).ok);
  EXPECT_FALSE(compare_lse(-INFINITY, 0).ok);
  EXPECT_FALSE(compare_lse(NAN, 0).ok);
  EXPECT_TRUE(compare_lse(NAN, NAN).ok);
  EXPECT_NE(compare_lse(1, 2).what.find("lse"), std::string::npos);
}

TEST(Compare, TolerancesByType) {
  const auto of = [](DType query, DType output) {
    PlanKey key;
    key.query_dtype = query;
    return tolerance(key, output);
  };
  EXPECT_EQ(of(DType::kF32, DType::kF32).output, 1e-5);
  EXPECT_EQ(of(DType::kF32, DType::kF32).lse, 1e-4);
  EXPECT_EQ(of(DType::kF16, DType::kF16).output, 1e-3);
  EXPECT_EQ(of(DType::kBF16, DType::kBF16).output, 6e-3);
  EXPECT_EQ(of(DType::kBF16, DType::kF32).lse, 1e-3);
  EXPECT_EQ(of(DType::kE4M3, DType::kBF16).output, 5e-2);
  EXPECT_EQ(of(DType::kF32, DType::kF16).output, 1e-3);
  EXPECT_EQ(of(DType::kF16, DType::kE4M3).output, 1e-3);
}

}  // namespace
}  // namespace diffkv::verify
