// Rules about one call of attend, merge_attn_states and fill_zero.
#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string_view>

#include "core/batch_rules.h"
#include "core/param_tensors.h"
#include "core/rules.h"
#include "core/validate.h"

namespace diffkv::core {
namespace {

constexpr std::string_view kLayer = "the layer was built for";
constexpr std::array kOutputDTypes = kQueryDTypes;

// A tensor [num_tokens, num_heads, head size] that is read.
void check_heads(std::string_view name, const ConstTensorView& view, DTypes dtypes,
                 std::initializer_list<Dim> dims) {
  check_tensor(name, view, dtypes, dims);
  check_rows(name, view);
}

// The same, written.
void check_output(std::string_view name, const ConstTensorView& output, DTypes dtypes,
                  std::initializer_list<Dim> dims) {
  check_heads(name, output, dtypes, dims);
  check_no_overlap(name, output);
}

// An lse [num_heads, num_tokens] that is read; one that is written must not overlap either.
void check_lse(std::string_view name, const ConstTensorView& lse, Dim heads, Dim tokens) {
  check_tensor(name, lse, DType::kF32, {heads, tokens});
  check_last_contiguous(name, lse);
}

// A result may be written where a part is read from, each element in the place of its own, and
// nowhere else over it.
void check_in_place(std::string_view name, const ConstTensorView& result,
                    std::string_view part_name, const ConstTensorView& part) {
  if (result.data != part.data || is_empty(result)) {
    check_apart(name, result, part_name, part);
    return;
  }
  bool same = result.dtype == part.dtype;
  for (int i = 0; i < result.rank; ++i) {
    same = same && (result.shape[i] == 1 || result.strides[i] == part.strides[i]);
  }
  if (same) return;
  refuse("{} starts where {} does with another dtype or other strides, expected the same view",
         name, part_name);
}

// Nothing that a call writes lies over what it reads.
void check_apart_from_inputs(std::string_view name, const ConstTensorView& written,
                             const AttendArgs& args) {
  if (!written.given()) return;
  const KvCacheView& cache = args.cache;
  check_apart(name, written, "query", args.query);
  check_apart(name, written, "the cache's keys",
              plane_tensor(cache, cache.key, cache.head_size_qk));
  check_apart(name, written, "the cache's values",
              plane_tensor(cache, cache.value, cache.head_size_v));
}

void check_matches(std::string_view name, std::int64_t got, std::int64_t expected) {
  if (got != expected) refuse("the cache has {} {}, {} {}", name, got, kLayer, expected);
}

void check_matches(std::string_view name, DType got, DType expected) {
  if (got == expected) return;
  refuse("the cache has {} {}, {} {}", name, to_string(got), kLayer, to_string(expected));
}

void check_plan_made(const Plan& plan) {
  if (plan.key().num_heads < 1 || plan.tables().query_start_loc == nullptr) {
    refuse("the plan is empty, expected one from make_plan");
  }
}

// Every block below a sequence's end is in the pool, whether or not a mask hides it.
void check_block_ids(const KvCacheView& cache, const Batch& batch) {
  const auto* seq_lens = static_cast<const std::int32_t*>(batch.seq_lens.data);
  const auto* table = static_cast<const std::int32_t*>(batch.block_table.data);
  const std::int64_t width = batch.block_table.shape[1];
  for (std::int64_t s = 0; s < batch.num_seqs; ++s) {
    const std::int64_t blocks = (seq_lens[s] + cache.block_size - 1) / cache.block_size;
    if (blocks > width) {
      refuse("seq_lens[{}] is {}, block_table has max_blocks {} of {} tokens", s, seq_lens[s],
             width, cache.block_size);
    }
    const std::int32_t* row = table + s * batch.block_table.strides[0];
    // A first pass without branches, for this runs in every layer of every step.
    std::uint32_t largest = 0;
    for (std::int64_t b = 0; b < blocks; ++b) {
      largest = std::max(largest, static_cast<std::uint32_t>(row[b]));  // a negative id is huge
    }
    if (blocks == 0 || largest < static_cast<std::uint32_t>(cache.num_blocks)) continue;
    for (std::int64_t b = 0; b < blocks; ++b) {
      if (row[b] >= 0 && row[b] < cache.num_blocks) continue;
      refuse("block_table[{}][{}] is {}, expected 0 to below num_blocks {}", s, b, row[b],
             cache.num_blocks);
    }
  }
}

void check_dense_ranges(const KvCacheView& cache, const Batch& batch) {
  const auto* seq_lens = static_cast<const std::int32_t*>(batch.seq_lens.data);
  const auto* starts = static_cast<const std::int32_t*>(batch.kv_start.data);
  for (std::int64_t s = 0; s < batch.num_seqs; ++s) {
    if (starts[s] >= 0 && std::int64_t{starts[s]} + seq_lens[s] <= cache.block_size) continue;
    refuse("kv_start[{}] is {} and seq_lens[{}] is {}, expected keys within the cache's {} tokens",
           s, starts[s], s, seq_lens[s], cache.block_size);
  }
}

// Where each sequence's keys are.
void check_key_places(const KvCacheView& cache, const Batch& batch) {
  if (cache.dense && !batch.kv_start.given()) {
    refuse("kv_start is not given, expected [num_seqs] with a dense cache");
  }
  if (!cache.dense && !batch.block_table.given()) {
    refuse("block_table is not given, expected [num_seqs, max_blocks] with a paged cache");
  }
  if (cache.device.type != DeviceType::kCpu) return;
  if (cache.dense) {
    check_dense_ranges(cache, batch);
  } else {
    check_block_ids(cache, batch);
  }
}

void check_one_device(const AttentionParams& params, const AttendArgs& args) {
  const Device& device = args.query.device;
  check_device("the cache", args.cache.device, "query", device);
  check_device("query_start_loc", args.batch.query_start_loc.device, "query", device);
  check_device("output", args.output.device, "query", device);
  if (args.lse.given()) check_device("lse", args.lse.device, "query", device);
  for (const NamedTensor& tensor : param_tensors(params)) {
    if (tensor.view->given()) check_device(tensor.name, tensor.view->device, "query", device);
  }
}

}  // namespace

void validate_planned(const Batch& batch, const Plan& plan) {
  check_plan_made(plan);
  const detail::PlanTables& tables = plan.tables();
  if (batch.num_seqs != tables.num_seqs) {
    refuse("the batch has num_seqs {}, the plan was made for {}", batch.num_seqs, tables.num_seqs);
  }
  if (batch.num_actual_tokens != tables.num_tokens) {
    refuse("the batch has num_actual_tokens {}, the plan was made for {}", batch.num_actual_tokens,
           tables.num_tokens);
  }
  if (batch.max_query_len != plan.max_query_len()) {
    refuse("the batch has max_query_len {}, the plan was made for {}", batch.max_query_len,
           plan.max_query_len());
  }
  check_device("query_start_loc", batch.query_start_loc.device, "the plan", plan.device());
  if (plan.device().type != DeviceType::kCpu) return;
  const auto compare = [](std::string_view name, const ConstTensorView& view,
                          const std::int32_t* planned, std::string_view what) {
    const auto* values = static_cast<const std::int32_t*>(view.data);
    for (std::int64_t i = 0; i < view.shape[0]; ++i) {
      if (values[i] == planned[i]) continue;
      refuse("the plan was made for other {}: {}[{}] is {}, the plan has {}", what, name, i,
             values[i], planned[i]);
    }
  };
  compare("query_start_loc", batch.query_start_loc, tables.query_start_loc, "query lengths");
  compare("seq_lens", batch.seq_lens, tables.seq_lens, "sequence lengths");
  if (mask_fingerprint(batch) != plan.mask_fingerprint()) {
    refuse(
        "causal_per_seq, prefix_lens or mm_ranges hold other values than when the plan was made");
  }
}

void validate_cache_of(const PlanKey& key, const KvCacheView& cache) {
  validate_cache(cache);
  check_matches("num_kv_heads", cache.num_kv_heads, key.num_kv_heads);
  check_matches("head_size_qk", cache.head_size_qk, key.head_size_qk);
  check_matches("head_size_v", cache.head_size_v, key.head_size_v);
  check_matches("keys of", cache.key.dtype, key.key_dtype);
  check_matches("values of", cache.value.dtype, key.value_dtype);
}

void validate_attend(const AttentionParams& params, const AttendArgs& args, const Plan& plan) {
  check_plan_made(plan);
  const PlanKey& key = plan.key();
  const Batch& batch = args.batch;
  check_heads("query", args.query, kQueryDTypes,
              {at_least("num_tokens", batch.num_actual_tokens, "the batch has num_actual_tokens"),
               exactly("num_heads", key.num_heads, kLayer),
               exactly("head_size_qk", key.head_size_qk, kLayer)});
  if (args.query.dtype != key.query_dtype) {
    refuse("query is {}, {} {}", to_string(args.query.dtype), kLayer, to_string(key.query_dtype));
  }
  const std::int64_t num_tokens = args.query.shape[0];
  check_output(
      "output", args.output, kOutputDTypes,
      {exactly("num_tokens", num_tokens, "query has"), exactly("num_heads", key.num_heads, kLayer),
       exactly("head_size_v", key.head_size_v, kLayer)});
  if (args.lse.given()) {
    check_lse("lse", args.lse, exactly("num_heads", key.num_heads, kLayer),
              exactly("num_tokens", num_tokens, "query has"));
    check_no_overlap("lse", args.lse);
  }
  validate_params(key, params, args.output.dtype);
  validate_cache_of(key, args.cache);
  check_batch_tensors(key, batch);
  check_one_device(params, args);
  check_apart_from_inputs("output", args.output, args);
  check_apart_from_inputs("lse", args.lse, args);
  check_apart("lse", args.lse, "output", args.output);
  check_batch_values(batch, {.tokens = num_tokens,
                             .because_tokens = "query has num_tokens",
                             .seq_len = std::numeric_limits<std::int32_t>::max(),
                             .because_seq_len = "expected at most"});
  validate_planned(batch, plan);
  check_key_places(args.cache, batch);
}

void validate_merge(const AttnState& a, const AttnState& b, const ConstTensorView& sinks,
                    const TensorView& output, const TensorView& lse) {
  check_heads("a.output", a.output, kPlainDTypes,
              {any_extent("num_tokens"), any_extent("num_heads"), any_extent("head_size_v")});
  check_head_size("head_size_v of a.output", a.output.shape[2]);
  const Dim tokens = exactly("num_tokens", a.output.shape[0], "a.output has");
  const Dim heads = exactly("num_heads", a.output.shape[1], "a.output has");
  const Dim size = exactly("head_size_v", a.output.shape[2], "a.output has");
  check_heads("b.output", b.output, kPlainDTypes, {tokens, heads, size});
  check_output("output", output, kPlainDTypes, {tokens, heads, size});
  check_lse("a.lse", a.lse, heads, tokens);
  check_lse("b.lse", b.lse, heads, tokens);
  if (lse.given()) {
    check_lse("lse", lse, heads, tokens);
    check_no_overlap("lse", lse);
  }
  if (sinks.given()) {
    check_tensor("sinks", sinks, kPlainDTypes, {heads});
    check_last_contiguous("sinks", sinks);
  }
  const auto check_with_a = [&](std::string_view name, const ConstTensorView& view) {
    if (view.given()) check_device(name, view.device, "a.output", a.output.device);
  };
  check_in_place("output", output, "a.output", a.output);
  check_in_place("output", output, "b.output", b.output);
  if (lse.given()) {
    check_in_place("lse", lse, "a.lse", a.lse);
    check_in_place("lse", lse, "b.lse", b.lse);
    check_apart("lse", lse, "output", output);
  }
  check_with_a("a.lse", a.lse);
  check_with_a("b.output", b.output);
  check_with_a("b.lse", b.lse);
  check_with_a("sinks", sinks);
  check_with_a("output", output);
  check_with_a("lse", lse);
}

void validate_output_of(const PlanKey& key, const TensorView& output, DType output_dtype) {
  check_output("output", output, output_dtype,
               {any_extent("num_tokens"), exactly("num_heads", key.num_heads, kLayer),
                exactly("head_size_v", key.head_size_v, kLayer)});
}

void validate_output(const TensorView& output) {
  check_output("output", output, kOutputDTypes,
               {any_extent("num_tokens"), any_extent("num_heads"), any_extent("head_size_v")});
}

}  // namespace diffkv::core
