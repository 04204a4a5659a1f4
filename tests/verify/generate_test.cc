#include "verify/generate.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "verify/codec.h"
#include "verify/indices.h"
#include "verify/rows.h"

namespace diffkv::verify {
namespace {

Case find_case(const std::string& name) {
  for (const Case& c : cases(Suite::kFull)) {
    if (c.name == name) return c;
  }
  throw std::runtime_error("no case " + name);
}

std::byte* bytes_of(const TensorView& view) { return static_cast<std::byte*>(view.data); }

// Does the update that the problem asks for, by the reference.
void bring_tokens(GeneratedProblem& problem) {
  reference_update(problem.new_key(), problem.new_value(), problem.args().cache,
                   problem.slot_mapping());
}

TEST(GuardedBuffer, NoticesAByteOnEitherSide) {
  GuardedBuffer memory("thing", 40, 8);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(memory.data()) % 64, 8U);
  EXPECT_EQ(memory.guard_damage(), "");
  memory.data()[39] = std::byte{1};
  EXPECT_EQ(memory.guard_damage(), "");
  for (const std::int64_t at : {-256, -1, 40, 295}) {
    std::byte& guard = memory.data()[at];
    const std::byte was = guard;
    guard = ~was;
    EXPECT_NE(memory.guard_damage(), "") << at;
    guard = was;
  }
  EXPECT_EQ(memory.guard_damage(), "");
  memory.freeze();
  memory.data()[7] = std::byte{2};
  EXPECT_NE(memory.changed().find("thing: byte 7"), std::string::npos);
}

TEST(Generate, SameSeedSameProblem) {
  const Case c = find_case("window/window7_mixed_10heads");
  const GeneratedProblem a(c, 5), b(c, 5), other(c, 6);
  const CacheImage image = a.cache_image();
  EXPECT_EQ(image.pools, b.cache_image().pools);
  EXPECT_NE(image.pools, other.cache_image().pools);
}

TEST(Generate, UnreadableSlotsArePoisonAndReadableOnesAreNot) {
  for (const char* name : {"window/window7_mixed_10heads", "chunk/chunk16_chunked_2heads",
                           "layout/separate_16_bf16", "dense/encoder_bf16_8heads"}) {
    const GeneratedProblem problem(find_case(name), 1);
    const AttendArgs& args = problem.args();
    const std::int64_t dense_end = args.cache.dense ? args.cache.block_size : 0;
    // What some row sees, by (block, token).
    std::vector<bool> read(static_cast<std::size_t>(
        std::max(args.cache.num_blocks * args.cache.block_size, dense_end)));
    const auto index = [&](const KeyPlace& at) {
      return static_cast<std::size_t>(at.block * args.cache.block_size + at.token);
    };
    for (std::int64_t token = 0; token < problem.covered_tokens(); ++token) {
      const RowPlace place = place_row(args.batch, token);
      for (std::int64_t j = 0; j < place.seq_len; ++j) {
        if (!sees(problem.key().mask, args.batch, place, j)) continue;
        read[index(place_key(args.cache, args.batch, place.seq, j))] = true;
      }
    }
    std::int64_t poisoned = 0;
    for (const KvPlane* plane : {&args.cache.key, &args.cache.value}) {
      for (std::size_t i = 0; i < read.size(); ++i) {
        const auto at = static_cast<std::int64_t>(i);
        const double first = load(plane->data, plane->dtype,
                                  at / args.cache.block_size * plane->stride_block +
                                      at % args.cache.block_size * plane->stride_token);
        // Tokens of this step are readable but not yet there.
        if (!read[i]) {
          EXPECT_FALSE(std::isfinite(first)) << name << " slot " << i;
        }
        poisoned += std::isfinite(first) ? 0 : 1;
      }
    }
    EXPECT_GT(poisoned, 0) << name;
  }
}

TEST(Generate, BlockTableIsPermutedAndBadPastTheEnd) {
  const GeneratedProblem problem(find_case("block_size/nhd_5_bf16"), 1);
  const Batch& batch = problem.args().batch;
  std::vector<std::int64_t> pages;
  for (std::int64_t s = 0; s < batch.num_seqs; ++s) {
    const std::int64_t used = (index_at(batch.seq_lens, s) + 4) / 5;
    for (std::int64_t b = 0; b < batch.block_table.shape[1]; ++b) {
      const std::int64_t page = index_at(batch.block_table, s, b);
      if (b < used) {
        pages.push_back(page);
      } else {
        EXPECT_GE(page, problem.args().cache.num_blocks);
      }
    }
  }
  EXPECT_FALSE(std::is_sorted(pages.begin(), pages.end()));
  EXPECT_EQ(std::count(pages.begin(), pages.end(), 0), 0);
  std::sort(pages.begin(), pages.end());
  EXPECT_EQ(std::adjacent_find(pages.begin(), pages.end()), pages.end());
}

TEST(Generate, NullBlocksBelowTheWindow) {
  const GeneratedProblem problem(find_case("window/window7_mixed_10heads"), 1);
  const Batch& batch = problem.args().batch;
  EXPECT_EQ(index_at(batch.block_table, 0, 0), 0);
  EXPECT_EQ(check_index_tensors(problem.key(), problem.args(), problem.slot_mapping()), "");
}

TEST(Generate, NeitherZerosNorAnAveragePass) {
  GeneratedProblem problem(find_case("causal/decode_fp16_12heads"), 1);
  bring_tokens(problem);
  const Tolerance bounds = tolerance(problem.key(), DType::kF16);
  const auto wrong = [&] {
    const RowsCheck check =
        check_rows(problem.key(), problem.params(), problem.args(), bounds, 1LL << 40, 1);
    EXPECT_EQ(check.rows, 48);
    return check.wrong;
  };
  EXPECT_EQ(wrong(), 48);  // untouched: NaN
  const auto fill = [&](auto value_of) {
    for (std::int64_t token = 0; token < 4; ++token) {
      for (std::int64_t head = 0; head < 12; ++head) {
        const std::vector<double> row = value_of(token, head);
        for (std::int64_t d = 0; d < std::ssize(row); ++d) {
          store_bits(problem.args().output.data, DType::kF16, (token * 12 + head) * 32 + d,
                     encode(DType::kF16, row[static_cast<std::size_t>(d)], Overflow::kInfinity));
        }
        store_bits(
            problem.args().lse.data, DType::kF32, head * 4 + token,
            encode(DType::kF32,
                   reference_row(problem.key(), problem.params(), problem.args(), token, head).lse,
                   Overflow::kInfinity));
      }
    }
  };
  fill([](auto, auto) { return std::vector<double>(32, 0.0); });
  EXPECT_EQ(wrong(), 48);
  AttentionParams flat = problem.params();
  flat.scale = 0;
  fill([&](std::int64_t token, std::int64_t head) {
    return reference_row(problem.key(), flat, problem.args(), token, head).output;
  });
  EXPECT_EQ(wrong(), 36);  // all but those of the sequence of one key
  fill([&](std::int64_t token, std::int64_t head) {
    return reference_row(problem.key(), problem.params(), problem.args(), token, head).output;
  });
  EXPECT_EQ(wrong(), 0);
  bytes_of(problem.args().output)[2 * 32 * 17] ^= std::byte{0xff};
  EXPECT_EQ(wrong(), 1);
}

TEST(Generate, DamageIsNoticed) {
  GeneratedProblem problem(find_case("padding/mixed_actual-2"), 1);
  const AttendArgs& args = problem.args();
  EXPECT_EQ(problem.damage(), "");
  const auto check = [&](std::byte* at, const char* what) {
    const std::byte was = *at;
    *at = ~was;
    EXPECT_NE(problem.damage().find(what), std::string::npos) << problem.damage();
    *at = was;
    EXPECT_EQ(problem.damage(), "");
  };
  const std::int64_t row_bytes = args.output.strides[0] * 2;
  std::byte* output = bytes_of(args.output);
  output[3 * row_bytes] = std::byte{1};  // a covered row may change
  EXPECT_EQ(problem.damage(), "");
  check(output + problem.covered_tokens() * row_bytes, "output");
  check(output + args.output.shape[0] * row_bytes, "output");
  check(output - 1, "output");
  check(bytes_of(args.lse) + 4 * problem.covered_tokens(), "lse");
  check(static_cast<std::byte*>(args.cache.key.data) - 1, "cache");
  check(static_cast<std::byte*>(const_cast<void*>(args.query.data)), "query");
  check(static_cast<std::byte*>(const_cast<void*>(args.batch.seq_lens.data)), "seq_lens");
}

TEST(Generate, CacheDifferences) {
  GeneratedProblem problem(find_case("kv_dtype/fp32_in_fp16_mixed"), 1);
  CacheImage before = problem.cache_image();
  EXPECT_EQ(problem.cache_difference(before), "");
  CacheImage expected = problem.cache_image();
  reference_update(problem.new_key(), problem.new_value(), expected.view, problem.slot_mapping());
  EXPECT_NE(problem.cache_difference(expected), "");  // the update is still to come
  bring_tokens(problem);
  EXPECT_EQ(problem.cache_difference(expected), "");
  EXPECT_NE(problem.cache_difference(before), "");
  auto* bytes = static_cast<std::byte*>(problem.args().cache.key.data);
  bytes[0] ^= std::byte{1};  // page 0 is nobody's: even another NaN is a change
  EXPECT_NE(problem.cache_difference(expected), "");
}

TEST(Indices, BadValuesAreFound) {
  const GeneratedProblem problem(find_case("full/mixed_bf16_12heads"), 1);
  const auto what = [&](const ConstTensorView& view, std::int64_t at, auto bad) {
    auto* values = static_cast<decltype(bad)*>(const_cast<void*>(view.data));
    const auto was = std::exchange(values[at], bad);
    std::string message =
        check_index_tensors(problem.key(), problem.args(), problem.slot_mapping());
    values[at] = was;
    return message;
  };
  const Batch& batch = problem.args().batch;
  EXPECT_EQ(check_index_tensors(problem.key(), problem.args(), problem.slot_mapping()), "");
  EXPECT_NE(what(batch.query_start_loc, 0, 1).find("query_start_loc[0]"), std::string::npos);
  EXPECT_NE(what(batch.query_start_loc, 2, 0).find("query_start_loc[2]"), std::string::npos);
  EXPECT_NE(what(batch.seq_lens, 1, -1).find("seq_lens[1]"), std::string::npos);
  EXPECT_NE(what(batch.seq_lens, 1, 100000).find("seq_lens[1]"), std::string::npos);
  EXPECT_NE(what(batch.block_table, 0, 77777).find("block_table[0, 0]"), std::string::npos);
  EXPECT_NE(what(problem.slot_mapping(), 0, std::int64_t{1} << 40).find("slot_mapping[0]"),
            std::string::npos);
}

}  // namespace
}  // namespace diffkv::verify
