// The tensors of a batch and of a layer.
#include <algorithm>
#include <numeric>

#include "problem.h"

namespace diffkv::properties {

std::vector<std::size_t> all_seqs(const Problem& problem) {
  std::vector<std::size_t> order(problem.seqs.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  return order;
}

BatchTensors::BatchTensors(const Problem& problem, const std::vector<std::size_t>& order) {
  const PlanKey& key = problem.key;
  for (const std::size_t s : order) {
    const Seq& seq = problem.seqs[s];
    query_start_loc.push_back(query_start_loc.back() + seq.query_len);
    seq_lens_.push_back(seq.seq_len);
    causal_.push_back(seq.causal ? 1 : 0);
    prefix_lens_.push_back(seq.prefix_len);
    for (const auto& [start, last] : seq.mm_ranges) {
      mm_ranges_.push_back(start);
      mm_ranges_.push_back(last);
    }
    maxima.max_seq_len = std::max<std::int64_t>(maxima.max_seq_len, seq.seq_len);
  }
  batch.num_seqs = static_cast<std::int64_t>(order.size());
  batch.num_actual_tokens = query_start_loc.back();
  batch.query_start_loc = view_of(query_start_loc.data(), {batch.num_seqs + 1});
  batch.seq_lens = view_of(seq_lens_.data(), {batch.num_seqs});
  if (key.causal_per_seq) {
    batch.causal_per_seq = ConstTensorView(causal_.data(), DType::kBool, {batch.num_seqs});
  }
  if (key.mask.prefix_window > 0) {
    batch.prefix_lens = view_of(prefix_lens_.data(), {batch.num_seqs});
  }
  if (key.mm_ranges) {
    maxima.max_mm_ranges = kRangesPerSeq;
    batch.mm_ranges = view_of(mm_ranges_.data(), {batch.num_seqs, kRangesPerSeq, 2});
  }
  maxima.max_seqs = batch.num_seqs;
  maxima.max_tokens = batch.num_actual_tokens;
}

AttentionParams params_of(const Problem& problem) {
  const std::int64_t num_heads = problem.key.num_heads;
  AttentionParams params;
  params.scale = problem.scale;
  params.soft_cap = problem.soft_cap;
  params.sink_mode = problem.sink_mode;
  params.alibi_sqrt = problem.alibi_sqrt;
  if (!problem.alibi_slopes.empty()) {
    params.alibi_slopes = view_of(problem.alibi_slopes.data(), {num_heads});
  }
  if (!problem.sinks.empty()) params.sinks = view_of(problem.sinks.data(), {num_heads});
  if (problem.qq_bias_size > 0) {
    params.qq_bias = view_of(problem.qq_bias.data(), {problem.qq_bias_size, problem.qq_bias_size});
  }
  if (problem.key.query_dtype == DType::kE4M3) params.q_scale = view_of(&problem.q_scale, {1});
  return params;
}

}  // namespace diffkv::properties
