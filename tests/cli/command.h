// The diffkv command, run from outside. DIFFKV_COMMAND is its path.
#pragma once

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "cli/commands.h"

namespace diffkv::cli {

struct Outcome {
  int exit_code = -1;  // -1: ended by a signal
  std::string out;
  std::string err;
};

inline std::string content(const std::filesystem::path& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

// A test with an empty folder of its own.
class CommandTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = std::filesystem::path(testing::TempDir()) /
              ("diffkv_" + std::to_string(getpid()) + "_" +
               testing::UnitTest::GetInstance()->current_test_info()->name());
    std::filesystem::create_directories(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  std::string file(const std::string& name) const { return (folder_ / name).string(); }
  void write(const std::string& name, const std::string& text) const {
    std::ofstream(folder_ / name) << text;
  }

  // Runs the command with these arguments, as a shell splits them; `before` sets variables.
  Outcome diffkv(const std::string& arguments, const std::string& before = "") const {
    const std::string command = before + " '" + DIFFKV_COMMAND + "' " + arguments + " >'" +
                                file("out") + "' 2>'" + file("err") + "'";
    const int status = std::system(command.c_str());
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, content(file("out")),
            content(file("err"))};
  }

  // Refused: exit code 2, nothing on stdout, a message that says this.
  void expect_refused(const std::string& arguments, const std::string& message,
                      const std::string& before = "") const {
    const Outcome outcome = diffkv(arguments, before);
    EXPECT_EQ(outcome.exit_code, kExitBadUse) << arguments << "\n" << outcome.err;
    EXPECT_EQ(outcome.err.rfind("diffkv: error: ", 0), 0U) << arguments << "\n" << outcome.err;
    EXPECT_NE(outcome.err.find(message), std::string::npos)
        << arguments << "\nexpected: " << message << "\ngot: " << outcome.err;
    EXPECT_EQ(outcome.out, "") << arguments;
  }

  std::filesystem::path folder_;
};

}  // namespace diffkv::cli
