#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "diffkv/error.h"
#include "verify/codec.h"
#include "verify/reference.h"

namespace diffkv::verify {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// Three pages of two tokens of an e4m3 cache, one head of 8 and 8, filled with 0x55.
class UpdateTest : public ::testing::Test {
 protected:
  static constexpr std::int64_t kRow = 16;

  UpdateTest() : bytes(3 * 2 * kRow, 0x55) {
    cache.key = {bytes.data(), DType::kE4M3, 2 * kRow, kRow, kRow};
    cache.value = cache.key;
    cache.value.data = bytes.data() + 8;
    cache.num_blocks = 3;
    cache.block_size = 2;
    cache.num_kv_heads = 1;
    cache.head_size_qk = cache.head_size_v = 8;
  }

  void update(const std::vector<float>& key, const std::vector<float>& value,
              const std::vector<std::int64_t>& slots) {
    const auto tokens = static_cast<std::int64_t>(key.size() / 8);
    reference_update(view_of(key.data(), {tokens, 1, 8}), view_of(value.data(), {tokens, 1, 8}),
                     cache, view_of(slots.data(), {static_cast<std::int64_t>(slots.size())}));
  }

  std::vector<std::uint8_t> bytes;
  KvCacheView cache;
};

TEST_F(UpdateTest, WritesItsSlotAndNothingElse) {
  update(std::vector<float>(16, 1), std::vector<float>(16, 2), {3, -1});
  for (std::int64_t i = 0; i < std::ssize(bytes); ++i) {
    const int expected = i / kRow != 3 ? 0x55 : i % kRow < 8 ? 0x38 : 0x40;
    EXPECT_EQ(bytes[static_cast<std::size_t>(i)], expected) << i;
  }
}

TEST_F(UpdateTest, TheMappingsLengthGovernsAndTheLaterTokenWins) {
  update({1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 4, 4, 4, 4, 4, 4, 4, 4},
         std::vector<float>(24, 0), {5, 5});
  EXPECT_EQ(bytes[5 * kRow], 0x40);
  EXPECT_EQ(bytes[4 * kRow], 0x55);
  EXPECT_THROW(update(std::vector<float>(8), std::vector<float>(8), {6}), Error);
}

TEST_F(UpdateTest, ScaledRoundedAndSaturated) {
  const float scale = 2;
  cache.k_scale = view_of(&scale, {1});
  update({34, 38, 1e9F, -kInf, std::nanf(""), -0.0F, 896, 2.0F / 1024}, {1, 0, 0, 0, 0, 0, 0, 0},
         {0});
  const std::vector<std::uint8_t> expected{0x58, 0x5a, 0x7e, 0xfe, 0x7f, 0x80, 0x7e, 0x00, 0x38};
  EXPECT_EQ(std::vector<std::uint8_t>(bytes.begin(), bytes.begin() + 9), expected);
}

TEST_F(UpdateTest, TheSameTypeIsCopied) {
  const float scale = 2;
  cache.k_scale = view_of(&scale, {1});
  const std::vector<std::uint8_t> raw{0, 1, 0x7f, 0xff, 0x80, 0x3c, 0x7e, 0xfe};
  const ConstTensorView rows(raw.data(), DType::kE4M3, {1, 1, 8});
  const std::int64_t slot = 0;
  reference_update(rows, rows, cache, view_of(&slot, {1}));
  EXPECT_EQ(std::vector<std::uint8_t>(bytes.begin(), bytes.begin() + 8), raw);
}

TEST(CacheBits, DividesInFp32) {
  // A tie in fp32, whose scale is exactly 3, that fp64 would round up.
  const float x = 1.0625F * 3;
  const double third = std::nextafter(3.0, 2.0);
  EXPECT_EQ(decode(DType::kE4M3, cache_bits(DType::kE4M3, x, third)), 1.0);
  EXPECT_GT(x / third, 1.0625);
  // Not scaled, and infinite where it overflows, in a 16-bit cache.
  EXPECT_EQ(cache_bits(DType::kF16, 1e6, 100), 0x7c00U);
  EXPECT_EQ(cache_bits(DType::kBF16, 1.0, 100), 0x3f80U);
}

class MergeTest : public ::testing::Test {
 protected:
  MergeTest() {
    a.output = view_of(a_out.data(), {1, 1, 2});
    b.output = view_of(b_out.data(), {1, 1, 2});
    a.lse = view_of(&a_lse, {1, 1});
    b.lse = view_of(&b_lse, {1, 1});
  }

  RowRef merged() const { return reference_merge_row(a, b, sinks, 0, 0); }

  std::vector<float> a_out{1, 2}, b_out{5, 10};
  float a_lse = 0, b_lse = static_cast<float>(std::log(3.0));
  AttnState a, b;
  ConstTensorView sinks;
};

TEST_F(MergeTest, WeighsByExpLse) {
  EXPECT_NEAR(merged().output[0], (1 + 3 * 5) / 4.0, 1e-6);
  EXPECT_NEAR(merged().output[1], (2 + 3 * 10) / 4.0, 1e-6);
  EXPECT_NEAR(merged().lse, std::log(4.0), 1e-6);
}

TEST_F(MergeTest, AddsTheSinkOnce) {
  const auto sink = static_cast<float>(std::log(4.0));
  sinks = view_of(&sink, {1});
  EXPECT_NEAR(merged().output[0], 16 / 8.0, 1e-6);
  EXPECT_NEAR(merged().lse, std::log(8.0), 1e-6);
}

TEST_F(MergeTest, EmptyParts) {
  b_lse = kInf;
  b_out = {std::nanf(""), kInf};
  EXPECT_NEAR(merged().output[1], 2, 1e-6);
  EXPECT_EQ(merged().lse, 0);
  a_lse = -kInf;
  EXPECT_EQ(merged().output[0], 0);
  EXPECT_EQ(merged().lse, -kInf);
  const float sink = 2;
  sinks = view_of(&sink, {1});
  EXPECT_EQ(merged().output[0], 0);
  EXPECT_EQ(merged().lse, 2);
}

}  // namespace
}  // namespace diffkv::verify
