// `diffkv bench` from outside.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>

#include "tests/cli/command.h"

namespace diffkv::cli {
namespace {

constexpr const char* kTiny = R"({"scenarios": [
  {"name": "small", "tags": ["x"], "num_heads": 4, "num_kv_heads": 2, "head_size_qk": 24,
   "head_size_v": 16, "batch": [{"count": 2, "query_len": 1, "seq_len": 70}]},
  {"name": "prompt", "num_heads": 4, "num_kv_heads": 2, "head_size_qk": 24,
   "head_size_v": 16, "batch": [{"query_len": 9, "seq_len": 20}]}]})";

class BenchCli : public CommandTest {
 protected:
  void SetUp() override {
    CommandTest::SetUp();
    write("tiny.json", kTiny);
  }
  Outcome bench(const std::string& arguments) const { return diffkv("bench " + arguments); }
  void expect_bench_refused(const std::string& arguments, const std::string& message) const {
    expect_refused("bench " + arguments, message);
  }
};

TEST_F(BenchCli, RunsWritesAndCompares) {
  const std::string run = "--seconds 0 --scenarios " + file("tiny.json");
  const Outcome first = bench(run + " --json " + file("a.json"));
  ASSERT_EQ(first.exit_code, kExitRight) << first.err;
  EXPECT_NE(first.out.find("small"), std::string::npos);
  EXPECT_NE(first.out.find("8 rows"), std::string::npos) << first.out;
  EXPECT_NE(first.out.find("36 rows"), std::string::npos) << first.out;
  const auto json = nlohmann::json::parse(content(file("a.json")));
  EXPECT_EQ(json["scenarios"].size(), 2U);
  for (const auto& scenario : json["scenarios"]) {
    EXPECT_TRUE(scenario["verification"]["ok"].get<bool>());
    EXPECT_GT(scenario["attend"]["median_s"].get<double>(), 0);
    EXPECT_GE(scenario["attend"]["repetitions"].get<int>(), 5);
    EXPECT_GT(scenario["read_floor_s"].get<double>(), 0);
  }

  const Outcome second = bench(run + " --scenario x --against " + file("a.json"));
  EXPECT_EQ(second.exit_code, kExitRight) << second.err;
  EXPECT_NE(second.out.find("speed-up"), std::string::npos) << second.out;
  EXPECT_EQ(second.out.find("prompt"), std::string::npos) << second.out;
}

TEST_F(BenchCli, TimesInTurn) {
  const Outcome outcome =
      bench("--seconds 0 --in-turn --scenarios " + file("tiny.json") + " --json " + file("a.json"));
  ASSERT_EQ(outcome.exit_code, kExitRight) << outcome.err;
  EXPECT_NE(outcome.out.find("/ first\n"), std::string::npos) << outcome.out;
  EXPECT_NE(outcome.out.find("  1.000\n"), std::string::npos) << outcome.out;
  const auto json = nlohmann::json::parse(content(file("a.json")));
  EXPECT_TRUE(json["in_turn"].get<bool>());
  EXPECT_EQ(json["scenarios"][0]["attend"]["to_first"].get<double>(), 1);
  EXPECT_NE(json["scenarios"][1]["attend"]["to_first"].get<double>(), 1);
  const Outcome shown = bench("--from " + file("a.json"));
  EXPECT_NE(shown.out.find("/ first\n"), std::string::npos) << shown.out;
  const Outcome both = bench("--from " + file("a.json") + " " + file("a.json"));
  EXPECT_EQ(both.out.find("/ first"), std::string::npos) << both.out;
}

std::string result_of(const std::string& median, const std::string& wrong = "") {
  return R"({"format": "diffkv-bench-1", "scenarios": [{"name": "a", "bytes": 1e9, "flops": 1e9,
    "verification": {"rows": 1, "wrong": 0, "worst_error": 0, "tolerance": 1, "what": ")" +
         wrong + R"("}, "attend": {"repetitions": 9, "least_s": )" + median + R"(, "p25_s": )" +
         median + R"(, "median_s": )" + median + R"(, "p75_s": )" + median + "}}]}";
}

