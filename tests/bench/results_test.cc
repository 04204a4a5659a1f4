#include "bench/harness/results.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "diffkv/error.h"

namespace diffkv::bench {
namespace {

RunResult example() {
  RunResult run;
  run.backend = "cpu";
  run.description = "CPU, some";
  run.machine = {.cpu = "a cpu", .threads = 3, .last_level_bytes = 1 << 20};
  run.date = "2026-11-23T05:00:00Z";
  run.seconds = 0.5;
  run.flush_bytes = 1 << 28;
  run.read_rate = 10e9;
  run.gemm_rate_before = 100e9;
  run.gemm_rate_after = 120e9;
  ScenarioResult result;
  result.name = "decode";
  result.batch = "1x1/8";
  result.layer = "64/4 heads";
  result.supported = true;
  result.kernel = "decode/AVX3";
  result.verification.rows = 7;
  result.verification.worst_error = 1e-3;
  result.verification.tolerance = 6e-3;
  result.bytes = 5e9;
  result.flops = 240e9;
  result.soft_cap = 30;
  result.alibi = true;
  result.layout = "HND";
  result.attend = {.repetitions = 9, .median_s = 1, .least_s = 0.5, .p25_s = 0.75, .p75_s = 1.25};
  result.plan = {.repetitions = 9, .median_s = 2, .least_s = 2, .p25_s = 2, .p75_s = 2};
  result.update = {.repetitions = 9, .median_s = 3, .least_s = 3, .p25_s = 3, .p75_s = 3};
  result.read_rate = 9e9;
  run.scenarios = {result};
  return run;
}

void expect_refused(const std::string& text, const std::string& message) {
  try {
    parse_results(text, "file.json");
    ADD_FAILURE() << "taken: " << text;
  } catch (const Error& error) {
    const std::string what = error.what();
    EXPECT_NE(what.find(message), std::string::npos) << what;
    EXPECT_NE(what.find("file.json"), std::string::npos) << what;
  }
}

TEST(Results, JsonGoesThereAndBack) {
  const std::string text = to_json(example());
  EXPECT_EQ(to_json(parse_results(text, "x")), text);
  const RunResult run = parse_results(text, "x");
  EXPECT_EQ(run.machine.threads, 3);
  EXPECT_EQ(run.gemm_rate(), 120e9);
  EXPECT_EQ(run.scenarios.at(0).soft_cap, 30);
  EXPECT_TRUE(run.scenarios.at(0).alibi);
  EXPECT_EQ(run.scenarios.at(0).layout, "HND");
  EXPECT_EQ(run.scenarios.at(0).attend.p25_s, 0.75);
  EXPECT_EQ(run.scenarios.at(0).update.median_s, 3);
  EXPECT_EQ(run.scenarios.at(0).verification.rows, 7);
}

TEST(Results, JsonHasTheFloors) {
  const auto json = nlohmann::json::parse(to_json(example()));
  EXPECT_DOUBLE_EQ(json["scenarios"][0]["read_floor_s"].get<double>(), 0.5);
  EXPECT_DOUBLE_EQ(json["scenarios"][0]["gemm_floor_s"].get<double>(), 2.0);
  EXPECT_TRUE(json["scenarios"][0]["verification"]["ok"].get<bool>());
}

TEST(Results, ADevicesFloorsAreItsOwn) {
  RunResult run = example();
  run.device = true;
  run.scenarios[0].floor_s = 0.7;
  const RunResult again = parse_results(to_json(run), "x");
  EXPECT_TRUE(again.device);
  EXPECT_EQ(again.read_floor_s(again.scenarios.at(0)), 0.7);
  EXPECT_EQ(to_json(again), to_json(run));
}

TEST(Results, AWrongScenarioHasNoTimes) {
  RunResult run = example();
  run.scenarios[0].verification.wrong = 1;
  run.scenarios[0].verification.what = "row 3";
  run.scenarios[0].attend = {};
  const auto json = nlohmann::json::parse(to_json(run));
  EXPECT_FALSE(json["scenarios"][0].contains("attend"));
  EXPECT_FALSE(json["scenarios"][0]["verification"]["ok"].get<bool>());
  EXPECT_FALSE(parse_results(to_json(run), "x").all_right());
}

TEST(Results, LittleIsEnough) {
  const RunResult run = parse_results(
      R"({"format": "diffkv-bench-1", "scenarios": [{"name": "a", "bytes": 1, "flops": 2,
          "attend": {"repetitions": 1, "median_s": 1, "least_s": 1, "p25_s": 1, "p75_s": 1}}]})",
      "x");
  EXPECT_EQ(run.scenarios.at(0).attend.median_s, 1);
  EXPECT_TRUE(run.scenarios.at(0).supported);
  EXPECT_EQ(run.scenarios.at(0).soft_cap, 0);
  EXPECT_FALSE(run.scenarios.at(0).alibi);
  EXPECT_EQ(run.scenarios.at(0).layout, "NHD");
  EXPECT_TRUE(run.all_right());
}

TEST(Results, OtherFilesAreRefused) {
  expect_refused("", "file.json is no result of bench");
  expect_refused("[]", "its format is \"\"");
  expect_refused("{}", "expected \"diffkv-bench-1\"");
  expect_refused(R"({"format": "diffkv-bench-9"})", "diffkv-bench-9");
  expect_refused(R"({"format": 3})", "no result");
  expect_refused(R"({"format": "diffkv-bench-1"})", "scenarios");
  expect_refused(R"({"format": "diffkv-bench-1", "scenarios": [{"bytes": 1}]})", "name");
  expect_refused(
      R"({"format": "diffkv-bench-1", "scenarios": [{"name": "a", "bytes": "1", "flops": 1}]})",
      "no result");
  expect_refused(R"({"format": "diffkv-bench-1", "scenarios": [{"name": "a", "bytes": 1,
                     "flops": 1, "attend": {"median_s": 1}}]})",
                 "repetitions");
}

}  // namespace
}  // namespace diffkv::bench
