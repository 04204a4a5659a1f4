// The CPU kernels where their two paths, long sums and odd numbers meet; on every SIMD target.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/targets.h"
#include "diffkv/layer.h"

namespace diffkv {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Sizes {
  std::int64_t qk = 0;
  std::int64_t v = 0;
};

// The upper half of a float, for numbers that fit.
std::vector<std::uint16_t> bf16_of(const std::vector<float>& from) {
  std::vector<std::uint16_t> to(from.size());
  for (std::size_t i = 0; i < from.size(); ++i) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, &from[i], sizeof(bits));
    to[i] = static_cast<std::uint16_t>(bits >> 16);
  }
  return to;
}

// One sequence over dense keys and values, `heads` query heads on one KV head.
struct Dense {
  Sizes sizes;
  std::int64_t query_len;
  std::int64_t seq_len;
  std::int64_t heads;
  std::vector<float> key, value, query, output, lse;
  AttentionParams params;
  PlanKey plan_key;

  // Queries, keys and values are handed over as bf16, cut off after its 8 bits.
  void use_bf16() {
    plan_key.query_dtype = plan_key.key_dtype = plan_key.value_dtype = DType::kBF16;
  }

  Dense(Sizes of, std::int64_t query_len_in, std::int64_t seq_len_in, std::int64_t heads_in)
      : sizes(of),
        query_len(query_len_in),
        seq_len(seq_len_in),
        heads(heads_in),
        key(static_cast<std::size_t>(seq_len * sizes.qk), 0.0F),
        value(static_cast<std::size_t>(seq_len * sizes.v), 1.0F),
        query(static_cast<std::size_t>(query_len * heads * sizes.qk), 1.0F),
        output(static_cast<std::size_t>(query_len * heads * sizes.v)),
        lse(static_cast<std::size_t>(query_len * heads)) {
    plan_key.num_heads = heads;
    plan_key.num_kv_heads = 1;
    plan_key.head_size_qk = sizes.qk;
    plan_key.head_size_v = sizes.v;
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
    const std::vector<std::uint16_t> query16 = bf16_of(query);
    const std::vector<std::uint16_t> key16 = bf16_of(key);
    const std::vector<std::uint16_t> value16 = bf16_of(value);
    const auto view = [&](const std::vector<float>& wide, const std::vector<std::uint16_t>& narrow,
                          std::int64_t rows, std::int64_t row_heads, std::int64_t size) {
      const void* data = plan_key.query_dtype == DType::kBF16
                             ? static_cast<const void*>(narrow.data())
                             : wide.data();
      return ConstTensorView(data, plan_key.query_dtype, {rows, row_heads, size});
    };
    args.query = view(query, query16, query_len, heads, sizes.qk);
    args.key = view(key, key16, seq_len, 1, sizes.qk);
    args.value = view(value, value16, seq_len, 1, sizes.v);
    std::vector<std::uint16_t> output16(output.size());
    const bool is_bf16 = plan_key.query_dtype == DType::kBF16;
    void* to = is_bf16 ? static_cast<void*>(output16.data()) : output.data();
    args.output = TensorView(to, plan_key.query_dtype, {query_len, heads, sizes.v});
    args.lse = view_of(lse.data(), {heads, query_len});
    args.metadata = &metadata;
    DiffKVAttention(backend, plan_key, params, plan_key.query_dtype).forward(args);
    for (std::size_t i = 0; is_bf16 && i < output.size(); ++i) {
      const std::uint32_t bits = std::uint32_t{output16[i]} << 16;
      std::memcpy(&output[i], &bits, sizeof(bits));
    }
  }
};

class CpuTest : public testing::TestWithParam<std::tuple<std::string, Sizes>> {
 protected:
  static std::string target() { return std::get<0>(GetParam()); }
  static Sizes sizes() { return std::get<1>(GetParam()); }

  void SetUp() override { cpu::set_target(target()); }
  void TearDown() override { cpu::set_target(""); }
};

