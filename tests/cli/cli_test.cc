// The command as its users meet it.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "tests/cli/command.h"

namespace diffkv::cli {
namespace {

namespace fs = std::filesystem;

using CliTest = CommandTest;

TEST_F(CliTest, VersionAndHelpAreRight) {
  const Outcome version = diffkv("--version");
  EXPECT_EQ(version.exit_code, kExitRight);
  EXPECT_EQ(version.out, "diffkv 0.1.0\n");
  for (const std::string command : {"", "info", "check", "plan", "replay", "bench"}) {
    const Outcome help = diffkv(command + " --help");
    EXPECT_EQ(help.exit_code, kExitRight) << command;
    EXPECT_EQ(help.err, "") << command;
    EXPECT_NE(help.out.find("Exit codes"), std::string::npos) << command;
  }
}

// Each command is shown at work: replay in the help of the whole.
TEST_F(CliTest, HelpShowsExamples) {
  for (const std::string command : {"info", "check", "plan", "replay", "bench"}) {
    EXPECT_NE(diffkv("--help").out.find("  diffkv " + command), std::string::npos) << command;
  }
}

// The help in full, so that a change of it is seen. `diffkv X --help` makes the new one.
TEST_F(CliTest, HelpIsGolden) {
  for (const std::string command : {"info", "check", "plan", "replay", "bench"}) {
    EXPECT_EQ(diffkv(command + " --help").out,
              content(fs::path(DIFFKV_GOLDEN_DIR) / (command + "_help.txt")))
        << command;
  }
}

TEST_F(CliTest, BadUseOfTheCommandIsRefused) {
  expect_refused("", "A subcommand is required");
  expect_refused("fly", "no command or option \"fly\"");
  expect_refused("--fly", "no command or option \"--fly\"");
  expect_refused("info extra", "extra");
}

TEST_F(CliTest, BadUseOfInfoIsRefused) {
  expect_refused("info --json", "--json");
  expect_refused("info --json /no/such/folder/x.json",
                 "cannot write /no/such/folder/x.json: No such file or directory");
  expect_refused("info --json /dev/null", "not a regular file");
  expect_refused("info --json ''", "--json");
  expect_refused("info", "no such", "DIFFKV_CPU_TARGET='no such'");
  expect_refused("info", "no backend \"abacus\"", "DIFFKV_BACKEND=abacus");
}

TEST_F(CliTest, BadUseOfCheckIsRefused) {
  expect_refused("check --backend abacus", "abacus");
  expect_refused("check", "abacus", "DIFFKV_BACKEND=abacus");
  expect_refused("check --suite medium", "medium");
  expect_refused("check --seed -1", "-1");
  expect_refused("check --seed 99999999999999999999", "99999999999999999999");
  expect_refused("check --filter 'no case is called so'", "no case is called so");
  expect_refused("check --json /no/such/folder/x.json", "/no/such/folder/x.json");
  expect_refused("check --json ''", "--json");
}

TEST_F(CliTest, BadUseOfPlanIsRefused) {
  expect_refused("plan", "--seqs is required");
  expect_refused("plan --seqs 1y2", "--seqs has \"1y2\"");
  expect_refused("plan --seqs 1x99999999999", "up to 2147483647");
  expect_refused("plan --seqs 1x2147483647", "max_seq_len is 2147483647");
  expect_refused("plan --seqs 1x1*2000000", "at most 1048576 sequences");
  expect_refused("plan --seqs 2000000000x1 --num-heads 1 --num-kv-heads 1", "");
  expect_refused("plan --seqs 1x1 --model gpt", "gpt");
  expect_refused("plan --seqs 1x1 --model mimo-v2-flash --tp 0", "--tp");
  expect_refused("plan --seqs 1x1 --model mimo-v2-flash --tp 7", "7");
  expect_refused("plan --seqs 1x1 --model mimo-v2-flash --layer middle", "middle");
  expect_refused("plan --seqs 1x1 --model mimo-v2-flash --num-heads 8", "--num-heads");
  expect_refused("plan --seqs 1x1 --tp 2", "--model");
  expect_refused("plan --seqs 1x1 --num-heads 6 --num-kv-heads 4", "num_heads");
  expect_refused("plan --seqs 1x1 --num-heads 0 --num-kv-heads 0", "--num-");
  expect_refused("plan --seqs 1x1 --num-heads -4 --num-kv-heads -2", "--num-");
  expect_refused("plan --seqs 1x1 --num-heads 9223372036854775807 --num-kv-heads 1", "--num-heads");
  expect_refused("plan --seqs 1x1 --head-size-v 577", "--head-size-v");
  expect_refused("plan --seqs 1x1 --head-size-v 12", "head_size_v is 12");
  expect_refused("plan --seqs 1x1 --num-heads many", "--num-heads");
  expect_refused("plan --seqs 1x1 --dtype fp4",
                 "--dtype is \"fp4\", expected one of fp32, fp16, bf16, fp8_e4m3\n");
  expect_refused("plan --seqs 1x1 --dtype fp8_e5m2", "--dtype is \"fp8_e5m2\"");
  expect_refused("plan --seqs 1x1 --kv-cache-dtype int8",
                 "--kv-cache-dtype is \"int8\", expected one of auto, fp32, fp16, bf16, fp8_e4m3, "
                 "fp8_e5m2\n");
  expect_refused("plan --seqs 1x1 --policy wild", "wild");
  expect_refused("plan --seqs 1x1 --json ''", "--json");
}

// What the plan would not heed is refused.
TEST_F(CliTest, MaskOptionsOfPlanThatDoNotGoTogetherAreRefused) {
  for (const std::string flag : {"--window 4", "--chunk-size 4", "--prefix-window 4", "--full"}) {
    expect_refused("plan --seqs 1x1 --model mimo-v2-flash " + flag, "excludes");
  }
  expect_refused("plan --seqs 1x1 --model mimo-v2-flash --layer window --full --window 3",
                 "excludes");
  expect_refused("plan --seqs 1x1 --chunk-size 4 --prefix-window 4", "excludes");
  expect_refused("plan --seqs 1x1 --chunk-size 4 --window 4", "excludes");
  expect_refused("plan --seqs 1x1 --prefix-window 4 --window 4", "excludes");
  expect_refused("plan --seqs 1x1 --chunk-lookback 1", "requires --chunk-size");
  expect_refused("plan --seqs 1x1 --prefix-len 4", "requires --prefix-window");
  expect_refused("plan --seqs 1x1 --window -5", "--window");
  expect_refused("plan --seqs 1x1 --window 99999999999", "--window");
  expect_refused("plan --seqs 1x1 --chunk-size -1", "--chunk-size");
  expect_refused("plan --seqs 1x1 --chunk-size 4 --chunk-lookback -1", "--chunk-lookback");
  expect_refused("plan --seqs 1x1 --prefix-window -1", "--prefix-window");
  expect_refused("plan --seqs 1x1 --prefix-window 1 --prefix-len -1", "--prefix-len");
  expect_refused("plan --seqs 1x1 --causal-per-seq yes,maybe", "--causal-per-seq has \"maybe\"");
  expect_refused("plan --seqs 1x1 --causal-per-seq yes --full", "--full");
  expect_refused("plan --seqs 1x1 --mm-ranges 8-7", "--mm-ranges has \"8-7\"");
  expect_refused("plan --seqs 1x1 --mm-ranges 1-9,5-20", "overlap");
  expect_refused("plan --seqs 1x1 --clamp-mm-ranges", "--clamp-mm-ranges");
}

TEST_F(CliTest, BadUseOfReplayIsRefused) {
  expect_refused("replay", "");
  expect_refused("replay /no/such/trace.csv", "/no/such/trace.csv");
  const std::string replay = "replay '" DIFFKV_SAMPLE_TRACE "' ";
  expect_refused(replay + "--seed -1", "--seed is \"-1\"");
  expect_refused(replay + "--backend cpu --graphs", "there are no graphs");
  expect_refused(replay + "--verify 300000000", "--verify");
  expect_refused(replay + "--requests -1", "--requests");
  expect_refused(replay + "--block-size 0", "--block-size");
  expect_refused(replay + "--max-num-seqs x", "--max-num-seqs");
  expect_refused(replay + "--seconds nan", "--seconds is nan");
  expect_refused(replay + "--speed-up -1", "--speed-up is -1");
  expect_refused(replay + "--cache-gib 0", "--cache-gib is 0");
  expect_refused(replay + "--dtype fp8_e4m3", "--dtype is \"fp8_e4m3\"");
  expect_refused(replay + "--kv-cache-dtype bool", "--kv-cache-dtype is \"bool\"");
  expect_refused(replay + "--report ''", "--report");
  const std::string path = file("x");
  expect_refused(replay + "--json '" + path + "' --report '" + file("./x") + "'",
                 "--json and --report are both");
  const std::string trace = file("trace.csv");
  fs::copy_file(DIFFKV_SAMPLE_TRACE, trace);
  expect_refused("replay '" + trace + "' --json '" + file("./trace.csv") + "'",
                 "the trace and --json are both");
  EXPECT_EQ(content(trace), content(DIFFKV_SAMPLE_TRACE));
}

TEST_F(CliTest, ReplaySaysWhatRanAndAgainstWhichPeak) {
  const Outcome outcome =
      diffkv("replay '" DIFFKV_SAMPLE_TRACE "' --requests 2 --verify 5 --json '" +
             file("replay.json") + "' --report '" + file("replay.html") + "'");
  ASSERT_EQ(outcome.exit_code, kExitRight) << outcome.err;
  for (const std::string& text :
       {outcome.out.substr(outcome.out.find('\n')), content(file("replay.html"))}) {
    EXPECT_NE(text.find("1 full-attention layer with 8 query / 1 KV heads"), std::string::npos);
    EXPECT_NE(text.find("peak read bandwidth"), std::string::npos);
    EXPECT_NE(text.find("% of peak"), std::string::npos);
  }
  const auto replay = nlohmann::json::parse(content(file("replay.json")));
  EXPECT_EQ(replay["verify"]["rows_wrong"], 0);
  EXPECT_EQ(replay["verify"]["rows_full"].get<int>() + replay["verify"]["rows_window"].get<int>(),
            5);
}

TEST_F(CliTest, InfoJsonTellsTheBackends) {
  const Outcome outcome = diffkv("info --json '" + file("info.json") + "'");
  EXPECT_EQ(outcome.exit_code, kExitRight) << outcome.err;
  const auto info = nlohmann::json::parse(content(file("info.json")));
  EXPECT_EQ(info["version"], "0.1.0");
  ASSERT_FALSE(info["backends"].empty());
  EXPECT_EQ(info["backends"].back()["name"], "cpu");
  EXPECT_GE(info["backends"].back()["features"].size(), 30U);
  EXPECT_FALSE(info["simd_targets"].empty());
  EXPECT_TRUE(info["environment"].contains("DIFFKV_BACKEND"));
}

TEST_F(CliTest, InfoTakesTheTargetOfTheEnvironment) {
  ASSERT_EQ(diffkv("info --json '" + file("info.json") + "'").exit_code, kExitRight);
  const auto targets = nlohmann::json::parse(content(file("info.json")))["simd_targets"];
  const std::string last = targets.back();
  ASSERT_EQ(
      diffkv("info --json '" + file("info.json") + "'", "DIFFKV_CPU_TARGET=" + last).exit_code,
      kExitRight);
  EXPECT_EQ(nlohmann::json::parse(content(file("info.json")))["simd_target"], last);
}

// A Markdown table without the column of that heading.
std::string without_column(const std::string& table, const std::string& heading) {
  std::string rest;
  std::size_t column = std::string::npos;
  std::istringstream lines(table);
  for (std::string line; std::getline(lines, line);) {
    std::vector<std::string> cells;
    std::istringstream stream(line.substr(1));
    for (std::string cell; std::getline(stream, cell, '|');) cells.push_back(cell);
    if (column == std::string::npos) {
      column = static_cast<std::size_t>(std::find(cells.begin(), cells.end(), " " + heading + " ") -
                                        cells.begin());
    }
    if (column < cells.size()) cells.erase(cells.begin() + static_cast<std::ptrdiff_t>(column));
    rest += '|';
    for (const std::string& cell : cells) rest += cell + '|';
    rest += '\n';
  }
  return rest;
}

TEST_F(CliTest, ReadmeHasTheFeatureTable) {
  const Outcome outcome = diffkv("info --features-markdown");
  EXPECT_EQ(outcome.exit_code, kExitRight);
  const std::string readme = content(DIFFKV_README);
  const std::string begin = "<!-- features:begin -->\n";
  const std::string end = "<!-- features:end -->";
  const std::size_t first = readme.find(begin);
  const std::size_t last = readme.find(end);
  ASSERT_TRUE(first != std::string::npos && last != std::string::npos);
  const std::string table = readme.substr(first + begin.size(), last - first - begin.size());
  // Only a machine with a GPU could be asked about the other column.
  EXPECT_EQ(table, without_column(outcome.out, "cuda"))
      << "put what `diffkv info --features-markdown` prints, without a column of cuda, between the "
         "markers in README.md";
}

TEST_F(CliTest, CheckRepeatsItselfBySeedAndWritesJson) {
  const std::string arguments = "check --filter sink --seed 7 --json '" + file("check.json") + "'";
  const Outcome first = diffkv(arguments);
  EXPECT_EQ(first.exit_code, kExitRight) << first.out << first.err;
  EXPECT_NE(first.out.find("seed     7\n"), std::string::npos) << first.out;
  EXPECT_NE(first.out.find(" 0 failed"), std::string::npos) << first.out;
  const auto check = nlohmann::json::parse(content(file("check.json")));
  EXPECT_EQ(check["seed"], 7);
  ASSERT_FALSE(check["cases"].empty());
  for (const auto& result : check["cases"]) EXPECT_TRUE(result["ok"]) << result;
  EXPECT_EQ(diffkv(arguments).out, first.out);
}

TEST_F(CliTest, CheckPicksANewSeed) {
  const std::string first = diffkv("check --filter sink").out;
  const std::string second = diffkv("check --filter sink").out;
  const auto seed_of = [](const std::string& text) {
    const std::size_t at = text.find("seed ");
    return at == std::string::npos ? text : text.substr(at, text.find('\n', at) - at);
  };
  EXPECT_NE(seed_of(first), seed_of(second));
}

TEST_F(CliTest, PlanCountsEveryTileAndRow) {
  const Outcome outcome =
      diffkv("plan --seqs '1x8192*3,100x300' --model mimo-v2-flash --tp 4 --items --json '" +
             file("plan.json") + "'");
  ASSERT_EQ(outcome.exit_code, kExitRight) << outcome.err;
  EXPECT_NE(outcome.out.find("Work items"), std::string::npos);
  const auto plan = nlohmann::json::parse(content(file("plan.json")));
  EXPECT_EQ(plan["sequences"], 4);
  EXPECT_EQ(plan["tokens"], 103);
  // 16 heads over 1 KV head: every row is in a tile, the first piece of which starts at key 0.
  std::int64_t rows = 0;
  std::int64_t cut = 0;
  for (const auto& item : plan["items"]) {
    if (item["keys"].at(0).at(0) == 0) rows += item["num_rows"].get<std::int64_t>();
    cut += item["slot"].get<int>() >= 0 ? 1 : 0;
  }
  EXPECT_EQ(rows, 103 * 16);
  EXPECT_EQ(plan["slots_used"], cut);
  EXPECT_GT(plan["workspace_bytes"], 0);
  EXPECT_GE(plan["classes"].at(0)["max_over_mean"], 1.0);
}

TEST_F(CliTest, PlanKnowsWindowLayers) {
  const Outcome outcome =
      diffkv("plan --seqs 1x8192 --model mimo-v2-flash --layer window --items --json '" +
             file("plan.json") + "'");
  ASSERT_EQ(outcome.exit_code, kExitRight) << outcome.err;
  for (const auto& item : nlohmann::json::parse(content(file("plan.json")))["items"]) {
    EXPECT_GE(item["keys"].at(0).at(0), 8192 - 128 - 64);
  }
}

TEST_F(CliTest, PlanTakesTheEdges) {
  for (const std::string arguments :
       {"--seqs 0x0", "--seqs 1x0", "--seqs 5x2", "--seqs 1x1073741824", "--seqs 1x1*0",
        "--seqs 4x16*3 --policy invariant", "--seqs 1x100000 --policy invariant",
        "--seqs 7x99 --prefix-window 5 --prefix-len 2147483647", "--seqs 7x99 --dtype float16",
        "--seqs 64x4096 --full --window 100", "--seqs 3x50 --chunk-size 8 --chunk-lookback 1",
        "--seqs 1x1*100000 --num-heads 8 --num-kv-heads 1"}) {
    const Outcome outcome = diffkv("plan " + arguments);
    EXPECT_EQ(outcome.exit_code, kExitRight) << arguments << "\n" << outcome.err;
    EXPECT_NE(outcome.out.find("Tile classes"), std::string::npos) << arguments;
  }
}

}  // namespace
}  // namespace diffkv::cli
