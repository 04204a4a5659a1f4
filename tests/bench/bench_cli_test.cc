// `diffkv bench` from outside.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>

#include "cli/commands.h"

namespace diffkv::cli {
namespace {

namespace fs = std::filesystem;

constexpr const char* kTiny = R"({"scenarios": [
  {"name": "small", "tags": ["x"], "num_heads": 4, "num_kv_heads": 2, "head_size_qk": 24,
   "head_size_v": 16, "batch": [{"count": 2, "query_len": 1, "seq_len": 70}]},
  {"name": "prompt", "num_heads": 4, "num_kv_heads": 2, "head_size_qk": 24,
   "head_size_v": 16, "batch": [{"query_len": 9, "seq_len": 20}]}]})";

struct Outcome {
  int exit_code = -1;  // -1: ended by a signal
  std::string out;
  std::string err;
};

std::string content(const fs::path& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

class BenchCli : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::path(testing::TempDir()) /
              ("diffkv_bench_" + std::to_string(getpid()) + "_" +
               testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::create_directories(folder_);
    write("tiny.json", kTiny);
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::string file(const std::string& name) const { return (folder_ / name).string(); }
  void write(const std::string& name, const std::string& text) const {
    std::ofstream(folder_ / name) << text;
  }

  Outcome bench(const std::string& arguments) const {
    const std::string command = std::string("'") + DIFFKV_COMMAND + "' bench " + arguments + " >'" +
                                file("out") + "' 2>'" + file("err") + "'";
    const int status = std::system(command.c_str());
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, content(file("out")),
            content(file("err"))};
  }

  void expect_refused(const std::string& arguments, const std::string& message) const {
    const Outcome outcome = bench(arguments);
    EXPECT_EQ(outcome.exit_code, kExitBadUse) << arguments;
    EXPECT_EQ(outcome.err.rfind("diffkv: error: ", 0), 0U) << arguments << "\n" << outcome.err;
    EXPECT_NE(outcome.err.find(message), std::string::npos)
        << arguments << "\nexpected: " << message << "\ngot: " << outcome.err;
    EXPECT_EQ(outcome.out, "") << arguments;
  }

  fs::path folder_;
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
  expect_refused("--scenario none-such", "--scenario is \"none-such\"");
  expect_refused("--backend abacus", "abacus");
  expect_refused("--seconds -1", "--seconds is -1");
  expect_refused("--seconds nan", "--seconds is nan");
  expect_refused("--scenarios /no/such.json", "cannot read /no/such.json");
  expect_refused("--against /no/such.json", "cannot read /no/such.json");
  expect_refused("--from " + file("tiny.json"), "is no result of bench");
  expect_refused("--from a --scenario b", "--from");
  expect_refused("--json /no/such/x.json", "/no/such/x.json");
  write("bad.json", R"({"scenarios": [{"name": "a", "batch": 3}]})");
  expect_refused("--scenarios " + file("bad.json"), "batch is 3");
  write("a.json", result_of("1"));
  write("b.json", R"({"format": "diffkv-bench-1", "scenarios": []})");
  const Outcome nothing = bench("--from " + file("a.json") + " --against " + file("b.json"));
  EXPECT_EQ(nothing.exit_code, kExitBadUse);
  EXPECT_NE(nothing.err.find("no scenario that was timed in both"), std::string::npos);
}

}  // namespace
}  // namespace diffkv::cli
