// What may be read, and what may be written.
#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstring>

#include "problem.h"

namespace diffkv::properties {
namespace {

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

TEST(Memory, WhatMayNotBeReadNeverShows) {
  for_random(100, [](const Backend& backend, Rng& rng) {
    const Problem problem = random_problem(rng, {.long_seqs = chance(rng, 0.2)});
    Layout layout = random_layout(rng);
    const Result clean = run(backend, problem, layout);
    layout.poison = true;
    const Result poisoned = run(backend, problem, layout);
    for (std::size_t s = 0; s < problem.seqs.size(); ++s) {
      EXPECT_EQ(bit_difference(poisoned.seqs[s], clean.seqs[s]), "")
          << "sequence " << s << " of " << describe(problem);
    }
  });
}

TEST(Memory, OnlyTheBatchsRowsAreWritten) {
  for_random(60, [](const Backend& backend, Rng& rng) {
    const Problem problem = random_problem(rng);
    const Result result = run(backend, problem, random_layout(rng));
    EXPECT_TRUE(result.guards_intact) << describe(problem);
    EXPECT_TRUE(result.cache_intact) << describe(problem);
  });
}

// The outputs' first content differs between the runs, so a row that is not written differs too.
TEST(Memory, EveryRowOfTheBatchIsWritten) {
  for_random(60, [](const Backend& backend, Rng& rng) {
    const Problem problem = random_problem(rng);
    Layout layout = random_layout(rng);
    layout.dense = true;  // where page_seed decides nothing but that content
    layout.page_seed = 0x11;
    const Result first = run(backend, problem, layout);
    layout.page_seed = 0x7f;
    const Result second = run(backend, problem, layout);
    for (std::size_t s = 0; s < problem.seqs.size(); ++s) {
      EXPECT_EQ(bit_difference(first.seqs[s], second.seqs[s]), "")
          << "sequence " << s << " of " << describe(problem);
    }
  });
}

TEST(Memory, NanInAKeyShowsInTheRowsThatSeeItAndInNoOther) {
  for_random(60, [](const Backend& backend, Rng& rng) {
    const Problem clean = random_problem(rng, {.scores = false, .fp8_queries = false});
    const auto victim = at(uniform(rng, 0, static_cast<std::int64_t>(clean.seqs.size()) - 1));
    const Seq& seq = clean.seqs[victim];
    if (seq.seq_len == 0) return;
    const std::int64_t key = uniform(rng, 0, seq.seq_len - 1);
    const std::int64_t kv_head = uniform(rng, 0, clean.key.num_kv_heads - 1);
    Problem broken = clean;
    const std::int64_t row = (key * clean.key.num_kv_heads + kv_head) * clean.key.head_size_qk *
                             size_of(clean.key.key_dtype);
    std::memset(broken.seqs[victim].key.data() + row, 0xff, at(size_of(clean.key.key_dtype)));

    const Layout layout = random_layout(rng);
    const Result expected = run(backend, clean, layout);
    const Result result = run(backend, broken, layout);
    const auto row_size = at(clean.key.head_size_v);
    for (std::size_t s = 0; s < clean.seqs.size(); ++s) {
      const std::vector<double> values = values_of(result.seqs[s].output, clean.output_dtype);
      const std::vector<double> before = values_of(expected.seqs[s].output, clean.output_dtype);
      for (std::size_t r = 0; r < result.seqs[s].lse.size(); ++r) {
        const std::int64_t token = static_cast<std::int64_t>(r) / clean.key.num_heads;
        const std::int64_t head = static_cast<std::int64_t>(r) % clean.key.num_heads;
        const bool hit =
            s == victim && head / clean.key.group() == kv_head && sees(clean.key, seq, token, key);
        for (std::size_t d = r * row_size; d < (r + 1) * row_size; ++d) {
          ASSERT_EQ(std::isnan(values[d]), hit)
              << "sequence " << s << " token " << token << " head " << head << ", NaN in key "
              << key << " of sequence " << victim << " KV head " << kv_head << " of "
              << describe(clean);
          if (!hit) {
            ASSERT_EQ(values[d], before[d]) << describe(clean);
          }
        }
      }
    }
  });
}

TEST(Memory, NoSequencesIsABatch) {
  for_random(5, [](const Backend& backend, Rng& rng) {
    Problem problem = random_problem(rng);
    problem.seqs.clear();
    const Result result = run(backend, problem, random_layout(rng));
    EXPECT_TRUE(result.seqs.empty());
    EXPECT_TRUE(result.guards_intact);
    EXPECT_TRUE(result.cache_intact);
  });
}

// A cache of random bytes, random slots of which are written; the rest stays as it is.
TEST(Memory, CacheUpdateWritesItsSlotsAndNothingElse) {
  for_random(60, [](const Backend& backend, Rng& rng) {
    const DType dtype =
        pick<DType>(rng, {DType::kF32, DType::kF16, DType::kBF16, DType::kE4M3, DType::kE5M2});
    const std::int64_t heads = uniform(rng, 1, 4);
    const std::int64_t qk = 8 * uniform(rng, 1, 20);
    const std::int64_t v = 8 * uniform(rng, 1, 20);
    const std::int64_t num_blocks = uniform(rng, 1, 8);
    const std::int64_t block_size = uniform(rng, 1, 20);
    const std::int64_t slots = num_blocks * block_size;
    const std::int64_t size = size_of(dtype);
    const std::int64_t row = (qk + v) * size;

    std::vector<std::byte> cache(at(slots * heads * row));
    for (std::byte& b : cache) b = static_cast<std::byte>(rng() & 0xff);
    std::vector<std::byte> expected = cache;
    const std::int64_t tokens = uniform(rng, 0, 40);
    const std::vector<std::byte> key = random_elements(rng, dtype, at(tokens * heads * qk), 0.5);
    const std::vector<std::byte> value = random_elements(rng, dtype, at(tokens * heads * v), 0.5);
    std::vector<std::int64_t> slot_mapping;
    for (std::int64_t t = 0; t < tokens; ++t) {
      const std::int64_t slot = chance(rng, 0.2) ? -uniform(rng, 1, 9) : uniform(rng, 0, slots - 1);
      slot_mapping.push_back(slot);
      for (std::int64_t h = 0; h < heads && slot >= 0; ++h) {
        std::byte* to = expected.data() + (slot * heads + h) * row;
        std::memcpy(to, key.data() + (t * heads + h) * qk * size, at(qk * size));
        std::memcpy(to + qk * size, value.data() + (t * heads + h) * v * size, at(v * size));
      }
    }
    update_cache(backend, ConstTensorView(key.data(), dtype, {tokens, heads, qk}),
                 ConstTensorView(value.data(), dtype, {tokens, heads, v}),
                 KvCacheView::packed(
                     TensorView(cache.data(), dtype, {num_blocks, block_size, heads, qk + v}), qk),
                 view_of(slot_mapping.data(), {tokens}));
    EXPECT_TRUE(cache == expected) << to_string(dtype) << ", " << tokens << " tokens into "
                                   << num_blocks << " blocks of " << block_size;
  });
}

}  // namespace
}  // namespace diffkv::properties
