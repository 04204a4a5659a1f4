// Ways of computing one attention that must agree within rounding.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "problem.h"

namespace diffkv::properties {
namespace {

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

void expect_same(const Problem& problem, const Result& a, const Result& b) {
  ASSERT_EQ(a.seqs.size(), b.seqs.size());
  for (std::size_t s = 0; s < a.seqs.size(); ++s) {
    EXPECT_EQ(difference(problem, a.seqs[s], b.seqs[s]), "")
        << "sequence " << s << " of " << describe(problem);
  }
}

// Query rows [begin, end) of a sequence as a step of their own, when the keys after them have not
// come yet.
Seq step_of(const PlanKey& key, const Seq& seq, std::int32_t begin, std::int32_t end) {
  Seq step = seq;
  step.query_len = end - begin;
  step.seq_len = seq.context_len() + end;
  const std::int64_t query_row = key.num_heads * key.head_size_qk * size_of(key.query_dtype);
  step.query.assign(seq.query.begin() + begin * query_row, seq.query.begin() + end * query_row);
  step.key.resize(at(step.seq_len * key.num_kv_heads * key.head_size_qk * size_of(key.key_dtype)));
  step.value.resize(
      at(step.seq_len * key.num_kv_heads * key.head_size_v * size_of(key.value_dtype)));
  return step;
}

// A problem whose rows see nothing after themselves, and whose scores know a query's position but
// not its place in the step.
Problem causal_problem(Rng& rng) {
  Problem problem = random_problem(rng, {.scores = false, .odd_seqs = false});
  problem.key.mask.causal = true;
  problem.key.causal_per_seq = false;
  problem.key.mm_ranges = false;
  problem.key.mask.clamp_mm_ranges = false;
  // Chunks and prefixes show keys below p only because the mask is causal as well.
  for (Seq& seq : problem.seqs) seq.mm_ranges.clear();
  if (chance(rng, 0.3)) {
    problem.alibi_sqrt = true;
    problem.alibi_slopes.assign(at(problem.key.num_heads), 0.125F);
  }
  return problem;
}

// Computes every sequence in steps whose ends `next_end(begin, query_len)` gives, and compares the
// rows with those of the whole.
template <class NextEnd>
void expect_steps_equal_whole(const Backend& backend, Rng& rng, NextEnd next_end) {
  const Problem whole = causal_problem(rng);
  const Result expected = run(backend, whole, random_layout(rng));
  for (std::size_t s = 0; s < whole.seqs.size(); ++s) {
    const Seq& seq = whole.seqs[s];
    SeqResult joined;
    for (std::int32_t begin = 0; begin < seq.query_len;) {
      const std::int32_t end = next_end(begin, seq.query_len);
      Problem step = whole;
      step.seqs = {step_of(whole.key, seq, begin, end)};
      const Result part = run(backend, step, random_layout(rng));
      joined.output.insert(joined.output.end(), part.seqs[0].output.begin(),
                           part.seqs[0].output.end());
      joined.lse.insert(joined.lse.end(), part.seqs[0].lse.begin(), part.seqs[0].lse.end());
      begin = end;
    }
    EXPECT_EQ(difference(whole, joined, expected.seqs[s]), "")
        << "sequence " << s << " of " << describe(whole);
  }
}

TEST(Identities, PagedEqualsDense) {
  for_random(60, [](const Backend& backend, Rng& rng) {
    const Problem problem = random_problem(rng);
    Layout paged = random_layout(rng);
    paged.dense = false;
    Layout dense = random_layout(rng);
    dense.dense = true;
    expect_same(problem, run(backend, problem, paged), run(backend, problem, dense));
  });
}

TEST(Identities, PageSizeAndOrderChangeNothing) {
  for_random(60, [](const Backend& backend, Rng& rng) {
    const Problem problem = random_problem(rng, {.long_seqs = true});
    expect_same(problem, run(backend, problem, random_layout(rng)),
                run(backend, problem, random_layout(rng)));
  });
}

TEST(Identities, PoliciesAgree) {
  for_random(30, [](const Backend& backend, Rng& rng) {
    Problem problem = random_problem(rng, {.long_seqs = true});
    const Layout layout = random_layout(rng);
    const Result balanced = run(backend, problem, layout);
    problem.key.policy = SchedulePolicy::kBatchInvariant;
    expect_same(problem, balanced, run(backend, problem, layout));
  });
}

TEST(Identities, ChunkedPrefillEqualsWhole) {
  for_random(30, [](const Backend& backend, Rng& rng) {
    expect_steps_equal_whole(backend, rng, [&](std::int32_t begin, std::int32_t query_len) {
      return begin + static_cast<std::int32_t>(uniform(rng, 1, query_len - begin));
    });
  });
}

TEST(Identities, DecodeEqualsLastRowOfPrefill) {
  for_random(30, [](const Backend& backend, Rng& rng) {
    expect_steps_equal_whole(backend, rng, [](std::int32_t begin, std::int32_t query_len) {
      return begin < query_len - 1 ? query_len - 1 : query_len;
    });
  });
}

// With sinks the same sum of values is divided by a denominator that is larger by exp(sink); lse
// is the logarithm of the same denominator.
TEST(Identities, SinksJoinTheDenominatorOfOutputAndLse) {
  for_random(30, [](const Backend& backend, Rng& rng) {
    Problem problem = random_problem(rng, {.fp8_queries = false});
    problem.key.query_dtype = problem.output_dtype = DType::kF32;
    for (Seq& seq : problem.seqs) {
      seq = random_seq(rng, problem.key, seq.query_len, seq.seq_len);
    }
    problem.sinks.resize(at(problem.key.num_heads));
    for (float& sink : problem.sinks) sink = 0.25F * static_cast<float>(uniform(rng, -12, 12));
    const Layout layout = random_layout(rng);
    problem.sink_mode = SinkMode::kIn;
    const Result with = run(backend, problem, layout);
    problem.sink_mode = SinkMode::kOut;
    Result without = run(backend, problem, layout);
    const auto row_size = at(problem.key.head_size_v);
    for (SeqResult& seq : without.seqs) {
      auto* values = reinterpret_cast<float*>(seq.output.data());
      for (std::size_t row = 0; row < seq.lse.size(); ++row) {
        const double sink = problem.sinks[row % problem.sinks.size()];
        const double lse = seq.lse[row];
        const double joined = std::isinf(lse) ? sink : std::log(std::exp(lse) + std::exp(sink));
        for (std::size_t d = 0; d < row_size; ++d) {
          values[row * row_size + d] *= static_cast<float>(std::exp(lse - joined));
        }
        seq.lse[row] = static_cast<float>(joined);
      }
    }
    expect_same(problem, with, without);
  });
}

TEST(Identities, SinksOfMinusInfinityAreNone) {
  for_random(30, [](const Backend& backend, Rng& rng) {
    Problem problem = random_problem(rng, {.sinks = false});
    const Layout layout = random_layout(rng);
    const Result none = run(backend, problem, layout);
    problem.sinks.assign(at(problem.key.num_heads), -std::numeric_limits<float>::infinity());
    expect_same(problem, run(backend, problem, layout), none);
  });
}

// Where every value is the same, so is every output, whatever the weights.
TEST(Identities, EqualValuesGiveThatValue) {
  for_random(30, [](const Backend& backend, Rng& rng) {
    Problem problem = random_problem(rng, {.sinks = false, .fp8_queries = false});
    problem.qq_bias_size = 0;
    problem.qq_bias.clear();
    const std::int64_t size = size_of(problem.key.value_dtype);
    for (Seq& seq : problem.seqs) {
      for (std::size_t i = at(size); i < seq.value.size(); ++i) {
        seq.value[i] = seq.value[i - at(size)];
      }
    }
    const Result result = run(backend, problem, random_layout(rng));
    for (std::size_t s = 0; s < problem.seqs.size(); ++s) {
      const Seq& seq = problem.seqs[s];
      const std::vector<double> output = values_of(result.seqs[s].output, problem.output_dtype);
      const std::int64_t per_token = problem.key.num_heads * problem.key.head_size_v;
      for (std::int64_t i = 0; i < seq.query_len; ++i) {
        bool any = false;
        for (std::int64_t j = 0; j < seq.seq_len && !any; ++j) any = sees(problem.key, seq, i, j);
        const double expected = any ? values_of(seq.value, problem.key.value_dtype).front() : 0.0;
        for (std::int64_t d = 0; d < per_token; ++d) {
          ASSERT_NEAR(output[at(i * per_token + d)], expected, 0.01 * std::abs(expected))
              << "sequence " << s << ", query " << i << " of " << describe(problem);
        }
      }
    }
  });
}

}  // namespace
}  // namespace diffkv::properties
