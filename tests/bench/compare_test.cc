#include "bench/harness/compare.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <utility>

#include "diffkv/error.h"

namespace diffkv::bench {
namespace {

ScenarioResult scenario(const std::string& name, double median) {
  ScenarioResult result;
  result.name = name;
  result.supported = true;
  result.bytes = 100;
  result.flops = 10;
  result.attend = {.repetitions = 5,
                   .median_s = median,
                   .least_s = median * 0.98,
                   .p25_s = median * 0.99,
                   .p75_s = median * 1.01};
  return result;
}

RunResult run_of(std::vector<ScenarioResult> scenarios) {
  RunResult run;
  run.machine = {.cpu = "a", .threads = 2, .last_level_bytes = 0};
  run.read_rate = 10e9;
  run.gemm_rate_before = 100e9;
  run.gemm_rate_after = 100e9;
  run.scenarios = std::move(scenarios);
  return run;
}

TEST(Compare, SaysWhichIsFaster) {
  const ComparisonResult result =
      compare(run_of({scenario("a", 1), scenario("b", 2), scenario("c", 1)}),
              run_of({scenario("c", 1.005), scenario("b", 1), scenario("a", 2)}));
  ASSERT_EQ(result.scenarios.size(), 3U);
  EXPECT_EQ(result.scenarios[0].name, "a");
  EXPECT_EQ(result.scenarios[0].verdict, Verdict::kFaster);
  EXPECT_DOUBLE_EQ(result.scenarios[0].speed_up(), 2);
  EXPECT_EQ(result.scenarios[1].verdict, Verdict::kSlower);
  EXPECT_DOUBLE_EQ(result.scenarios[1].speed_up(), 0.5);
  EXPECT_EQ(result.scenarios[2].verdict, Verdict::kWithinNoise);
  EXPECT_TRUE(result.notes.empty()) << result.notes.front();
}

TEST(Compare, OnlyTheSameProblemsAreCompared) {
  ScenarioResult other = scenario("b", 1);
  other.bytes = 200;
  ScenarioResult untimed = scenario("d", 1);
  untimed.attend = {};
  const ComparisonResult result = compare(
      run_of({scenario("a", 1), scenario("b", 1), scenario("c", 1), scenario("d", 1), untimed}),
      run_of({scenario("a", 1), other, untimed}));
  ASSERT_EQ(result.scenarios.size(), 1U);
  ASSERT_EQ(result.notes.size(), 2U);
  EXPECT_NE(result.notes[0].find("b is another problem"), std::string::npos);
  EXPECT_EQ(result.notes[1], "not timed before: c, d");
}

// Each changes neither bytes nor flops.
TEST(Compare, FeaturesAreTheProblemToo) {
  const ScenarioResult plain = scenario("a", 1);
  ScenarioResult capped = plain;
  capped.soft_cap = 30;
  ScenarioResult alibi = plain;
  alibi.alibi = true;
  ScenarioResult hnd = plain;
  hnd.layout = "HND";
  for (const auto& [other, said] :
       {std::pair{capped, "10 flops, soft cap 30, NHD"}, std::pair{alibi, "10 flops, ALiBi, NHD"},
        std::pair{hnd, "10 flops, HND"}}) {
    const ComparisonResult result =
        compare(run_of({plain, scenario("b", 1)}), run_of({other, scenario("b", 1)}));
    ASSERT_EQ(result.scenarios.size(), 1U) << said;
    ASSERT_EQ(result.notes.size(), 1U) << said;
    EXPECT_EQ(result.notes[0], fmt::format("a is another problem: 100 bytes and 10 flops, NHD now; "
                                           "100 bytes and {} before",
                                           said));
    EXPECT_THROW(best_of({run_of({plain}), run_of({other})}), Error) << said;
  }
}

TEST(Compare, NothingInCommonIsRefused) {
  EXPECT_THROW(compare(run_of({scenario("a", 1)}), run_of({scenario("b", 1)})), Error);
}

TEST(Compare, AnotherMachineIsNoted) {
  RunResult before = run_of({scenario("a", 1)});
  before.machine.threads = 4;
  before.read_rate = 12e9;
  before.gemm_rate_before = before.gemm_rate_after = 80e9;
  const ComparisonResult result = compare(run_of({scenario("a", 1)}), before);
  ASSERT_EQ(result.notes.size(), 3U);
  EXPECT_NE(result.notes[0].find("another machine"), std::string::npos);
  EXPECT_NE(result.notes[1].find("read rate"), std::string::npos);
  EXPECT_NE(result.notes[2].find("GEMM rate"), std::string::npos);
}

TEST(Compare, RatesThatAreNotKnownAreNotNoted) {
  RunResult before = run_of({scenario("a", 1)});
  before.machine = {};
  before.read_rate = before.gemm_rate_before = before.gemm_rate_after = 0;
  EXPECT_TRUE(compare(run_of({scenario("a", 1)}), before).notes.empty());
}

TEST(BestOf, TakesTheLeastMedians) {
  RunResult second = run_of({scenario("b", 3), scenario("a", 1), scenario("c", 4)});
  second.read_rate = 11e9;
  second.gemm_rate_after = 130e9;
  const RunResult best = best_of({run_of({scenario("a", 2), scenario("b", 2)}), second});
  ASSERT_EQ(best.scenarios.size(), 3U);
  EXPECT_EQ(best.scenarios[0].attend.median_s, 1);
  EXPECT_EQ(best.scenarios[1].attend.median_s, 2);
  EXPECT_EQ(best.scenarios[2].attend.median_s, 4);
  EXPECT_EQ(best.read_rate, 11e9);
  EXPECT_EQ(best.gemm_rate(), 130e9);
}

TEST(BestOf, NeverHidesAMistake) {
  ScenarioResult wrong = scenario("a", 1);
  wrong.verification.what = "row 3";
  wrong.attend = {};
  EXPECT_FALSE(best_of({run_of({wrong}), run_of({scenario("a", 1)})}).all_right());
  EXPECT_FALSE(best_of({run_of({scenario("a", 1)}), run_of({wrong})}).all_right());
}

TEST(BestOf, OtherProblemsAreRefused) {
  ScenarioResult other = scenario("a", 1);
  other.flops = 11;
  EXPECT_THROW(best_of({run_of({scenario("a", 1)}), run_of({other})}), Error);
  EXPECT_THROW(best_of({}), Error);
}

}  // namespace
}  // namespace diffkv::bench