TEST_F(BenchCli, ComparesFiles) {
  write("fast.json", result_of("0.5"));
  write("slow.json", result_of("1.0"));
  const Outcome faster = bench("--from " + file("fast.json") + " --against " + file("slow.json"));
  EXPECT_EQ(faster.exit_code, kExitRight) << faster.err;
  EXPECT_NE(faster.out.find("2.00  faster"), std::string::npos) << faster.out;
  const Outcome slower = bench("--from " + file("slow.json") + " --against " + file("fast.json"));
  EXPECT_EQ(slower.exit_code, kExitRight) << slower.err;
  EXPECT_NE(slower.out.find("0.50  slower"), std::string::npos) << slower.out;
  const Outcome same = bench("--from " + file("slow.json") + " --against " + file("slow.json"));
  EXPECT_NE(same.out.find("1.00  within noise"), std::string::npos) << same.out;
  const Outcome best = bench("--from " + file("slow.json") + " " + file("fast.json") +
                             " --against " + file("slow.json"));
  EXPECT_NE(best.out.find("2.00  faster"), std::string::npos) << best.out;
}

TEST_F(BenchCli, AWrongScenarioIsItsExitCode) {
  write("wrong.json", result_of("0.5", "row 3 is off"));
  const Outcome outcome = bench("--from " + file("wrong.json"));
  EXPECT_EQ(outcome.exit_code, kExitWrong);
  EXPECT_NE(outcome.out.find("row 3 is off"), std::string::npos) << outcome.out;
}

TEST_F(BenchCli, ListsScenarios) {
  const Outcome outcome = bench("--list");
  EXPECT_EQ(outcome.exit_code, kExitRight);
  EXPECT_NE(outcome.out.find("decode_1x32768 "), std::string::npos) << outcome.out;
  const Outcome some = bench("--list --scenario prefill");
  EXPECT_EQ(some.out.find("decode_1x32768 "), std::string::npos) << some.out;
}

TEST_F(BenchCli, HelpTeaches) {
  const Outcome help = bench("--help");
  EXPECT_EQ(help.exit_code, kExitRight);
  for (const char* said : {"Exit codes", "diffkv bench --scenario", "--against", "of GEMM"}) {
    EXPECT_NE(help.out.find(said), std::string::npos) << said;
  }
}

TEST_F(BenchCli, BadUseIsRefused) {
  expect_bench_refused("--scenario none-such", "--scenario is \"none-such\"");
  expect_bench_refused("--backend abacus", "abacus");
  expect_bench_refused("--seconds -1", "--seconds is -1");
  expect_bench_refused("--seconds nan", "--seconds is nan");
  expect_bench_refused("--scenarios /no/such.json", "cannot read /no/such.json");
  expect_bench_refused("--against /no/such.json", "cannot read /no/such.json");
  expect_bench_refused("--from " + file("tiny.json"), "is no result of bench");
  expect_bench_refused("--from a --scenario b", "--from");
  expect_bench_refused("--from a --in-turn", "--from");
  expect_bench_refused("--json /no/such/x.json", "/no/such/x.json");
  for (const std::string option : {"--json", "--from", "--against"}) {
    expect_bench_refused(option + " ''", "expected the name of a file, got an empty one");
  }
  write("same.json", result_of("1"));
  expect_bench_refused("--json " + file("same.json") + " --against " + file("same.json"),
                       "expected different files");
  expect_bench_refused("--backend cpu --scenario gpu_decode", "matches no name and no tag");
  write("bad.json", R"({"scenarios": [{"name": "a", "batch": 3}]})");
  expect_bench_refused("--scenarios " + file("bad.json"), "batch is 3");
  write("a.json", result_of("1"));
  write("b.json", R"({"format": "diffkv-bench-1", "scenarios": []})");
  const Outcome nothing = bench("--from " + file("a.json") + " --against " + file("b.json"));
  EXPECT_EQ(nothing.exit_code, kExitBadUse);
  EXPECT_NE(nothing.err.find("no scenario that was timed in both"), std::string::npos);
}

}  // namespace
}  // namespace diffkv::cli
