// Merging and finishing online softmax states.
#include "core/softmax.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace diffkv::core {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

TEST(Softmax, MergeIsTheSumOfBoth) {
  SoftmaxState state{2.0F, 3.0F};  // 3 e^2
  float keep = 0;
  float add = 0;
  merge(state, {5.0F, 0.5F}, keep, add);
  EXPECT_EQ(state.max, 5.0F);
  EXPECT_NEAR(state.sum, 3 * std::exp(-3.0) + 0.5, 1e-6);
  EXPECT_NEAR(keep, std::exp(-3.0), 1e-7);
  EXPECT_EQ(add, 1.0F);
}

TEST(Softmax, EmptyPartsAddNothing) {
  SoftmaxState state;
  float keep = 1;
  float add = 1;
  merge(state, {}, keep, add);
  EXPECT_EQ(state.max, kNegInf);
  EXPECT_EQ(state.sum, 0.0F);
  EXPECT_TRUE(finish(state, kNegInf).empty);
  EXPECT_EQ(finish(state, kNegInf).lse, kNegInf);
  EXPECT_EQ(finish(state, 1.5F).lse, 1.5F);
  merge(state, {1.0F, 2.0F}, keep, add);
  EXPECT_EQ(state.max, 1.0F);
  EXPECT_EQ(state.sum, 2.0F);
  EXPECT_EQ(keep, 0.0F);
}

TEST(Softmax, FinishWithASink) {
  // Without: lse = 1 + ln 2, factor 1/2. With sink 3: denominator 2e + e^3.
  const SoftmaxEnd plain = finish({1.0F, 2.0F}, kNegInf);
  EXPECT_NEAR(plain.lse, 1 + std::log(2.0), 1e-6);
  EXPECT_NEAR(plain.factor, 0.5, 1e-7);
  const SoftmaxEnd sunk = finish({1.0F, 2.0F}, 3.0F);
  const double denominator = 2 * std::exp(1.0) + std::exp(3.0);
  EXPECT_NEAR(sunk.lse, std::log(denominator), 1e-6);
  EXPECT_NEAR(sunk.factor, std::exp(1.0) / denominator, 1e-7);
}

TEST(Softmax, NanStays) {
  SoftmaxState state{kNegInf, kNaN};
  float keep = 0;
  float add = 0;
  merge(state, {1.0F, 2.0F}, keep, add);
  EXPECT_TRUE(std::isnan(state.sum));
  EXPECT_TRUE(std::isnan(finish(state, kNegInf).factor));
  EXPECT_TRUE(std::isnan(finish(state, 0.5F).lse));
}

}  // namespace
}  // namespace diffkv::core
