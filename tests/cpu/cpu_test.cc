// The CPU kernels where their two paths, long sums and odd numbers meet; on every SIMD target.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/dtype.h"
#include "cpu/amx.h"
#include "cpu/bf16_dot.h"
#include "cpu/kernels.h"
#include "cpu/processor.h"
#include "cpu/targets.h"
#include "diffkv/layer.h"

namespace diffkv {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Sizes {
  std::int64_t qk = 0;
  std::int64_t v = 0;
};

// As elements of `dtype`.
std::vector<std::byte> elements_of(const std::vector<float>& from, DType dtype) {
  const auto n = static_cast<std::int64_t>(from.size());
  std::vector<std::byte> to(static_cast<std::size_t>(n * size_of(dtype)));
  core::store_row(dtype, from.data(), n, to.data());
  return to;
}

// One sequence over dense keys and values, `heads` query heads on one KV head.
struct Dense {
  Sizes sizes;
  std::int64_t query_len;
  std::int64_t seq_len;
  std::int64_t heads;
  std::int32_t threads = 0;  // 0: all
  std::vector<float> key, value, query, output, lse;
  AttentionParams params;
  PlanKey plan_key;

  // Queries, keys, values and outputs are handed over as these.
  void use(DType dtype) {
    plan_key.query_dtype = plan_key.key_dtype = plan_key.value_dtype = dtype;
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
    DiffKVMetadataBuilder builder(
        backend, plan_key,
        {.max_tokens = query_len, .max_seqs = 1, .max_seq_len = seq_len, .threads = threads});
    const DiffKVMetadata metadata = builder.build(batch);
    DiffKVAttention::ForwardArgs args;
    const DType dtype = plan_key.query_dtype;
    const std::vector<std::byte> queries = elements_of(query, dtype);
    const std::vector<std::byte> keys = elements_of(key, dtype);
    const std::vector<std::byte> values = elements_of(value, dtype);
    std::vector<std::byte> outputs = elements_of(output, dtype);
    args.query = ConstTensorView(queries.data(), dtype, {query_len, heads, sizes.qk});
    args.key = ConstTensorView(keys.data(), dtype, {seq_len, 1, sizes.qk});
    args.value = ConstTensorView(values.data(), dtype, {seq_len, 1, sizes.v});
    args.output = TensorView(outputs.data(), dtype, {query_len, heads, sizes.v});
    args.lse = view_of(lse.data(), {heads, query_len});
    args.metadata = &metadata;
    DiffKVAttention(backend, plan_key, params, dtype).forward(args);
    for (std::size_t i = 0; i < output.size(); ++i) {
      output[i] = core::load_element(dtype, outputs.data(), static_cast<std::int64_t>(i));
    }
  }
};

constexpr std::pair<DType, std::int64_t> kDTypesAndHeads[] = {
    {DType::kF32, 1},  {DType::kF32, 5},   {DType::kF32, 8}, {DType::kF32, 12}, {DType::kBF16, 1},
    {DType::kBF16, 5}, {DType::kBF16, 12}, {DType::kF16, 1}, {DType::kF16, 5},  {DType::kF16, 12}};

class CpuTest : public testing::TestWithParam<std::tuple<std::string, Sizes, bool>> {
 protected:
  static std::string target() { return std::get<0>(GetParam()); }
  static Sizes sizes() { return std::get<1>(GetParam()); }
  static bool tuned() { return std::get<2>(GetParam()); }

