#include "core/problem.h"

#include <fmt/format.h>

#include <cstdint>
#include <string>

#include "core/rules.h"
#include "diffkv/error.h"

namespace diffkv {

std::string to_string(const PlanKey& key) {
  const Mask& mask = key.mask;
  std::string text = fmt::format("{}/{} heads of {}/{}, query {}, cache {}", key.num_heads,
                                 key.num_kv_heads, key.head_size_qk, key.head_size_v,
                                 to_string(key.query_dtype), to_string(key.key_dtype));
  if (key.value_dtype != key.key_dtype) text += fmt::format("/{}", to_string(key.value_dtype));
  text += key.causal_per_seq ? ", causal per sequence" : mask.causal ? ", causal" : ", full";
  if (mask.window > 0) text += fmt::format(", window {}", mask.window);
  if (mask.chunk_size > 0) {
    text += fmt::format(", chunk {} lookback {}", mask.chunk_size, mask.chunk_lookback);
  }
  if (mask.prefix_window > 0) text += fmt::format(", prefix window {}", mask.prefix_window);
  if (key.mm_ranges) {
    text += mask.clamp_mm_ranges ? ", multimodal ranges in the window" : ", multimodal ranges";
  }
  if (key.policy == SchedulePolicy::kBatchInvariant) text += ", batch invariant";
  return text;
}

namespace core {
namespace {

// Whether every row (the last dimension) starts at a multiple of that many bytes.
bool rows_start_at(std::int64_t bytes, const ConstTensorView& view) {
  if (is_empty(view)) return true;
  if (reinterpret_cast<std::uintptr_t>(view.data) % static_cast<std::uintptr_t>(bytes) != 0) {
    return false;
  }
  for (int i = 0; i + 1 < view.rank; ++i) {
    if (view.shape[i] > 1 && view.strides[i] * size_of(view.dtype) % bytes != 0) return false;
  }
  return true;
}

}  // namespace

Problem problem_of(const PlanKey& key, const AttentionParams& params, DType output_dtype) {
  Problem problem;
  problem.key = key;
  problem.output_dtype = output_dtype;
  problem.soft_cap = params.soft_cap > 0.0F;
  problem.alibi = params.alibi_slopes.given();
  problem.alibi_sqrt = params.alibi_sqrt;
  problem.qq_bias = params.qq_bias.given();
  problem.sinks = params.sinks.given();
  problem.output_scale = params.output_scale.given();
  problem.output_block_scale = params.output_block_scale.given();
  return problem;
}

Problem problem_of(const PlanKey& key, const AttentionParams& params, const AttendArgs& args) {
  Problem problem = problem_of(key, params, args.output.dtype);
  const KvCacheView& cache = args.cache;
  // Strides of dimensions of size 1 say nothing.
  const bool heads_first = cache.block_size > 1 && cache.num_kv_heads > 1 &&
                           cache.key.stride_token < cache.key.stride_head;
  problem.layout = heads_first ? KvCacheLayout::kHND : KvCacheLayout::kNHD;
  const auto key_row = reinterpret_cast<std::uintptr_t>(cache.key.data);
  problem.packed =
      cache.key.dtype == cache.value.dtype && cache.key.stride_token == cache.value.stride_token &&
      reinterpret_cast<std::uintptr_t>(cache.value.data) ==
          key_row + static_cast<std::uintptr_t>(cache.head_size_qk * size_of(cache.key.dtype));
  problem.dense = cache.dense;
  problem.block_size = cache.block_size;
  const bool aligned = rows_start_at(16, args.query) && rows_start_at(16, args.output) &&
                       rows_start_at(16, plane_tensor(cache, cache.key, cache.head_size_qk)) &&
                       rows_start_at(16, plane_tensor(cache, cache.value, cache.head_size_v));
  problem.row_alignment = aligned ? 16 : 8;
  problem.lse = args.lse.given();
  problem.kv_scale_per_head = cache.k_scale.numel() > 1 || cache.v_scale.numel() > 1;
  return problem;
}

void refuse_problem(std::string_view backend, const PlanKey& key, std::string_view reason) {
  throw Error(ErrorCode::kUnsupported,
              fmt::format("backend {} does not run {}: {}", backend, to_string(key), reason));
}

}  // namespace core
}  // namespace diffkv
