#include "verify/cases.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <string>
#include <vector>

namespace diffkv::verify {
namespace {

std::set<std::string> names_of(const std::vector<Case>& list) {
  std::set<std::string> names;
  for (const Case& c : list) names.insert(c.name);
  return names;
}

TEST(Cases, NamesAreUnique) {
  const std::vector<Case> full = cases(Suite::kFull);
  EXPECT_EQ(names_of(full).size(), full.size());
  EXPECT_GE(full.size(), 500U);
}

TEST(Cases, QuickIsAPartOfFullWithEveryFeature) {
  const std::set<std::string> full = names_of(cases(Suite::kFull));
  const std::vector<Case> quick = cases(Suite::kQuick);
  std::set<std::string> quick_features;
  for (const Case& c : quick) {
    EXPECT_TRUE(full.count(c.name)) << c.name;
    quick_features.insert(c.feature);
  }
  for (const std::string& feature : features()) {
    EXPECT_TRUE(quick_features.count(feature)) << feature;
  }
  EXPECT_LT(quick.size() * 3, full.size());
}

// What the contract offers, each asked of the quick suite.
TEST(Cases, QuickCoversTheContract) {
  const std::vector<Case> quick = cases(Suite::kQuick);
  const auto covered = [&](const char* what, auto predicate) {
    EXPECT_TRUE(std::any_of(quick.begin(), quick.end(), predicate)) << what;
  };
  for (const std::int64_t group : {1, 5, 16, 128}) {
    covered("group", [&](const Case& c) { return c.key.group() == group; });
  }
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16, DType::kE4M3}) {
    covered("query type", [&](const Case& c) { return c.key.query_dtype == dtype; });
    covered("stored type", [&](const Case& c) { return c.key.key_dtype == dtype; });
    covered("output type", [&](const Case& c) { return c.output_dtype == dtype; });
  }
  covered("e5m2", [](const Case& c) { return c.key.key_dtype == DType::kE5M2; });
  for (int i = 0; i <= static_cast<int>(CaseCache::kDense); ++i) {
    covered("cache", [&](const Case& c) { return c.cache == static_cast<CaseCache>(i); });
  }
  for (int i = 0; i <= static_cast<int>(CaseScale::kPerHeadStrided); ++i) {
    covered("scale", [&](const Case& c) { return c.scales == static_cast<CaseScale>(i); });
  }
  for (int i = 0; i <= static_cast<int>(CaseFlow::kMerge); ++i) {
    covered("flow", [&](const Case& c) { return c.flow == static_cast<CaseFlow>(i); });
  }
  for (const std::int64_t size : {1, 5, 13, 16, 32, 64, 100, 128}) {
    covered("block size", [&](const Case& c) { return c.block_size == size; });
  }
  covered("8", [](const Case& c) { return c.key.head_size_qk == 8 && c.key.head_size_v == 8; });
  covered("576", [](const Case& c) { return c.key.head_size_qk == 576; });
  covered("wide V", [](const Case& c) { return c.key.head_size_v == 576; });
  covered("two-sided window",
          [](const Case& c) { return !c.key.mask.causal && c.key.mask.window > 0; });
  covered("lookback", [](const Case& c) { return c.key.mask.chunk_lookback > 0; });
  covered("prefix window", [](const Case& c) { return c.key.mask.prefix_window > 0; });
  covered("clamp", [](const Case& c) { return c.key.mm_ranges && c.key.mask.clamp_mm_ranges; });
  covered("causal per sequence", [](const Case& c) { return c.key.causal_per_seq; });
  covered("both ALiBi forms", [](const Case& c) { return c.alibi && c.alibi_sqrt; });
  covered("bf16 bias", [](const Case& c) { return c.qq_bias && c.qq_bias_dtype == DType::kBF16; });
  covered("bias masks", [](const Case& c) { return c.qq_bias && c.qq_bias_masks; });
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    covered("sinks", [&](const Case& c) { return c.sinks == dtype && c.sinks_none; });
  }
  covered("sinks out", [](const Case& c) { return c.sink_mode == SinkMode::kOut && c.lse; });
  covered("invariant",
          [](const Case& c) { return c.key.policy == SchedulePolicy::kBatchInvariant; });
  covered("16k keys", [](const Case& c) { return c.seqs[0].seq_len >= 16000; });
  covered("nothing", [](const Case& c) {
    return std::any_of(c.seqs.begin(), c.seqs.end(),
                       [](const SeqShape& s) { return s.query_len > s.seq_len && !s.seq_len; });
  });
  covered("fewer actual tokens", [](const Case& c) { return c.actual_delta < 0; });
  covered("more actual tokens", [](const Case& c) { return c.actual_delta > 0; });
}

TEST(Cases, ShapesAreLegal) {
  for (const Case& c : cases(Suite::kFull)) {
    EXPECT_EQ(c.key.num_heads % c.key.num_kv_heads, 0) << c.name;
    for (const std::int64_t size : {c.key.head_size_qk, c.key.head_size_v}) {
      EXPECT_TRUE(size >= 8 && size <= 576 && size % 8 == 0) << c.name;
    }
    EXPECT_LE(c.actual_delta, c.extra_rows) << c.name;
    EXPECT_EQ(c.output_scale, c.output_dtype == DType::kE4M3) << c.name;
    EXPECT_FALSE(c.feature.empty());
  }
}

}  // namespace
}  // namespace diffkv::verify
