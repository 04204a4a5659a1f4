// The CPU kernels where their two paths, long sums and odd numbers meet; on every SIMD target.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "cpu/targets.h"
#include "diffkv/layer.h"

namespace diffkv {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr std::int64_t kSizeQk = 8;
constexpr std::int64_t kSizeV = 24;

// One sequence over dense fp32 keys and values, `heads` query heads on one KV head.
struct Dense {
  std::int64_t query_len;
  std::int64_t seq_len;
  std::int64_t heads;
  std::vector<float> key, value, query, output, lse;
  AttentionParams params;
  PlanKey plan_key;

  Dense(std::int64_t query_len_in, std::int64_t seq_len_in, std::int64_t heads_in)
      : query_len(query_len_in),
        seq_len(seq_len_in),
        heads(heads_in),
        key(static_cast<std::size_t>(seq_len * kSizeQk), 0.0F),
        value(static_cast<std::size_t>(seq_len * kSizeV), 1.0F),
        query(static_cast<std::size_t>(query_len * heads * kSizeQk), 1.0F),
        output(static_cast<std::size_t>(query_len * heads * kSizeV)),
        lse(static_cast<std::size_t>(query_len * heads)) {
    plan_key.num_heads = heads;
    plan_key.num_kv_heads = 1;
    plan_key.head_size_qk = kSizeQk;
    plan_key.head_size_v = kSizeV;
    plan_key.query_dtype = plan_key.key_dtype = plan_key.value_dtype = DType::kF32;
  }

  void run() {
    const DiffKVBackend backend("cpu");
    const std::vector<std::int32_t> starts{0, static_cast<std::int32_t>(query_len)};
    const std::vector<std::int32_t> lens{static_cast<std::int32_t>(seq_len)};
    const std::vector<std::int32_t> kv_start{0};
    Batch batch;
    batch.num_seqs = 1;
    batch.num_actual_tokens = query_len;
    batch.query_start_loc = view_of(starts.data(), {2});
    batch.seq_lens = view_of(lens.data(), {1});
    batch.kv_start = view_of(kv_start.data(), {1});
    DiffKVMetadataBuilder builder(backend, plan_key,
                                  {.max_tokens = query_len, .max_seqs = 1, .max_seq_len = seq_len});
    const DiffKVMetadata metadata = builder.build(batch);
    DiffKVAttention::ForwardArgs args;
    args.query = view_of(query.data(), {query_len, heads, kSizeQk});
    args.key = view_of(key.data(), {seq_len, 1, kSizeQk});
    args.value = view_of(value.data(), {seq_len, 1, kSizeV});
    args.output = view_of(output.data(), {query_len, heads, kSizeV});
    args.lse = view_of(lse.data(), {heads, query_len});
    args.metadata = &metadata;
    DiffKVAttention(backend, plan_key, params, DType::kF32).forward(args);
  }
};

class CpuTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { cpu::set_target(GetParam()); }
  void TearDown() override { cpu::set_target(""); }
};

// Sums of like terms round the same way every time; folding keeps that from growing with length.
TEST_P(CpuTest, LongSmoothSums) {
  for (std::int64_t heads : {1, 12}) {  // the narrow and the wide path
    Dense dense(1, 300000, heads);
    double mean = 0;
    for (std::int64_t k = 0; k < dense.seq_len; ++k) {
      const float x = 1.0F + 0.01F * static_cast<float>(k % 64);
      for (std::int64_t c = 0; c < kSizeV; ++c) {
        dense.value[static_cast<std::size_t>(k * kSizeV + c)] = x;
      }
      mean += x / static_cast<double>(dense.seq_len);
    }
    dense.run();
    for (float x : dense.output) EXPECT_NEAR(x / mean, 1.0, 5e-6) << heads << " heads";
    for (float x : dense.lse) EXPECT_NEAR(x, std::log(300000.0), 1e-5) << heads << " heads";
  }
}

