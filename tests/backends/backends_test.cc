// One list of cases for every backend and every SIMD target: each case is right on each of them,
// and which code path runs it is as support_table.txt says, so that a path cannot get lost unseen.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <random>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "cpu/processor.h"
#include "cpu/targets.h"
#include "diffkv/backend.h"
#include "verify/cases.h"
#include "verify/run.h"

namespace diffkv {
namespace {

// A backend on one SIMD target, as it runs on one kind of processor.
struct Device {
  const Backend* backend;
  std::string target;
  cpu::Tuning tuning;
};

std::vector<Device> devices() {
  std::vector<Device> list;
  for (const Backend* backend : backends()) {
    if (!backend->available() || backend->device_type() != DeviceType::kCpu) continue;
    for (const std::string& target : cpu::supported_targets()) {
      for (bool on : {false, true}) {
        list.push_back({backend, target, {.row_blocks = on, .near_fetch = on}});
      }
    }
  }
  return list;
}

std::string name_of(const testing::TestParamInfo<Device>& info) {
  return std::string(info.param.backend->name()) + "_" + info.param.target +
         (info.param.tuning.row_blocks ? "_rows" : "_lanes");
}

class BackendCases : public testing::TestWithParam<Device> {
 protected:
  void SetUp() override {
    cpu::set_target(GetParam().target);
    cpu::set_tuning(GetParam().tuning);
  }
  void TearDown() override {
    cpu::set_target("");
    cpu::set_tuning({});
  }
};

std::uint64_t seed() {
  const auto given = testing::GTEST_FLAG(random_seed);
  return given != 0 ? static_cast<std::uint64_t>(given) : std::random_device{}() % 99999 + 1;
}

TEST_P(BackendCases, AreRightOnThisTarget) {
  const Device& device = GetParam();
  ASSERT_EQ(cpu::current_target(), device.target);
  const std::uint64_t case_seed = seed();
  for (const verify::Case& c : verify::cases(verify::Suite::kQuick)) {
    SCOPED_TRACE(fmt::format("{}, repeat with --gtest_random_seed={}", c.name, case_seed));
    const verify::CaseResult result = verify::run_case(*device.backend, c, case_seed, false);
    if (!result.supported) continue;  // whether it may be so is the support table's matter
    EXPECT_TRUE(result.ok) << result.message;
    EXPECT_GT(result.rows, 0) << "nothing was compared";
    EXPECT_TRUE(result.kernel.ends_with("/" + device.target))
        << "ran on " << result.kernel << ", not on " << device.target;
  }
}

INSTANTIATE_TEST_SUITE_P(Every, BackendCases, testing::ValuesIn(devices()), name_of);

TEST(Backends, TheMachineHasATargetAndEachCanBeChosen) {
  ASSERT_FALSE(cpu::supported_targets().empty());
  for (const std::string& target : cpu::supported_targets()) {
    cpu::set_target(target);
    EXPECT_EQ(cpu::current_target(), target);
  }
  EXPECT_THROW(cpu::set_target("no such target"), Error);
  cpu::set_target("");
}

// "case | backend | path", the path without the target's name.
std::string support_table() {
  std::string table;
  for (const verify::Case& c : verify::cases(verify::Suite::kQuick)) {
    for (const Backend* backend : backends()) {
      if (backend->device_type() != DeviceType::kCpu) continue;
      const verify::CaseResult result = verify::run_case(*backend, c, 1, false);
      const std::string path = result.supported ? result.kernel.substr(0, result.kernel.rfind('/'))
                                                : "unsupported: " + result.message;
      table += fmt::format("{} | {} | {}\n", c.name, backend->name(), path);
    }
  }
  return table;
}

std::set<std::string> lines_of(const std::string& text) {
  std::set<std::string> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) lines.insert(line);
  return lines;
}

TEST(Backends, SupportAndPathsAreAsTheTableSays) {
  const std::string now = support_table();
  std::ofstream(DIFFKV_SUPPORT_TABLE_NOW) << now;
  std::ifstream file(DIFFKV_SUPPORT_TABLE);
  const std::string then{std::istreambuf_iterator<char>(file), {}};
  const std::set<std::string> lines_now = lines_of(now);
  const std::set<std::string> lines_then = lines_of(then);
  for (const std::string& line : lines_then) {
    EXPECT_TRUE(lines_now.contains(line)) << "lost: " << line;
  }
  for (const std::string& line : lines_now) {
    EXPECT_TRUE(lines_then.contains(line)) << "new: " << line;
  }
  if (HasFailure()) {
    std::cout << "If the change is meant: cp " << DIFFKV_SUPPORT_TABLE_NOW << " "
              << DIFFKV_SUPPORT_TABLE << "\n";
  }
}

}  // namespace
}  // namespace diffkv
