#include "verify/reference.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "diffkv/error.h"
#include "tiny.h"

namespace diffkv::verify {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
using Keys = std::vector<int>;

// Six keys, the last three are the queries' own: rows 0, 1, 2 stand at p = 3, 4, 5.
class MaskTest : public ::testing::Test {
 protected:
  Tiny tiny{{0, 0, 0}, {0, 0, 0, 0, 0, 0}, {0, 0, 0, 0, 0, 0}};
  Mask& mask = tiny.key.mask;
  Batch& batch = tiny.args.batch;
};

TEST_F(MaskTest, CausalAndFull) {
  EXPECT_EQ(tiny.seen(0), (Keys{0, 1, 2, 3}));
  EXPECT_EQ(tiny.seen(2), (Keys{0, 1, 2, 3, 4, 5}));
  mask.causal = false;
  EXPECT_EQ(tiny.seen(0), (Keys{0, 1, 2, 3, 4, 5}));
}

TEST_F(MaskTest, CausalPerSequenceOverridesTheModel) {
  bool causal = false;
  batch.causal_per_seq = view_of(&causal, {1});
  EXPECT_EQ(tiny.seen(0), (Keys{0, 1, 2, 3, 4, 5}));
  mask.causal = false;
  causal = true;
  EXPECT_EQ(tiny.seen(0), (Keys{0, 1, 2, 3}));
}

TEST_F(MaskTest, SlidingWindow) {
  mask.window = 2;
  EXPECT_EQ(tiny.seen(0), (Keys{2, 3}));
  mask.causal = false;
  EXPECT_EQ(tiny.seen(0), (Keys{2, 3, 4}));
  EXPECT_EQ(tiny.seen(2), (Keys{4, 5}));
  mask.window = -1;
  EXPECT_EQ(tiny.seen(0), (Keys{0, 1, 2, 3, 4, 5}));
}

TEST_F(MaskTest, ChunkReplacesTheWindow) {
  mask.window = 1;
  mask.chunk_size = 2;  // chunks {0, 1}, {2, 3}, {4, 5}
  EXPECT_EQ(tiny.seen(0), (Keys{2, 3}));
  EXPECT_EQ(tiny.seen(1), (Keys{4}));
  mask.chunk_lookback = 1;
  EXPECT_EQ(tiny.seen(1), (Keys{2, 3, 4}));
  mask.causal = false;  // only looking back is limited
  EXPECT_EQ(tiny.seen(0), (Keys{0, 1, 2, 3, 4, 5}));
  mask.chunk_lookback = 0;
  EXPECT_EQ(tiny.seen(0), (Keys{2, 3, 4, 5}));
}

TEST_F(MaskTest, PrefixWindowReplacesTheWindow) {
  std::int32_t prefix = 2;
  batch.prefix_lens = view_of(&prefix, {1});
  mask.window = 1;
  mask.prefix_window = 2;
  EXPECT_EQ(tiny.seen(2), (Keys{0, 1, 4, 5}));
  prefix = 0;
  EXPECT_EQ(tiny.seen(2), (Keys{4, 5}));
  prefix = 100;
  EXPECT_EQ(tiny.seen(0), (Keys{0, 1, 2, 3}));
  prefix = 1;
  mask.causal = false;
  EXPECT_EQ(tiny.seen(0), (Keys{0, 2, 3, 4, 5}));
}

TEST_F(MaskTest, MultimodalRanges) {
  // The second is empty, the third runs past the keys.
  std::vector<std::int32_t> ranges{1, 3, 4, 4, 5, 9};
  batch.mm_ranges = view_of(ranges.data(), {1, 3, 2});
  EXPECT_EQ(tiny.seen(0), (Keys{0, 1, 2, 3}));
  EXPECT_EQ(tiny.seen(1), (Keys{0, 1, 2, 3, 4}));
  ranges = {3, 5, 0, 0, -1, -1};
  EXPECT_EQ(tiny.seen(0), (Keys{0, 1, 2, 3, 4, 5}));  // looks ahead inside its range
  mask.window = 2;
  EXPECT_EQ(tiny.seen(2), (Keys{3, 4, 5}));  // back past the window
  mask.clamp_mm_ranges = true;
  EXPECT_EQ(tiny.seen(2), (Keys{4, 5}));
  EXPECT_EQ(tiny.seen(0), (Keys{2, 3, 4, 5}));  // the clamp does not look ahead
  mask.window = 0;
  EXPECT_EQ(tiny.seen(2), (Keys{0, 1, 2, 3, 4, 5}));
}

TEST_F(MaskTest, RowsBeforeTheFirstKey) {
  tiny.seq_lens[0] = 1;  // three queries: p = -2, -1, 0
  EXPECT_EQ(tiny.seen(0), Keys{});
  EXPECT_EQ(tiny.seen(2), Keys{0});
  EXPECT_EQ(tiny.row(0).lse, -kInf);
  mask.causal = false;
  EXPECT_EQ(tiny.seen(0), Keys{0});
  mask.window = 2;  // j - p < 2
  EXPECT_EQ(tiny.seen(0), Keys{});
  EXPECT_EQ(tiny.seen(1), Keys{0});
  mask.window = 0;
  mask.chunk_size = 4;  // p = -2 is in chunk -1, not 0
  EXPECT_EQ(tiny.seen(0), Keys{0});
  EXPECT_EQ(place_row(batch, 0).position, -2);
  EXPECT_THROW(place_row(batch, 3), Error);
}

// Two keys with scores ln 1 and ln 3 at scale 1 and query 1: weights 1/4 and 3/4.
class ScoreTest : public ::testing::Test {
 protected:
  double output(std::int64_t token = 0) const { return tiny.row(token).output[0]; }
  double lse(std::int64_t token = 0) const { return tiny.row(token).lse; }