// Zero keys give equal weights, so a row's output is the mean of what it sees: 1.
TEST_P(CpuTest, WhatHiddenSlotsHoldChangesNoBit) {
  for (std::int64_t heads : {1, 8, 12}) {
    Dense clean(40, 200, heads);
    clean.plan_key.mask.window = 50;
    for (std::size_t i = 0; i < clean.value.size(); ++i) {
      clean.value[i] = 1.0F + 0.37F * static_cast<float>(i % 11);
    }
    Dense poisoned = clean;
    // Row i sees keys from 111 + i on: those below 150 are hidden from some row, seen by others.
    for (std::int64_t c = 0; c < kSizeV; ++c) {
      poisoned.value[static_cast<std::size_t>(120 * kSizeV + c)] = std::nanf("");
    }
    clean.run();
    poisoned.run();
    for (std::int64_t i = 0; i < 40; ++i) {
      for (std::int64_t at = i * heads * kSizeV; at < (i + 1) * heads * kSizeV; ++at) {
        const auto n = static_cast<std::size_t>(at);
        if (111 + i > 120) {
          EXPECT_EQ(std::memcmp(&clean.output[n], &poisoned.output[n], sizeof(float)), 0) << i;
        } else {
          EXPECT_TRUE(std::isnan(poisoned.output[n])) << i;
        }
      }
    }
  }
}

// A visible key of score -inf takes part: its NaN value shows, whatever shape the tile has.
TEST_P(CpuTest, NanBehindAScoreOfMinusInfinity) {
  for (std::int64_t heads : {1, 8, 12}) {
    for (std::int64_t query_len : {1, 3, 30}) {
      Dense dense(query_len, 100, heads);
      dense.key[0] = -kInf;
      for (std::int64_t c = 0; c < kSizeV; ++c) {
        dense.value[static_cast<std::size_t>(c)] = std::nanf("");
      }
      dense.run();
      for (float x : dense.output) EXPECT_TRUE(std::isnan(x)) << heads << " " << query_len;
      for (float x : dense.lse) EXPECT_FALSE(std::isnan(x)) << heads << " " << query_len;
    }
  }
}

TEST_P(CpuTest, SinksOfInfinityAndNan) {
  for (std::int64_t heads : {1, 12}) {
    for (std::int64_t seq_len : {0, 70}) {
      Dense dense(1, seq_len, heads);
      const std::vector<float> infinite(static_cast<std::size_t>(heads), kInf);
      dense.params.sinks = view_of(infinite.data(), {heads});
      dense.run();
      for (float x : dense.output) EXPECT_EQ(x, 0.0F);
      for (float x : dense.lse) EXPECT_EQ(x, kInf);
      const std::vector<float> nan(static_cast<std::size_t>(heads), std::nanf(""));
      dense.params.sinks = view_of(nan.data(), {heads});
      dense.run();
      for (float x : dense.output) EXPECT_TRUE(std::isnan(x)) << seq_len;
      for (float x : dense.lse) EXPECT_TRUE(std::isnan(x)) << seq_len;
    }
  }
}

// fp16 signalling NaNs become the same quiet ones on every target.
TEST_P(CpuTest, CacheBytesOfSignallingNans) {
  std::vector<std::uint16_t> from(8, 0x7c01);
  std::vector<float> cache(16);
  const KvCacheSpec spec{.block_size = 1,
                         .num_kv_heads = 1,
                         .head_size_qk = 8,
                         .head_size_v = 8,
                         .dtype = DType::kF32};
  const std::vector<std::int64_t> slots{0};
  const ConstTensorView rows(from.data(), DType::kF16, {1, 1, 8});
  update_cache(find_backend("cpu"), rows, rows, spec.view(cache.data(), 1),
               view_of(slots.data(), {1}));
  for (float x : cache) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, &x, sizeof(bits));
    EXPECT_EQ(bits, 0x7fc02000U);
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, CpuTest, testing::ValuesIn(cpu::supported_targets()),
                         [](const auto& target) { return target.param; });

}  // namespace
}  // namespace diffkv