  void SetUp() override {
    cpu::set_target(target());
    cpu::set_tuning(cpu::Tuning{.row_blocks = tuned(), .near_fetch = tuned()});
  }
  void TearDown() override {
    cpu::set_target("");
    cpu::set_tuning({});
  }
};

// Sums of like terms round the same way every time; folding keeps that from growing with length.
TEST_P(CpuTest, LongSmoothSums) {
  for (std::int64_t heads : {1, 12}) {  // the narrow and the wide path
    Dense dense(sizes(), 1, 300000, heads);
    dense.threads = 1;
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

// 16-bit sums over many folds, whose maxima differ from row to row, of values that differ from
// column to column.
TEST_P(CpuTest, LongSumsOfManyRows) {
  constexpr std::int64_t kKeys = 40000;
  constexpr std::int64_t kFold = cpu::kFoldBlocks * cpu::kBlockKeys;
  // Keys of the same parity and fold are alike.
  const auto value_of = [](std::int64_t k, std::int64_t c) {
    const std::int64_t fold = k / kFold;
    return (k % 2 == 0 ? 1.0F + 0.125F * static_cast<float>(c % 8) : 2.0F) +
           0.25F * static_cast<float>(fold % 4);
  };
  for (const auto& [dtype, error] : {std::pair(DType::kBF16, 8e-3), std::pair(DType::kF16, 1e-3)}) {
    for (std::int64_t heads : {12, 40}) {
      Dense dense(sizes(), 1, kKeys, heads);
      dense.use(dtype);
      dense.threads = 1;  // a share is then several folds long
      dense.params.scale = 1.0F;
      for (std::int64_t k = 0; k < kKeys; ++k) {
        float* key = &dense.key[static_cast<std::size_t>(k * sizes().qk)];
        key[0] = k % 2 == 0 ? 1.0F : -1.0F;
        key[1] = 0.0625F * static_cast<float>(k / kFold);
        for (std::int64_t c = 0; c < sizes().v; ++c) {
          dense.value[static_cast<std::size_t>(k * sizes().v + c)] = value_of(k, c);
        }
      }
      for (std::int64_t r = 0; r < heads; ++r) {
        float* query = &dense.query[static_cast<std::size_t>(r * sizes().qk)];
        query[0] = 0.25F * static_cast<float>(r % 4);
        query[1] = static_cast<float>(r % 3 - 1);
      }
      dense.run();
      for (std::int64_t r = 0; r < heads; ++r) {
        double sum = 0;
        std::vector<double> sums(static_cast<std::size_t>(sizes().v), 0.0);
        for (std::int64_t first = 0; first < kKeys; first += kFold) {
          for (std::int64_t k = first; k < first + 2; ++k) {
            const auto count = static_cast<double>(std::min(kFold, kKeys - first)) / 2;
            const auto* key = &dense.key[static_cast<std::size_t>(k * sizes().qk)];
            const auto* query = &dense.query[static_cast<std::size_t>(r * sizes().qk)];
            const double weight = count * std::exp(query[0] * key[0] + query[1] * key[1]);
            sum += weight;
            for (std::int64_t c = 0; c < sizes().v; ++c) {
              sums[static_cast<std::size_t>(c)] += weight * value_of(k, c);
            }
          }
        }
        EXPECT_NEAR(dense.lse[static_cast<std::size_t>(r)], std::log(sum), 1e-3) << r;
        for (std::int64_t c = 0; c < sizes().v; ++c) {
          const double expected = sums[static_cast<std::size_t>(c)] / sum;
          EXPECT_NEAR(dense.output[static_cast<std::size_t>(r * sizes().v + c)] / expected, 1.0,
                      error)
              << "row " << r << " column " << c;
        }
      }
    }
  }
}

// Zero keys give equal weights, so a row's output is the mean of what it sees: 1. Tiles of many
// tokens, and of three: of 5 heads these are a decode tile.
TEST_P(CpuTest, WhatHiddenSlotsHoldChangesNoBit) {
  for (const auto& [dtype, heads] : kDTypesAndHeads) {
    for (std::int64_t query_len : {3, 40}) {
      Dense clean(sizes(), query_len, 200, heads);
      clean.use(dtype);
      clean.plan_key.mask.window = 50;
      for (std::size_t i = 0; i < clean.value.size(); ++i) {
        clean.value[i] = 1.0F + 0.37F * static_cast<float>(i % 11);
      }
      Dense poisoned = clean;
      // Row i sees keys from 151 - query_len + i on: this one is seen by the first two.
      const std::int64_t hidden = 151 - query_len + 1;
      for (std::int64_t c = 0; c < sizes().v; ++c) {
        poisoned.value[static_cast<std::size_t>(hidden * sizes().v + c)] = std::nanf("");
      }
      clean.run();
      poisoned.run();
      for (std::int64_t i = 0; i < query_len; ++i) {
        for (std::int64_t at = i * heads * sizes().v; at < (i + 1) * heads * sizes().v; ++at) {
          const auto n = static_cast<std::size_t>(at);
          if (i > 1) {
            EXPECT_EQ(std::memcmp(&clean.output[n], &poisoned.output[n], sizeof(float)), 0) << i;
          } else {
            EXPECT_TRUE(std::isnan(poisoned.output[n])) << i;
          }
        }
      }
    }
  }
}

// A visible key of score -inf takes part: its NaN value shows, whatever shape the tile has.
TEST_P(CpuTest, NanBehindAScoreOfMinusInfinity) {
  for (const auto& [dtype, heads] : kDTypesAndHeads) {
    for (std::int64_t query_len : {1, 3, 30}) {
      Dense dense(sizes(), query_len, 100, heads);
      dense.use(dtype);
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

// Some infinite element among finite ones stays one: nothing it is multiplied with on the way is
// zero but for a zero of the input.
TEST_P(CpuTest, InfiniteQueriesAndValues) {
  for (const auto& [dtype, heads] : kDTypesAndHeads) {
    for (std::int64_t query_len : {1, 3, 30}) {
      Dense clean(sizes(), query_len, 101, heads);
      clean.use(dtype);
      clean.plan_key.mask.causal = false;
      for (std::size_t i = 0; i < clean.key.size(); ++i) {
        clean.key[i] = 1.0F + 0.25F * static_cast<float>(i % 5);
      }
      Dense dense = clean;
      // Rows that see nothing, for a score of -inf: the first one, one of another sixteen and one
      // of a tile's other group of rows.
      std::vector<bool> blind(dense.lse.size());
      for (std::size_t row : {0, 21, 60}) {
        if (row >= blind.size()) continue;
        blind[row] = true;
        dense.query[row * static_cast<std::size_t>(sizes().qk)] = -kInf;
      }
      for (std::int64_t key : {70, 100}) {
        for (std::int64_t c = 1; c < sizes().v; c += 2) {
          dense.value[static_cast<std::size_t>(key * sizes().v + c)] = kInf;
        }
      }
      clean.run();
      dense.run();
      for (std::size_t i = 0; i < dense.output.size(); ++i) {
        const auto column = static_cast<std::int64_t>(i) % sizes().v;
        const bool sees_none = blind[i / static_cast<std::size_t>(sizes().v)];
        const float expected = sees_none ? 0.0F : column % 2 != 0 ? kInf : clean.output[i];
        EXPECT_EQ(dense.output[i], expected) << heads << " " << query_len;
      }
      for (std::size_t row = 0; row < blind.size(); ++row) {
        const auto heads_in_row = static_cast<std::size_t>(heads);
        const std::size_t at =
            row % heads_in_row * static_cast<std::size_t>(query_len) + row / heads_in_row;
        EXPECT_EQ(dense.lse[at], blind[row] ? -kInf : clean.lse[at]) << heads << " " << query_len;
      }
    }
  }
}

// Numbers that fp16 holds and bf16 does not.
TEST_P(CpuTest, Fp16KeepsItsBits) {
  for (std::int64_t heads : {1, 12, 16}) {
    for (std::int64_t query_len : {1, 3, 30}) {
      Dense dense(sizes(), query_len, 1, heads);
      dense.use(DType::kF16);
      dense.plan_key.mask.causal = false;
      std::fill(dense.query.begin(), dense.query.end(), 1.0F + 0x1p-10F);
      std::fill(dense.key.begin(), dense.key.end(), 1.0F - 0x1p-11F);
      std::fill(dense.value.begin(), dense.value.end(), 1.0F + 0x1p-10F);
      dense.run();
      const auto n = static_cast<double>(sizes().qk);
      const double expected = n * (1 + 0x1p-10) * (1 - 0x1p-11);
      for (float x : dense.lse) EXPECT_NEAR(x, expected, 1e-6 * n) << heads << " " << query_len;
      for (float x : dense.output) EXPECT_EQ(x, 1.0F + 0x1p-10F) << heads << " " << query_len;
    }
  }
}

// Weights 1 and p = 2^(-1/3) on values that cancel if p is rounded to bf16, as it is where, and
// only where, pairs of bf16 are multiplied. The sum of the weights, and so lse, is never rounded.
TEST_P(CpuTest, OnlyProductsOfBf16RoundWeights) {
  const double p = std::exp2(-1.0 / 3);  // bits 3f4b2ff5
  const float rounded = 0.79296875F;     // bits 3f4b0000
  const bool by_amx =
      target() == "AVX3_AMX" && cpu::amx_permitted() && cpu::amx_multiplies(sizes().qk, sizes().v);
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (std::int64_t heads : {1, 2, 4, 8, 16, 40}) {
      for (std::int64_t query_len : {1, 7}) {
        Dense dense(sizes(), query_len, 2, heads);
        dense.use(dtype);
        dense.plan_key.mask.causal = false;
        dense.params.scale = static_cast<float>(-std::log(2.0) / 3);
        dense.key[sizes().qk] = 1.0F;  // its score is scale, the other's 0
        for (std::int64_t c = 0; c < sizes().v; ++c) {
          dense.value[static_cast<std::size_t>(c)] = rounded;
          dense.value[static_cast<std::size_t>(sizes().v + c)] = -1.0F;
        }
        dense.run();
        const bool in_pairs = target() == "AVX3_BF16" || target() == "AVX3_AMX";
        // No tile of these has a rest of few rows.
        const std::int64_t rows = heads * query_len;
        const bool rounds =
            dtype == DType::kBF16 && in_pairs &&
            (cpu::bf16_dot_is_fast() || rows <= 4 || (by_amx && rows > cpu::kNarrowRows));
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

// 8/24 fill no vector of the widest targets, 32/48 whole tiles of the matrix unit, 40/40 a vector
// and a part; with blocks of rows and without, whatever suits the processor.
INSTANTIATE_TEST_SUITE_P(
    Targets, CpuTest,
    testing::Combine(testing::ValuesIn(cpu::supported_targets()),
                     testing::Values(Sizes{8, 24}, Sizes{32, 48}, Sizes{40, 40}), testing::Bool()),
    [](const auto& test) {
      const Sizes sizes = std::get<1>(test.param);
      return std::get<0>(test.param) + "_" + std::to_string(sizes.qk) + "x" +
             std::to_string(sizes.v) + (std::get<2>(test.param) ? "_rows" : "_lanes");
    });

}  // namespace
}  // namespace diffkv