  Tiny tiny{{1}, {0, std::log(3.0F)}, {10, 2}};
  AttentionParams& params = tiny.params;
};

TEST_F(ScoreTest, Softmax) {
  EXPECT_NEAR(output(), 0.25 * 10 + 0.75 * 2, 1e-6);
  EXPECT_NEAR(lse(), std::log(4.0), 1e-6);
  EXPECT_EQ(tiny.row(0).output[1], 0);
}

TEST_F(ScoreTest, ScalesMultiplyScoresAndValues) {
  float q_scale = 0.5F, k_scale = 4, v_scale = 3, output_scale = 2;
  params.scale = 0.5F;
  params.q_scale = view_of(&q_scale, {1});
  tiny.args.cache.k_scale = view_of(&k_scale, {1});
  EXPECT_NEAR(output(), 4, 1e-6);  // 0.5 * 0.5 * 4 = 1
  tiny.args.cache.v_scale = view_of(&v_scale, {1});
  params.output_scale = view_of(&output_scale, {1});
  EXPECT_NEAR(output(), 4 * 3 / 2.0, 1e-6);
  EXPECT_NEAR(lse(), std::log(4.0), 1e-6);
}

TEST_F(ScoreTest, SoftCap) {
  params.soft_cap = 0.5F;
  const double second = std::exp(0.5 * std::tanh(std::log(3.0) / 0.5));
  EXPECT_NEAR(output(), (10 + 2 * second) / (1 + second), 1e-6);
  params.soft_cap = -1;
  EXPECT_NEAR(output(), 4, 1e-6);
}

TEST_F(ScoreTest, AlibiInBothForms) {
  const auto slope = static_cast<float>(std::log(2.0));
  params.alibi_slopes = view_of(&slope, {1});
  // context_len 1: biases -ln 2 and 0, weights 1/2 : 3.
  EXPECT_NEAR(output(), (0.5 * 10 + 3 * 2) / 3.5, 1e-6);
  params.alibi_sqrt = true;  // -ln 2 * sqrt(1 - 0)
  EXPECT_NEAR(output(), (0.5 * 10 + 3 * 2) / 3.5, 1e-6);
  tiny.key.mask.causal = false;
  tiny.seq_lens[0] = 2;
  tiny.query_start_loc[1] = 1;
  Tiny far({1}, {0, 0, 0, 0, 0}, {8, 0, 0, 0, 0});
  far.params = params;  // p = 4, j = 0: -ln 2 * 2
  const double others = std::exp2(-std::sqrt(3.0)) + std::exp2(-std::sqrt(2.0)) + 0.5 + 1;
  EXPECT_NEAR(far.row(0).output[0], 8 * 0.25 / (0.25 + others), 1e-6);
  Tiny ahead({0, 0}, {0, 0}, {3, 5});  // p = 0 sees j = 1: no square root of a negative
  ahead.key.mask.causal = false;
  ahead.params = params;
  EXPECT_NEAR(ahead.row(0).output[0], 4, 1e-6);
  ahead.params.alibi_sqrt = false;  // + ln 2 * (1 - 0)
  EXPECT_NEAR(ahead.row(0).output[0], (3 + 2 * 5) / 3.0, 1e-6);
}

TEST(Reference, QueryQueryBias) {
  // Rows p = 1, 2 of three keys; context_len 1, so column 0 is key 1.
  Tiny tiny({0, 0}, {0, 0, 0}, {3, 6, 9});
  const auto ln2 = static_cast<float>(std::log(2.0));
  std::vector<float> bias{ln2, 0, -kInf, ln2};
  tiny.params.qq_bias = view_of(bias.data(), {2, 2});
  EXPECT_NEAR(tiny.row(0).output[0], (3 + 2 * 6) / 3.0, 1e-6);
  EXPECT_NEAR(tiny.row(1).output[0], (3 + 2 * 9) / 3.0, 1e-6);
  tiny.params.qq_bias.shape = {1, 1, 0, 0};  // row 1 and column 1 are outside
  EXPECT_NEAR(tiny.row(1).output[0], 6, 1e-6);
  bias[0] = -kInf;
  EXPECT_NEAR(tiny.row(0).output[0], 3, 1e-6);
}

TEST_F(ScoreTest, SinkInAndOut) {
  auto sink = static_cast<float>(std::log(4.0));
  params.sinks = view_of(&sink, {1});
  params.soft_cap = 0;
  EXPECT_NEAR(output(), (10 + 3 * 2) / 8.0, 1e-6);
  EXPECT_NEAR(lse(), std::log(8.0), 1e-6);
  params.scale = 2;  // a sink is not scaled: weights 1, 9, 4
  EXPECT_NEAR(output(), (10 + 9 * 2) / 14.0, 1e-6);
  params.scale = 1;
  params.sink_mode = SinkMode::kOut;
  EXPECT_NEAR(output(), 4, 1e-6);
  EXPECT_NEAR(lse(), std::log(4.0), 1e-6);
  params.sink_mode = SinkMode::kIn;
  sink = -kInf;
  EXPECT_NEAR(output(), 4, 1e-6);
}

TEST_F(ScoreTest, NoKeysGiveZerosAndTheSink) {
  tiny.seq_lens[0] = 0;
  EXPECT_EQ(output(), 0);
  EXPECT_EQ(lse(), -kInf);
  const float sink = 1.5F;
  params.sinks = view_of(&sink, {1});
  EXPECT_EQ(output(), 0);
  EXPECT_EQ(lse(), 1.5);
  params.sink_mode = SinkMode::kOut;
  EXPECT_EQ(lse(), -kInf);
}

TEST_F(ScoreTest, OnlyMinusInfinityGivesZeros) {
  tiny.cache[2 * 16] = tiny.cache[2 * 16 + 16] = -kInf;
  EXPECT_EQ(output(), 0);
  EXPECT_EQ(lse(), -kInf);
}

TEST(Reference, NanReachesOnlyTheRowsThatSeeIt) {
  Tiny tiny({1, 1}, {1, 1, std::nanf("")}, {1, 2, 3});
  EXPECT_NEAR(tiny.row(0).output[0], 1.5, 1e-6);
  EXPECT_TRUE(std::isnan(tiny.row(1).output[0]));
  EXPECT_TRUE(std::isnan(tiny.row(1).lse));
  Tiny value({1, 1}, {1, 1, 1}, {1, 2, std::nanf("")});
  EXPECT_NEAR(value.row(0).output[0], 1.5, 1e-6);
  EXPECT_TRUE(std::isnan(value.row(1).output[0]));
  EXPECT_FALSE(std::isnan(value.row(1).lse));
}

TEST(Reference, HeadsPagesAndDenseKeys) {
  // Two query heads on each of two KV heads, three keys on two pages of two, HND.
  constexpr std::int64_t kSize = 8;
  std::vector<float> query(4 * kSize, 1);
  std::vector<float> cache(3 * 2 * 2 * 2 * kSize, std::nanf(""));
  PlanKey key;
  key.num_heads = 4;
  key.num_kv_heads = 2;
  key.head_size_qk = key.head_size_v = kSize;
  AttendArgs args;
  args.query = view_of(query.data(), {1, 4, kSize});
  args.cache.key = {cache.data(), DType::kF32, 4 * 2 * kSize, 2 * kSize, 2 * 2 * kSize};
  args.cache.value = args.cache.key;
  args.cache.value.data = cache.data() + kSize;
  args.cache.num_blocks = 3;
  args.cache.block_size = 2;
  std::vector<std::int32_t> starts{0, 1}, lens{3}, table{2, 0, 99}, dense_start{1};
  args.batch.num_seqs = args.batch.num_actual_tokens = 1;
  args.batch.query_start_loc = view_of(starts.data(), {2});
  args.batch.seq_lens = view_of(lens.data(), {1});
  args.batch.block_table = view_of(table.data(), {1, 3});
  for (int j = 0; j < 3; ++j) {
    for (int head = 0; head < 2; ++head) {
      const int page = j < 2 ? 2 : 0;
      float* row = cache.data() + ((page * 2 + head) * 2 + j % 2) * 2 * kSize;
      for (int d = 0; d < kSize; ++d) {
        row[d] = 0;
        row[kSize + d] = static_cast<float>(10 * head + j);
      }
    }
  }
  AttentionParams params;
  EXPECT_NEAR(reference_row(key, params, args, 0, 1).output[7], 1, 1e-6);
  EXPECT_NEAR(reference_row(key, params, args, 0, 2).output[0], 11, 1e-6);
  const std::vector<float> v_scale{1, 0, 0, 2};  // one per KV head, strided
  args.cache.v_scale = view_of(v_scale.data(), {2});
  args.cache.v_scale.strides[0] = 3;
  EXPECT_NEAR(reference_row(key, params, args, 0, 3).output[0], 22, 1e-6);
  // The same memory as dense tokens of one head: tokens 8 .. 10 are page 2's head 0 and 1.
  args.cache.dense = true;
  args.cache.v_scale = {};
  dense_start[0] = 8;
  args.batch.kv_start = view_of(dense_start.data(), {1});
  EXPECT_NEAR(reference_row(key, params, args, 0, 0).output[0], (0 + 1 + 10) / 3.0, 1e-6);
}

}  // namespace
}  // namespace diffkv::verify
