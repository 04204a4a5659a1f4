#include "cli/output.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "diffkv/error.h"

namespace diffkv::cli {
namespace {

namespace fs = std::filesystem;

class OutputFileTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::path(testing::TempDir()) /
              ("diffkv_output_" +
               std::string(testing::UnitTest::GetInstance()->current_test_info()->name()));
    fs::remove_all(folder_);
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::size_t files() const {
    return static_cast<std::size_t>(
        std::distance(fs::directory_iterator(folder_), fs::directory_iterator()));
  }
  static std::string content(const fs::path& path) {
    std::ifstream file(path);
    return {std::istreambuf_iterator<char>(file), {}};
  }

  fs::path folder_;
};

TEST_F(OutputFileTest, AppearsWholeAndAlone) {
  const fs::path path = folder_ / "out.json";
  OutputFile file(path.string());
  EXPECT_FALSE(fs::exists(path));
  file.commit("content");
  EXPECT_EQ(content(path), "content");
  EXPECT_EQ(files(), 1U);
}

TEST_F(OutputFileTest, KeepsTheOldOneUntilTheNewOneIsWhole) {
  const fs::path path = folder_ / "out.json";
  std::ofstream(path) << "old";
  { const OutputFile abandoned(path.string()); }
  EXPECT_EQ(content(path), "old");
  EXPECT_EQ(files(), 1U);
  OutputFile file(path.string());
  file.commit("new");
  EXPECT_EQ(content(path), "new");
  EXPECT_EQ(files(), 1U);
}

TEST_F(OutputFileTest, RefusesWhatCannotBeWritten) {
  EXPECT_THROW(OutputFile((folder_ / "missing" / "out.json").string()), Error);
  EXPECT_THROW(OutputFile(folder_.string()), Error);
  EXPECT_THROW(OutputFile("/dev/null"), Error);
  EXPECT_EQ(files(), 0U);
}

TEST_F(OutputFileTest, NoPathIsNoFile) {
  OutputFile file("");
  EXPECT_FALSE(file.given());
  file.commit("content");
  EXPECT_EQ(files(), 0U);
}

TEST(Table, AlignsColumns) {
  Table table({{"name"}, {"count", Table::Align::kRight}});
  table.add_row({"a", "1"});
  table.add_row({"µs", "1000000"});
  EXPECT_EQ(table.text(),
            "name    count\n"
            "----  -------\n"
            "a           1\n"
            "µs    1000000\n");
  EXPECT_EQ(table.markdown(),
            "| name | count |\n"
            "| --- | ---: |\n"
            "| a | 1 |\n"
            "| µs | 1000000 |\n");
}

TEST(HumanBytes, PicksTheUnit) {
  EXPECT_EQ(human_bytes(0), "0 B");
  EXPECT_EQ(human_bytes(1023), "1023 B");
  EXPECT_EQ(human_bytes(1536), "1.5 KiB");
  EXPECT_EQ(human_bytes(3.0 * 1024 * 1024 * 1024), "3.0 GiB");
}

}  // namespace
}  // namespace diffkv::cli
