// Attention in two parts, as engines do with a shared prefix: the keys below a cut, which every row
// sees, and the rest, by merge_attn_states.
#include <limits>
#include <vector>

#include "verify/codec.h"
#include "verify/run_flow.h"

namespace diffkv::verify {
namespace {

// A part's own output and lse; in place of them the whole's where in_place is set.
struct Part {
  explicit Part(const AttendArgs& whole, bool in_place = false)
      : output("part output", whole.output.numel() * size_of(whole.output.dtype)),
        lse("part lse", whole.lse.numel() * 4),
        args(whole) {
    if (in_place) return;
    args.output = TensorView(output.data(), whole.output.dtype,
                             {whole.output.shape[0], whole.output.shape[1], whole.output.shape[2]});
    args.lse = TensorView(lse.data(), DType::kF32, {whole.lse.shape[0], whole.lse.shape[1]});
  }

  GuardedBuffer output;
  GuardedBuffer lse;
  AttendArgs args;
};

std::string attend_part(const Backend& backend, const GeneratedProblem& problem, const PlanKey& key,
                        const Part& part) {
  AttentionParams params = problem.params();
  params.sink_mode = SinkMode::kOut;
  const PlanMemory memory(backend, key, problem.maxima());
  const Plan plan = make_plan(backend, key, problem.maxima(), part.args.batch, memory.view());
  attend(backend, params, part.args, plan);
  for (const std::string& what :
       {memory.guard_damage(), part.output.guard_damage(), part.lse.guard_damage()}) {
    if (!what.empty()) return what;
  }
  return "";
}

}  // namespace

std::string attend_by_merge(const Backend& backend, const GeneratedProblem& problem) {
  const AttendArgs& whole = problem.args();
  const Batch& batch = whole.batch;
  const std::int64_t width = batch.block_table.shape[1];

  // The cut: half of each sequence's context, in whole pages; none for a short context.
  std::vector<std::int32_t> below(static_cast<std::size_t>(batch.num_seqs));
  std::vector<std::int32_t> above(below.size());
  std::vector<std::int32_t> table(below.size() * static_cast<std::size_t>(width), 0x3fffffff);
  for (std::size_t s = 0; s < below.size(); ++s) {
    const auto seq = static_cast<std::int64_t>(s);
    const std::int64_t len = index_at(batch.seq_lens, seq);
    const std::int64_t context =
        len - index_at(batch.query_start_loc, seq + 1) + index_at(batch.query_start_loc, seq);
    const std::int64_t pages =
        context > 0 ? (context / 2 + whole.cache.block_size - 1) / whole.cache.block_size : 0;
    const std::int64_t cut = pages * whole.cache.block_size > context ? 0 : pages;
    below[s] = static_cast<std::int32_t>(cut * whole.cache.block_size);
    above[s] = static_cast<std::int32_t>(len) - below[s];
    for (std::int64_t b = cut; b < width; ++b) {
      table[s * static_cast<std::size_t>(width) + static_cast<std::size_t>(b - cut)] =
          static_cast<std::int32_t>(index_at(batch.block_table, seq, b));
    }
  }

  Part first(whole, problem.source().merge_in_place);
  first.args.batch.seq_lens = view_of(below.data(), {batch.num_seqs});
  PlanKey first_key = problem.key();
  first_key.mask.causal = false;
  Part second(whole);
  second.args.batch.seq_lens = view_of(above.data(), {batch.num_seqs});
  second.args.batch.block_table = view_of(table.data(), {batch.num_seqs, width});
  std::string what = attend_part(backend, problem, first_key, first);
  if (what.empty()) what = attend_part(backend, problem, problem.key(), second);
  if (!what.empty()) return what;

  // Some kernels mark an empty part by +inf, which must be read as -inf.
  const std::int64_t covered = problem.covered_tokens();
  const TensorView& lse = first.args.lse;
  for (std::int64_t head = 0; head < lse.shape[0]; ++head) {
    for (std::int64_t token = 0; token < covered; token += 2) {
      const std::int64_t at = head * lse.strides[0] + token * lse.strides[1];
      if (load(lse.data, lse.dtype, at) != -std::numeric_limits<double>::infinity()) continue;
      store_bits(lse.data, lse.dtype, at,
                 encode(lse.dtype, std::numeric_limits<double>::infinity(), Overflow::kInfinity));
    }
  }

  // Only covered rows were written, so only they can be merged.
  const auto rows = [&](TensorView view, int token_dim) {
    view.shape[static_cast<std::size_t>(token_dim)] = covered;
    return view;
  };
  merge_attn_states(backend, {rows(first.args.output, 0), rows(first.args.lse, 1)},
                    {rows(second.args.output, 0), rows(second.args.lse, 1)}, problem.params().sinks,
                    rows(whole.output, 0), rows(whole.lse, 1));
  return "";
}

}  // namespace diffkv::verify
