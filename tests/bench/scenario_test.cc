#include "bench/harness/scenario.h"

#include <gtest/gtest.h>

#include <set>
#include <string>

#include "diffkv/error.h"

namespace diffkv::bench {
namespace {

constexpr const char* kOne =
    R"({"scenarios": [{"name": "a", "batch": [{"query_len": 1, "seq_len": 8}]}]})";

// A file of one scenario with these fields beside its name and batch.
std::string with(const std::string& fields) {
  return R"({"scenarios": [{"name": "a", "batch": [{"query_len": 2, "seq_len": 8}], )" + fields +
         "}]}";
}

std::string with_batch(const std::string& batch) {
  return R"({"scenarios": [{"name": "a", "batch": )" + batch + "}]}";
}

void expect_refused(const std::string& text, const std::string& message) {
  try {
    parse_scenarios(text, "file.json");
    ADD_FAILURE() << "taken: " << text;
  } catch (const Error& error) {
    const std::string what = error.what();
    EXPECT_NE(what.find(message), std::string::npos) << text << "\ngot: " << what;
    EXPECT_NE(what.find("file.json"), std::string::npos) << what;
  }
}

TEST(Scenarios, DefaultsAreTheModels) {
  const Scenario s = parse_scenarios(kOne, "file.json").at(0);
  EXPECT_EQ(s.name, "a");
  EXPECT_EQ(s.num_heads, 64);
  EXPECT_EQ(s.num_kv_heads, 4);
  EXPECT_EQ(s.head_size_qk, 192);
  EXPECT_EQ(s.head_size_v, 128);
  EXPECT_EQ(s.block_size, 16);
  EXPECT_EQ(s.dtype, DType::kBF16);
  EXPECT_EQ(s.kv_dtype, DType::kBF16);
  EXPECT_EQ(s.soft_cap, 0);
  EXPECT_FALSE(s.alibi);
  EXPECT_EQ(s.layout, KvCacheLayout::kNHD);
  EXPECT_EQ(s.policy, SchedulePolicy::kBalanced);
  EXPECT_EQ(s.seqs, (std::vector<Seq>{{1, 8}}));
}

TEST(Scenarios, EveryFieldIsRead) {
  const Scenario s = parse_scenarios(with(R"("tags": ["x", "y"], "num_heads": 6, "num_kv_heads": 3,
        "head_size_qk": 96, "head_size_v": 64, "dtype": "fp16", "kv_dtype": "fp8_e5m2",
        "block_size": 0, "window": 5, "sinks": true, "soft_cap": 2.5, "alibi": true,
        "layout": "HND", "policy": "batch_invariant", "backend": "abacus")"),
                                     "file.json")
                         .at(0);
  EXPECT_EQ(s.tags, (std::vector<std::string>{"x", "y"}));
  EXPECT_EQ(s.num_heads, 6);
  EXPECT_EQ(s.num_kv_heads, 3);
  EXPECT_EQ(s.head_size_qk, 96);
  EXPECT_EQ(s.head_size_v, 64);
  EXPECT_EQ(s.dtype, DType::kF16);
  EXPECT_EQ(s.kv_dtype, DType::kE5M2);
  EXPECT_EQ(s.block_size, 0);
  EXPECT_EQ(s.window, 5);
  EXPECT_TRUE(s.sinks);
  EXPECT_EQ(s.soft_cap, 2.5F);
  EXPECT_TRUE(s.alibi);
  EXPECT_EQ(s.layout, KvCacheLayout::kHND);
  EXPECT_EQ(s.policy, SchedulePolicy::kBatchInvariant);
  EXPECT_EQ(s.backend, "abacus");
  EXPECT_EQ(s.key().mask.window, 5);
  EXPECT_EQ(s.key().value_dtype, DType::kE5M2);
}

TEST(Scenarios, ASoftCapIsAnyNumber) {
  EXPECT_EQ(parse_scenarios(with(R"("soft_cap": 30)"), "f").at(0).soft_cap, 30);
  EXPECT_EQ(parse_scenarios(with(R"("soft_cap": 0.25)"), "f").at(0).soft_cap, 0.25);
  EXPECT_EQ(parse_scenarios(with(R"("soft_cap": 0)"), "f").at(0).soft_cap, 0);
}

TEST(Scenarios, TheCacheHasTheLayersTypeUnlessItSaysElse) {
  EXPECT_EQ(parse_scenarios(with(R"("dtype": "fp32")"), "f").at(0).kv_dtype, DType::kF32);
}

TEST(Scenarios, RaggedBatchesVary) {
  const Scenario s = parse_scenarios(with_batch(R"([{"count": 3, "query_len": 1, "seq_len": 100,
                                                     "ragged": true},
                                                    {"query_len": 4, "seq_len": 4}])"),
                                     "f")
                         .at(0);
  EXPECT_EQ(s.seqs, (std::vector<Seq>{{1, 63}, {1, 87}, {1, 50}, {4, 4}}));
  EXPECT_EQ(s.num_tokens(), 7);
  EXPECT_EQ(s.max_seq_len(), 87);
}

