#include "verify/reference.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "verify/codec.h"

namespace diffkv::verify {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

std::int64_t floor_div(std::int64_t a, std::int64_t b) {
  return a / b - (a % b != 0 && (a < 0) != (b < 0) ? 1 : 0);
}

bool in_same_range(const Mask& mask, const Batch& batch, const RowPlace& row, std::int64_t j) {
  if (!batch.mm_ranges.given()) return false;
  const std::int64_t p = row.position;
  for (std::int64_t r = 0; r < batch.mm_ranges.shape[1]; ++r) {
    const std::int64_t first = index_at(batch.mm_ranges, row.seq, r, 0);
    const std::int64_t last = index_at(batch.mm_ranges, row.seq, r, 1);
    if (first >= last) continue;
    if (p < first || p > last || j < first || j > last) continue;
    if (mask.clamp_mm_ranges && mask.window > 0 && p - j >= mask.window) continue;
    return true;
  }
  return false;
}

// Bias of the visible key j: ALiBi in either form, then the query-query bias.
double bias_of(const AttentionParams& params, const RowPlace& row, std::int64_t head,
               std::int64_t j) {
  double bias = 0;
  if (params.alibi_slopes.given()) {
    const double slope = load_at(params.alibi_slopes, head);
    if (!params.alibi_sqrt) {
      bias = slope * static_cast<double>(j - row.context_len);
    } else if (j <= row.position) {
      bias = -slope * std::sqrt(static_cast<double>(row.position - j));
    }
  }
  if (params.qq_bias.given()) {
    const std::int64_t n = params.qq_bias.shape[0];
    const std::int64_t column = j - row.context_len;
    if (row.query < n && column >= 0 && column < n) {
      bias += load(params.qq_bias.data, params.qq_bias.dtype,
                   row.query * params.qq_bias.strides[0] + column * params.qq_bias.strides[1]);
    }
  }
  return bias;
}

std::int64_t plane_offset(const KvPlane& plane, const KeyPlace& at, std::int64_t kv_head) {
  return at.block * plane.stride_block + at.token * plane.stride_token +
         kv_head * plane.stride_head;
}

struct VisibleKey {
  KeyPlace place;
  double score = 0;
};

}  // namespace

RowPlace place_row(const Batch& batch, std::int64_t token) {
  for (std::int64_t s = 0; s < batch.num_seqs; ++s) {
    const std::int64_t begin = index_at(batch.query_start_loc, s);
    const std::int64_t end = index_at(batch.query_start_loc, s + 1);
    if (token < begin || token >= end) continue;
    RowPlace row;
    row.seq = s;
    row.query = token - begin;
    row.seq_len = index_at(batch.seq_lens, s);
    row.context_len = row.seq_len - (end - begin);
    row.position = row.context_len + row.query;
    return row;
  }
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("reference: token {} is in none of the batch's {} sequences", token,
                          batch.num_seqs));
}

std::int64_t covered_tokens(const Batch& batch) {
  return std::min(batch.num_actual_tokens, index_at(batch.query_start_loc, batch.num_seqs));
}

bool sees(const Mask& mask, const Batch& batch, const RowPlace& row, std::int64_t j) {
  if (j < 0 || j >= row.seq_len) return false;
  const std::int64_t p = row.position;
  const bool causal =
      batch.causal_per_seq.given() ? index_at(batch.causal_per_seq, row.seq) != 0 : mask.causal;
  bool seen = !causal || j <= p;
  if (mask.chunk_size > 0) {
    seen = seen &&
           floor_div(p, mask.chunk_size) - floor_div(j, mask.chunk_size) <= mask.chunk_lookback;
  } else if (mask.prefix_window > 0) {
    seen = seen && (j < index_at(batch.prefix_lens, row.seq) || p - j < mask.prefix_window);
  } else if (mask.window > 0) {
    seen = seen && p - j < mask.window && (causal || j - p < mask.window);
  }
  return seen || in_same_range(mask, batch, row, j);
}

KeyPlace place_key(const KvCacheView& cache, const Batch& batch, std::int64_t seq, std::int64_t j) {
  if (cache.dense) return {0, index_at(batch.kv_start, seq) + j};
  return {index_at(batch.block_table, seq, j / cache.block_size), j % cache.block_size};
}

double scale_of(const ConstTensorView& scale, std::int64_t head) {
  if (!scale.given()) return 1;
  return load_at(scale, scale.shape[0] == 1 ? 0 : head);
}

RowRef reference_row(const PlanKey& key, const AttentionParams& params, const AttendArgs& args,
                     std::int64_t token, std::int64_t head) {
  const KvCacheView& cache = args.cache;
  const RowPlace row = place_row(args.batch, token);
  const std::int64_t kv_head = head / (key.num_heads / key.num_kv_heads);

  std::vector<double> q(static_cast<std::size_t>(key.head_size_qk));
  load_row(args.query.data, args.query.dtype,
           token * args.query.strides[0] + head * args.query.strides[1], key.head_size_qk,
           q.data());
  const double score_scale = static_cast<double>(params.scale) * scale_of(params.q_scale, 0) *
                             scale_of(cache.k_scale, kv_head);

  std::vector<VisibleKey> visible;
  std::vector<double> k(q.size());
  double max_score = -kInf;
  for (std::int64_t j = 0; j < row.seq_len; ++j) {
    if (!sees(key.mask, args.batch, row, j)) continue;
    const double bias = bias_of(params, row, head, j);
    if (bias == -kInf) continue;  // a bias of -inf is a mask
    const KeyPlace place = place_key(cache, args.batch, row.seq, j);
    load_row(cache.key.data, cache.key.dtype, plane_offset(cache.key, place, kv_head),
             key.head_size_qk, k.data());
    double dot = 0;
    for (std::size_t d = 0; d < q.size(); ++d) dot += q[d] * k[d];
    double score = dot * score_scale;
    if (params.soft_cap > 0) {
      const double cap = params.soft_cap;
      score = cap * std::tanh(score / cap);
    }
    score += bias;
    visible.push_back({place, score});
    // A NaN must win the maximum so that it reaches the output.
    max_score = std::isnan(score) || std::isnan(max_score)
                    ? std::numeric_limits<double>::quiet_NaN()
                    : std::max(max_score, score);
  }

  const bool with_sink = params.sinks.given() && params.sink_mode == SinkMode::kIn;
  const double sink = with_sink ? load_at(params.sinks, head) : -kInf;
  RowRef result;
  result.output.assign(static_cast<std::size_t>(key.head_size_v), 0.0);
  result.lse = sink;
  if (max_score == -kInf) return result;

  const double shift = std::isnan(max_score) ? max_score : std::max(max_score, sink);
  double denominator = sink == -kInf ? 0 : std::exp(sink - shift);
  std::vector<double> v(result.output.size());
  for (const VisibleKey& seen : visible) {
    const double weight = std::exp(seen.score - shift);
    denominator += weight;
    load_row(cache.value.data, cache.value.dtype, plane_offset(cache.value, seen.place, kv_head),
             key.head_size_v, v.data());
    for (std::size_t d = 0; d < v.size(); ++d) result.output[d] += weight * v[d];
  }
  const double out_scale =
      scale_of(cache.v_scale, kv_head) / denominator / scale_of(params.output_scale, 0);
  for (double& x : result.output) x *= out_scale;
  result.lse = shift + std::log(denominator);
  return result;
}

}  // namespace diffkv::verify