// Sums of like terms round the same way every time; folding keeps that from growing with length.
TEST_P(CpuTest, LongSmoothSums) {
  for (std::int64_t heads : {1, 12}) {  // the narrow and the wide path
    Dense dense(sizes(), 1, 300000, heads);
    double mean = 0;
    for (std::int64_t k = 0; k < dense.seq_len; ++k) {
      const float x = 1.0F + 0.01F * static_cast<float>(k % 64);
      for (std::int64_t c = 0; c < sizes().v; ++c) {
        dense.value[static_cast<std::size_t>(k * sizes().v + c)] = x;
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
  for (std::int64_t heads : {1, 5, 8, 12, -1, -12}) {
    Dense clean(sizes(), 40, 200, std::abs(heads));
    if (heads < 0) clean.use_bf16();
    heads = std::abs(heads);
    clean.plan_key.mask.window = 50;
    for (std::size_t i = 0; i < clean.value.size(); ++i) {
      clean.value[i] = 1.0F + 0.37F * static_cast<float>(i % 11);
    }
    Dense poisoned = clean;
    // Row i sees keys from 111 + i on: those below 150 are hidden from some row, seen by others.
    for (std::int64_t c = 0; c < sizes().v; ++c) {
      poisoned.value[static_cast<std::size_t>(120 * sizes().v + c)] = std::nanf("");
    }
    clean.run();
    poisoned.run();
    for (std::int64_t i = 0; i < 40; ++i) {
      for (std::int64_t at = i * heads * sizes().v; at < (i + 1) * heads * sizes().v; ++at) {
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
  for (std::int64_t heads : {1, 5, 8, 12, -1, -12}) {
    for (std::int64_t query_len : {1, 3, 30}) {
      Dense dense(sizes(), query_len, 100, std::abs(heads));
      if (heads < 0) dense.use_bf16();
      dense.key[0] = -kInf;
      for (std::int64_t c = 0; c < sizes().v; ++c) {
        dense.value[static_cast<std::size_t>(c)] = std::nanf("");
      }
      dense.run();
      for (float x : dense.output) EXPECT_TRUE(std::isnan(x)) << heads << " " << query_len;
      for (float x : dense.lse) EXPECT_FALSE(std::isnan(x)) << heads << " " << query_len;
    }
  }
}

// Weights 1 and p = 2^(-1/3) on values that cancel if p is rounded to bf16, as it is where, and
// only where, pairs of bf16 are multiplied. The sum of the weights, and so lse, is never rounded.
TEST_P(CpuTest, OnlyTheBf16TargetRoundsWeights) {
  const double p = std::exp2(-1.0 / 3);  // bits 3f4b2ff5
  const float rounded = 0.79296875F;     // bits 3f4b0000
  for (const bool is_bf16 : {false, true}) {
    for (std::int64_t heads : {1, 2, 4, 8, 16, 40}) {
      for (std::int64_t query_len : {1, 7}) {
        Dense dense(sizes(), query_len, 2, heads);
        if (is_bf16) dense.use_bf16();
        dense.plan_key.mask.causal = false;
        dense.params.scale = static_cast<float>(-std::log(2.0) / 3);
        dense.key[sizes().qk] = 1.0F;  // its score is scale, the other's 0
        for (std::int64_t c = 0; c < sizes().v; ++c) {
          dense.value[static_cast<std::size_t>(c)] = rounded;
          dense.value[static_cast<std::size_t>(sizes().v + c)] = -1.0F;
        }
        dense.run();
        const bool rounds = is_bf16 && (target() == "AVX3_BF16" || target() == "AVX3_AMX");
        const double expected = rounds ? 0.0 : (rounded - p) / (1 + p);
        for (float x : dense.output) EXPECT_NEAR(x, expected, 2e-6) << heads << " heads";
        for (float x : dense.lse) EXPECT_NEAR(x, std::log(1 + p), 1e-6) << heads << " heads";
      }
    }
  }
}

TEST_P(CpuTest, SinksOfInfinityAndNan) {
  for (std::int64_t heads : {1, 12}) {
    for (std::int64_t seq_len : {0, 70}) {
      Dense dense(sizes(), 1, seq_len, heads);
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

// 8/24 fill no vector of the widest targets, 32/48 whole tiles of the matrix unit.
INSTANTIATE_TEST_SUITE_P(Targets, CpuTest,
                         testing::Combine(testing::ValuesIn(cpu::supported_targets()),
                                          testing::Values(Sizes{8, 24}, Sizes{32, 48})),
                         [](const auto& test) {
                           const Sizes sizes = std::get<1>(test.param);
                           return std::get<0>(test.param) + "_" + std::to_string(sizes.qk) + "x" +
                                  std::to_string(sizes.v);
                         });

}  // namespace
}  // namespace diffkv
