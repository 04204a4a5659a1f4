// Attention over two parts of the keys, merged, is attention over all of them.
#include <gtest/gtest.h>

#include <cstddef>

#include "problem.h"

namespace diffkv::properties {
namespace {

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

// Keys [begin, end) of a sequence.
Seq part_of(const PlanKey& key, const Seq& seq, std::int64_t begin, std::int64_t end) {
  Seq part = seq;
  part.seq_len = static_cast<std::int32_t>(end - begin);
  const std::int64_t key_row = key.num_kv_heads * key.head_size_qk * size_of(key.key_dtype);
  const std::int64_t value_row = key.num_kv_heads * key.head_size_v * size_of(key.value_dtype);
  part.key.assign(seq.key.begin() + begin * key_row, seq.key.begin() + end * key_row);
  part.value.assign(seq.value.begin() + begin * value_row, seq.value.begin() + end * value_row);
  return part;
}

// [tokens, heads] to [heads, tokens].
std::vector<float> by_head(const std::vector<float>& lse, std::size_t heads) {
  const std::size_t tokens = lse.size() / heads;
  std::vector<float> turned(lse.size());
  for (std::size_t i = 0; i < lse.size(); ++i) turned[i % heads * tokens + i / heads] = lse[i];
  return turned;
}

SeqResult merged(const Backend& backend, const Problem& problem, const SeqResult& low,
                 const SeqResult& high) {
  const std::int64_t heads = problem.key.num_heads;
  const std::int64_t tokens = static_cast<std::int64_t>(low.lse.size()) / heads;
  const std::int64_t v = problem.key.head_size_v;
  const std::vector<float> low_lse = by_head(low.lse, at(heads));
  const std::vector<float> high_lse = by_head(high.lse, at(heads));
  const AttnState a{ConstTensorView(low.output.data(), problem.output_dtype, {tokens, heads, v}),
                    view_of(low_lse.data(), {heads, tokens})};
  const AttnState b{ConstTensorView(high.output.data(), problem.output_dtype, {tokens, heads, v}),
                    view_of(high_lse.data(), {heads, tokens})};
  SeqResult result;
  result.output.resize(low.output.size());
  std::vector<float> lse(low.lse.size());
  ConstTensorView sinks;
  if (!problem.sinks.empty()) sinks = view_of(problem.sinks.data(), {heads});
  merge_attn_states(backend, a, b, sinks,
                    TensorView(result.output.data(), problem.output_dtype, {tokens, heads, v}),
                    view_of(lse.data(), {heads, tokens}));
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t h = 0; h < heads; ++h) result.lse.push_back(lse[at(h * tokens + t)]);
  }
  return result;
}

TEST(Merge, TwoPartsOfTheKeysMakeTheWhole) {
  for_random(60, [](const Backend& backend, Rng& rng) {
    Problem problem = random_problem(rng, {.any_mask = false, .long_seqs = true, .scores = false});
    problem.key.mask.causal = false;
    problem.sink_mode = SinkMode::kIn;
    if (chance(rng, 0.3)) problem.soft_cap = 4.0F;
    const Result whole = run(backend, problem, random_layout(rng));

    // The parts are without sinks, which the merge adds; either part may be empty.
    Problem low = problem;
    Problem high = problem;
    low.sink_mode = high.sink_mode = SinkMode::kOut;
    for (std::size_t s = 0; s < problem.seqs.size(); ++s) {
      const Seq& seq = problem.seqs[s];
      const std::int64_t cut = uniform(rng, 0, seq.seq_len);
      low.seqs[s] = part_of(problem.key, seq, 0, cut);
      high.seqs[s] = part_of(problem.key, seq, cut, seq.seq_len);
    }
    const Result low_result = run(backend, low, random_layout(rng));
    const Result high_result = run(backend, high, random_layout(rng));
    for (std::size_t s = 0; s < problem.seqs.size(); ++s) {
      const SeqResult result = merged(backend, problem, low_result.seqs[s], high_result.seqs[s]);
      EXPECT_EQ(difference(problem, result, whole.seqs[s]), "")
          << "sequence " << s << " of " << describe(problem);
    }
  });
}

}  // namespace
}  // namespace diffkv::properties
