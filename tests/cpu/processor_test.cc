// What is chosen by the processor at hand.
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <fstream>
#include <string>

#include "cpu/backend.h"
#include "cpu/bf16_dot.h"
#include "cpu/processor.h"
#include "cpu/targets.h"
#include "diffkv/backend.h"

namespace diffkv {
namespace {

std::int32_t decode_tile_heads(DType dtype, std::int32_t window, std::int64_t group) {
  PlanKey key;
  key.num_kv_heads = 4;
  key.num_heads = 4 * group;
  key.head_size_qk = 192;
  key.head_size_v = 128;
  key.query_dtype = key.key_dtype = key.value_dtype = dtype;
  key.mask.window = window;
  return cpu::backend().limits(key, 2).classes[0].tile_heads;
}

class Processor : public testing::Test {
 protected:
  void TearDown() override {
    cpu::set_target("");
    cpu::set_tuning({});
  }
};

// One head of 16 rows fills a tile; four are read together where rows come to the first-level
// cache.
TEST_F(Processor, TilesOfPairsSpanHeadsWhereRowsAreFetchedNear) {
  if (!cpu::bf16_dot_is_fast()) GTEST_SKIP() << "this processor multiplies no pairs of bf16 fast";
  cpu::set_target("AVX3_BF16");
  cpu::set_tuning(cpu::Tuning{.row_blocks = true, .near_fetch = true});
  EXPECT_EQ(decode_tile_heads(DType::kBF16, 0, 16), 4);
  EXPECT_EQ(decode_tile_heads(DType::kBF16, 128, 16), 1);
  EXPECT_EQ(decode_tile_heads(DType::kF16, 0, 16), 1);
  EXPECT_EQ(decode_tile_heads(DType::kBF16, 0, 8), 2);
  cpu::set_tuning(cpu::Tuning{.row_blocks = true, .near_fetch = false});
  EXPECT_EQ(decode_tile_heads(DType::kBF16, 0, 16), 1);
}

// As Linux names the processor.
TEST_F(Processor, OwnTuningIsByMakerAndFamily) {
  std::ifstream file("/proc/cpuinfo");
  std::string maker;
  int family = 0;
  for (std::string line; (maker.empty() || family == 0) && std::getline(file, line);) {
    const std::size_t colon = line.find(": ");
    if (colon == std::string::npos) continue;
    if (line.starts_with("vendor_id")) maker = line.substr(colon + 2);
    if (line.starts_with("cpu family")) family = std::stoi(line.substr(colon + 2));
  }
  if (maker.empty()) GTEST_SKIP() << "/proc/cpuinfo names no vendor_id";
  EXPECT_EQ(cpu::made_by_intel(), maker == "GenuineIntel");
  const cpu::Tuning own = cpu::tuning();
  EXPECT_EQ(own.row_blocks, maker != "GenuineIntel");
  EXPECT_EQ(own.near_fetch, maker == "AuthenticAMD" && family >= 26);
  cpu::set_tuning(cpu::Tuning{.row_blocks = !own.row_blocks, .near_fetch = !own.near_fetch});
  EXPECT_NE(cpu::tuning().row_blocks, own.row_blocks);
  cpu::set_tuning({});
  EXPECT_EQ(cpu::tuning().row_blocks, own.row_blocks);
  EXPECT_EQ(cpu::tuning().near_fetch, own.near_fetch);
}

}  // namespace
}  // namespace diffkv