TEST(Scenarios, BytesAndFlopsAreCounted) {
  Scenario s;
  s.num_heads = 4;
  s.num_kv_heads = 2;
  s.head_size_qk = 16;
  s.head_size_v = 8;
  s.seqs = {{2, 10}};
  EXPECT_EQ(s.kv_bytes(), 10 * 2 * 24 * 2);
  EXPECT_EQ(s.bytes(), s.kv_bytes() + 2 * 4 * 24 * 2);
  EXPECT_EQ(s.flops(), (9 + 10) * 4 * 2 * 24);
  // The first row sees keys 6 to 8, the second 7 to 9.
  s.window = 3;
  EXPECT_EQ(s.kv_bytes(), 4 * 2 * 24 * 2);
  EXPECT_EQ(s.flops(), (3 + 3) * 4 * 2 * 24);
  // A prompt's first rows see fewer keys than the window has.
  s.seqs = {{5, 5}};
  EXPECT_EQ(s.kv_bytes(), 5 * 2 * 24 * 2);
  EXPECT_EQ(s.flops(), (1 + 2 + 3 + 3 + 3) * 4 * 2 * 24);
  s.kv_dtype = DType::kE4M3;
  EXPECT_EQ(s.kv_bytes(), 5 * 2 * 24);
}

TEST(Scenarios, MalformedFilesAreRefused) {
  expect_refused("", "is not JSON");
  expect_refused("{", "is not JSON");
  expect_refused(with(R"("soft_cap": 1e400)"), "is not JSON");
  expect_refused("[]", "expected an object");
  expect_refused("{}", "has no \"scenarios\"");
  expect_refused(R"({"scenarios": []})", "expected a list of scenarios");
  expect_refused(R"({"scenarios": {}})", "expected a list of scenarios");
  expect_refused(R"({"scenarios": [3]})", "scenarios[0] is 3");
  expect_refused(R"({"scenarios": [{}]})", "scenarios[0] has no \"name\"");
  expect_refused(R"({"scenarios": [{"name": ""}]})", "empty name");
  expect_refused(R"({"scenarios": [{"name": 3}]})", "name is 3, expected a string");
  expect_refused(R"({"scenarios": [{"name": "a"}]})", "(\"a\") has no \"batch\"");
  expect_refused(R"({"scenarios": [1], "other": 2})", "has \"other\"");
}

TEST(Scenarios, MalformedFieldsAreRefused) {
  expect_refused(with(R"("num_head": 3)"), "(\"a\") has \"num_head\", expected one of");
  expect_refused(with(R"("num_heads": 3.5)"), "num_heads is 3.5, expected an integer");
  expect_refused(with(R"("num_heads": "3")"), "num_heads is \"3\", expected an integer");
  expect_refused(with(R"("num_heads": 0)"), "num_heads is 0, expected an integer from 1");
  expect_refused(with(R"("num_heads": 18446744073709551615)"), "expected an integer");
  expect_refused(with(R"("num_heads": 6)"), "num_heads is 6, expected a multiple of num_kv_heads");
  expect_refused(with(R"("head_size_v": 12)"), "192 and 12, expected multiples of 8");
  expect_refused(with(R"("window": -1)"), "window is -1");
  expect_refused(with(R"("sinks": 1)"), "sinks is 1, expected true or false");
  expect_refused(with(R"("alibi": "yes")"), "alibi is \"yes\", expected true or false");
  expect_refused(with(R"("layout": "hnd")"), "layout is \"hnd\", expected NHD or HND");
  expect_refused(with(R"("layout": true)"), "layout is true, expected a string");
  for (const std::string wrong : {"-1", "-0.5", "1e+39", "1e-39", "true", "null", "\"30\""}) {
    expect_refused(with(R"("soft_cap": )" + wrong),
                   "(\"a\"): soft_cap is " + wrong + ", expected 0 or a number");
  }
  expect_refused(with(R"("dtype": "fp4")"), "fp4");
  expect_refused(with(R"("dtype": "int32")"), "dtype is int32, expected fp32, fp16 or bf16");
  expect_refused(with(R"("dtype": 4)"), "dtype is 4, expected a string");
  expect_refused(with(R"("policy": "wild")"), "policy is \"wild\", expected balanced");
  expect_refused(with(R"("tags": "x")"), "tags is \"x\", expected a list of strings");
  expect_refused(with(R"("tags": [1])"), "tags is [1], expected a list of strings");
}

