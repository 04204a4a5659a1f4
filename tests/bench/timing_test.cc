#include "bench/harness/timing.h"

#include <gtest/gtest.h>

namespace diffkv::bench {
namespace {

Timing timing(double p25, double median, double p75) {
  return {.repetitions = 9, .median_s = median, .least_s = p25, .p25_s = p25, .p75_s = p75};
}

TEST(Timing, SummarizesByRank) {
  const Timing t = summarize({5, 1, 4, 2, 3, 9, 8, 7});
  EXPECT_EQ(t.repetitions, 8);
  EXPECT_EQ(t.least_s, 1);
  EXPECT_EQ(t.p25_s, 2);
  EXPECT_EQ(t.median_s, 4);
  EXPECT_EQ(t.p75_s, 7);
  EXPECT_DOUBLE_EQ(t.spread(), 5.0 / 4.0);
}

TEST(Timing, OfNothingIsZero) {
  const Timing t = summarize({});
  EXPECT_EQ(t.repetitions, 0);
  EXPECT_EQ(t.median_s, 0);
  EXPECT_EQ(t.spread(), 0);
}

TEST(Timing, OneValueHasNoSpread) {
  const Timing t = summarize({0.5});
  EXPECT_EQ(t.median_s, 0.5);
  EXPECT_EQ(t.spread(), 0);
}

TEST(Judge, ApartAndDifferentIsFasterOrSlower) {
  EXPECT_EQ(judge(timing(0.8, 0.85, 0.9), timing(0.95, 1.0, 1.05)), Verdict::kFaster);
  EXPECT_EQ(judge(timing(0.95, 1.0, 1.05), timing(0.8, 0.85, 0.9)), Verdict::kSlower);
}

TEST(Judge, OverlappingHalvesAreNoise) {
  EXPECT_EQ(judge(timing(0.5, 0.7, 0.96), timing(0.95, 1.0, 1.05)), Verdict::kWithinNoise);
  EXPECT_EQ(judge(timing(1.04, 1.5, 2.0), timing(0.95, 1.0, 1.05)), Verdict::kWithinNoise);
}

// Times that hardly vary are not faster for a difference that another build of the same code has.
TEST(Judge, SmallDifferencesAreNoise) {
  EXPECT_EQ(judge(timing(0.989, 0.990, 0.991), timing(0.999, 1.0, 1.001)), Verdict::kWithinNoise);
  EXPECT_EQ(judge(timing(1.009, 1.010, 1.011), timing(0.999, 1.0, 1.001)), Verdict::kWithinNoise);
  EXPECT_EQ(judge(timing(0.969, 0.970, 0.971), timing(0.999, 1.0, 1.001)), Verdict::kFaster);
  EXPECT_EQ(judge(timing(1.029, 1.030, 1.031), timing(0.999, 1.0, 1.001)), Verdict::kSlower);
}

TEST(Judge, TheSameIsNoise) {
  EXPECT_EQ(judge(timing(1, 1, 1), timing(1, 1, 1)), Verdict::kWithinNoise);
}

TEST(Timing, OfRoundsIsComparedRoundByRound) {
  // A machine that slows down: no round agrees with another, each has the second call at 1.5.
  const std::vector<Timing> timings = summarize_rounds({{1, 2, 4}, {1.5, 3, 6}, {1, 4, 3}});
  ASSERT_EQ(timings.size(), 3U);
  EXPECT_EQ(timings[0].median_s, 2);
  EXPECT_EQ(timings[0].to_first, 1);
  EXPECT_EQ(timings[1].median_s, 3);
  EXPECT_EQ(timings[1].to_first, 1.5);
  EXPECT_EQ(timings[2].median_s, 3);
  EXPECT_EQ(timings[2].to_first, 1);
  EXPECT_TRUE(summarize_rounds({}).empty());
}

}  // namespace
}  // namespace diffkv::bench
