// The arithmetic of shares by itself.
#include "plan/shares.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <random>

#include "diffkv/plan.h"

namespace diffkv::plan {
namespace {

TEST(Shares, FloorSumsAreSums) {
  std::mt19937 rng(7);
  const auto uniform = [&](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(rng);
  };
  for (int i = 0; i < 2000; ++i) {
    const int count = uniform(0, 60);
    const int divisor = uniform(1, 1 << uniform(0, 20));
    const int step = uniform(1, 1 << uniform(0, 20));
    const int first = uniform(-(1 << 22), 1 << 22);
    std::int64_t sum = 0;
    for (int k = 0; k < count; ++k) {
      sum += std::max(std::int64_t{0}, first + std::int64_t{step} * k) / divisor;
    }
    EXPECT_EQ(floor_sum(count, divisor, step, first), sum)
        << count << " " << divisor << " " << step << " " << first;
  }
}

// Little work is cut into as many shares as there are threads, much into all.
TEST(Shares, ThereAreNoMoreSharesThanTheWorkIsWorth) {
  ScheduleLimits limits;
  limits.threads = 3;
  TileClass cls;
  cls.workers = 12;
  EXPECT_EQ(shares_of(limits, cls, 1), 12);  // no such limit
  cls.least_share_cost = 100;
  EXPECT_EQ(shares_of(limits, cls, 1), 3);
  EXPECT_EQ(shares_of(limits, cls, 599), 5);
  EXPECT_EQ(shares_of(limits, cls, 5000), 12);
  cls.head_lanes = 4;  // of which each thread has at most one
  EXPECT_EQ(shares_of(limits, cls, 1), 1);
  EXPECT_EQ(shares_of(limits, cls, 5000), 3);
}

}  // namespace
}  // namespace diffkv::plan