TEST(Scenarios, MalformedBatchesAreRefused) {
  expect_refused(with_batch("[]"), "batch is [], expected a list");
  expect_refused(with_batch("3"), "batch is 3, expected a list");
  expect_refused(with_batch("[3]"), "batch[0] is 3");
  expect_refused(with_batch(R"([{"seq_len": 3}])"), "batch[0] has no \"query_len\"");
  expect_refused(with_batch(R"([{"query_len": 3}])"), "batch[0] has no \"seq_len\"");
  expect_refused(with_batch(R"([{"query_len": 0, "seq_len": 3}])"), "query_len is 0");
  expect_refused(with_batch(R"([{"query_len": 4, "seq_len": 3}])"), "at least its 4 query rows");
  expect_refused(with_batch(R"([{"query_len": 1, "seq_len": 30, "ragged": true}])"), "-7 keys");
  expect_refused(with_batch(R"([{"query_len": 1, "seq_len": 3, "count": 0}])"), "count is 0");
  expect_refused(with_batch(R"([{"query_len": 1, "seq_len": 3, "len": 0}])"), "has \"len\"");
}

TEST(Scenarios, NamesAreUnique) {
  const std::string one = R"({"name": "a", "batch": [{"query_len": 1, "seq_len": 8}]})";
  expect_refused(R"({"scenarios": [)" + one + "," + one + "]}", "two of the name \"a\"");
}

TEST(Scenarios, TheBuiltInFileIsRight) {
  const std::vector<Scenario> all = parse_scenarios(embedded_scenarios(), "embedded");
  EXPECT_GE(all.size(), 20U);
  for (const Scenario& s : all) {
    EXPECT_EQ(s.head_size_qk, 192) << s.name;
    EXPECT_EQ(s.head_size_v, 128) << s.name;
    EXPECT_FALSE(s.tags.empty()) << s.name;
    // A result compares with one of another day by its bytes and flops.
    EXPECT_LT(s.kv_bytes(), s.backend.empty() ? 1e9 : 2e9) << s.name;
    EXPECT_GT(s.flops(), 0) << s.name;
  }
}

std::set<std::string> names(const std::vector<Scenario>& scenarios) {
  std::set<std::string> result;
  for (const Scenario& s : scenarios) result.insert(s.name);
  return result;
}

TEST(Scenarios, SelectionIsByNameOrTag) {
  std::vector<Scenario> all(3);
  all[0].name = "decode_1";
  all[0].tags = {"decode", "peer"};
  all[1].name = "decode_2";
  all[1].tags = {"decode"};
  all[2].name = "prefill";
  all[2].tags = {"peer"};
  EXPECT_EQ(names(select_scenarios(all, "", "")).size(), 3U);
  EXPECT_EQ(names(select_scenarios(all, "decode_*", "")),
            (std::set<std::string>{"decode_1", "decode_2"}));
  EXPECT_EQ(names(select_scenarios(all, "peer", "")),
            (std::set<std::string>{"decode_1", "prefill"}));
  EXPECT_EQ(names(select_scenarios(all, "decode_?", "")).size(), 2U);
  EXPECT_EQ(names(select_scenarios(all, "decode_[2-9]", "")), (std::set<std::string>{"decode_2"}));
  try {
    select_scenarios(all, "decode_", "");
    ADD_FAILURE();
  } catch (const Error& error) {
    const std::string what = error.what();
    EXPECT_NE(what.find("decode_1, decode_2, prefill"), std::string::npos) << what;
  }
}

TEST(Scenarios, SelectionIsForABackend) {
  std::vector<Scenario> all(3);
  all[0].name = "any";
  all[1].name = "one";
  all[1].backend = "cuda";
  all[2].name = "other";
  all[2].backend = "abacus";
  EXPECT_EQ(names(select_scenarios(all, "", "cuda")), (std::set<std::string>{"any", "one"}));
  EXPECT_EQ(names(select_scenarios(all, "o*", "cuda")), (std::set<std::string>{"one"}));
  EXPECT_EQ(names(select_scenarios(all, "", "")).size(), 3U);
  EXPECT_THROW(select_scenarios(all, "one", "abacus"), Error);
  all.erase(all.begin());
  EXPECT_THROW(select_scenarios(all, "", "cpu"), Error);
}

TEST(Scenarios, BatchesAreDescribed) {
  Scenario s;
  s.seqs = {{1, 100}, {1, 100}, {512, 2048}};
  EXPECT_EQ(describe_batch(s), "2x1/100 1x512/2048");
  s.seqs = {{1, 63}, {1, 87}};
  EXPECT_EQ(describe_batch(s), "2x1/<=87");
}

}  // namespace
}  // namespace diffkv::bench
