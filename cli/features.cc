#include "cli/features.h"

#include <cstdint>
#include <utility>

namespace diffkv::cli {
namespace {

// MiMo-V2-Flash's full-attention layer: what a feature changes, it changes from here.
Problem base_problem() {
  Problem problem;
  problem.key.num_heads = 64;
  problem.key.num_kv_heads = 4;
  problem.key.head_size_qk = 192;
  problem.key.head_size_v = 128;
  return problem;
}

// The problem that `change` makes of the base.
template <class Change>
Problem with(Change change) {
  Problem problem = base_problem();
  change(problem);
  return problem;
}

void set_activations(Problem& problem, DType dtype) {
  problem.key.query_dtype = dtype;
  problem.output_dtype = is_fp8(dtype) ? DType::kBF16 : dtype;
}

void set_cache(Problem& problem, DType dtype) {
  problem.key.key_dtype = dtype;
  problem.key.value_dtype = dtype;
}

std::vector<Problem> for_heads(
    const std::vector<std::pair<std::int64_t, std::int64_t>>& heads_and_kv_heads) {
  std::vector<Problem> problems;
  for (const auto& [heads, kv_heads] : heads_and_kv_heads) {
    Problem problem = base_problem();
    problem.key.num_heads = heads;
    problem.key.num_kv_heads = kv_heads;
    problems.push_back(problem);
  }
  return problems;
}

std::vector<Problem> for_head_sizes() {
  std::vector<Problem> problems;
  for (std::int64_t size = 8; size <= 576; size += 8) {
    // V of the same size, much smaller and much larger.
    for (const std::int64_t other : {size, std::int64_t{8}, std::int64_t{576}}) {
      Problem problem = base_problem();
      problem.key.head_size_qk = size;
      problem.key.head_size_v = other;
      problems.push_back(problem);
    }
  }
  return problems;
}

std::vector<Problem> for_block_sizes(const std::vector<std::int64_t>& sizes) {
  std::vector<Problem> problems;
  problems.reserve(sizes.size());
  for (const std::int64_t size : sizes) {
    problems.push_back(with([&](Problem& p) { p.block_size = size; }));
  }
  return problems;
}

std::vector<Problem> for_cache_types(DType dtype) {
  std::vector<Problem> problems;
  for (const DType activations : {DType::kF32, DType::kF16, DType::kBF16}) {
    problems.push_back(with([&](Problem& p) {
      set_activations(p, activations);
      set_cache(p, dtype);
    }));
  }
  return problems;
}

void add_heads(std::vector<Feature>& list) {
  const std::string group = "heads";
  list.push_back({group, "MHA", for_heads({{1, 1}, {40, 40}, {128, 128}})});
  list.push_back(
      {group, "GQA, any ratio", for_heads({{64, 4}, {64, 8}, {10, 2}, {24, 2}, {256, 2}})});
  list.push_back({group, "MQA", for_heads({{8, 1}, {16, 1}, {128, 1}})});
  list.push_back({group, "head sizes 8 to 576 in steps of 8, K and V each", for_head_sizes()});
}

void add_types(std::vector<Feature>& list) {
  const std::string group = "types";
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    list.push_back({group, std::string(to_string(dtype)) + " queries", {with([&](Problem& p) {
                      set_activations(p, dtype);
                    })}});
  }
  list.push_back({group, "fp8_e4m3 queries with q_scale", {with([](Problem& p) {
                    set_activations(p, DType::kE4M3);
                    set_cache(p, DType::kE4M3);
                  })}});
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16, DType::kE4M3, DType::kE5M2}) {
    list.push_back(
        {group, std::string(to_string(dtype)) + " cache, any activations", for_cache_types(dtype)});
  }
  list.push_back({group, "K and V of different types", {with([](Problem& p) {
                    p.packed = false;
                    p.key.value_dtype = DType::kE4M3;
                  })}});
  list.push_back({group, "a scale for each KV head", {with([](Problem& p) {
                    set_cache(p, DType::kE4M3);
                    p.kv_scale_per_head = true;
                  })}});
  list.push_back({group, "fp8_e4m3 output by output_scale", {with([](Problem& p) {
                    p.output_dtype = DType::kE4M3;
                    p.output_scale = true;
                  })}});
}

void add_caches(std::vector<Feature>& list) {
  const std::string group = "cache";
  list.push_back({group, "packed NHD pages", {base_problem()}});
  list.push_back(
      {group, "packed HND pages", {with([](Problem& p) { p.layout = KvCacheLayout::kHND; })}});
  list.push_back({group, "separate K and V pools", {with([](Problem& p) { p.packed = false; })}});
  list.push_back(
      {group, "dense K and V, no cache (encoder, cross attention)", {with([](Problem& p) {
         p.dense = true;
         p.packed = false;
         p.key.mask.causal = false;
       })}});
  list.push_back({group, "pages of 16, 32, 64, 128 tokens", for_block_sizes({16, 32, 64, 128})});
  list.push_back({group, "pages of any size", for_block_sizes({1, 2, 5, 13, 24, 100, 784, 4096})});
}

void add_masks(std::vector<Feature>& list) {
  const std::string group = "mask";
  const auto mask = [](auto change) { return with([&](Problem& p) { change(p.key.mask); }); };
  list.push_back({group, "causal", {base_problem()}});
  list.push_back({group, "full", {mask([](Mask& m) { m.causal = false; })}});
  list.push_back({group, "causal or full per sequence", {with([](Problem& p) {
                    p.key.causal_per_seq = true;
                  })}});
  list.push_back({group, "sliding window, causal", {mask([](Mask& m) { m.window = 128; })}});
  list.push_back({group, "sliding window, both ways", {mask([](Mask& m) {
                    m.window = 128;
                    m.causal = false;
                  })}});
  list.push_back({group, "chunks with lookback", {mask([](Mask& m) {
                    m.chunk_size = 1024;
                    m.chunk_lookback = 1;
                  })}});
  list.push_back({group, "prefix and window", {mask([](Mask& m) { m.prefix_window = 128; })}});
  list.push_back({group, "multimodal ranges", {with([](Problem& p) { p.key.mm_ranges = true; })}});
  list.push_back({group, "multimodal ranges clamped to the window", {with([](Problem& p) {
                    p.key.mm_ranges = true;
                    p.key.mask.window = 128;
                    p.key.mask.clamp_mm_ranges = true;
                  })}});
}

void add_scores(std::vector<Feature>& list) {
  const std::string group = "scores";
  list.push_back({group, "soft cap", {with([](Problem& p) { p.soft_cap = true; })}});
  list.push_back({group, "ALiBi", {with([](Problem& p) { p.alibi = true; })}});
  list.push_back({group, "ALiBi, square-root form", {with([](Problem& p) {
                    p.alibi = true;
                    p.alibi_sqrt = true;
                  })}});
  list.push_back({group, "query-query bias", {with([](Problem& p) { p.qq_bias = true; })}});
  list.push_back({group, "sinks", {with([](Problem& p) { p.sinks = true; }), with([](Problem& p) {
                                     p.sinks = true;
                                     p.key.mask.window = 128;
                                   })}});
}

void add_results(std::vector<Feature>& list) {
  const std::string group = "results";
  list.push_back(
      {group, "LSE, sinks in or out", {with([](Problem& p) { p.lse = true; }), with([](Problem& p) {
                                         p.lse = true;
                                         p.sinks = true;
                                       })}});
  list.push_back({group, "batch-invariant results", {with([](Problem& p) {
                    p.key.policy = SchedulePolicy::kBatchInvariant;
                  })}});
  list.push_back({group, "per-block output scales (fp4, mxfp8)", {with([](Problem& p) {
                    p.output_block_scale = true;
                  })}});
}

}  // namespace

std::vector<Feature> features() {
  std::vector<Feature> list;
  add_heads(list);
  add_types(list);
  add_caches(list);
  add_masks(list);
  add_scores(list);
  add_results(list);
  return list;
}

std::string_view support_of(const Backend& backend, const Feature& feature) {
  std::size_t supported = 0;
  for (const Problem& problem : feature.problems) {
    if (backend.supports(problem).ok) ++supported;
  }
  if (supported == feature.problems.size()) return "yes";
  return supported == 0 ? "no" : "partly";
}

Table feature_table(const std::vector<const Backend*>& backends) {
  std::vector<Table::Column> columns = {{"area"}, {"feature"}};
  for (const Backend* backend : backends) {
    columns.push_back({std::string(backend->name())});
  }
  Table table(std::move(columns));
  std::string last_group;
  for (const Feature& feature : features()) {
    std::vector<std::string> row = {feature.group == last_group ? "" : feature.group, feature.name};
    last_group = feature.group;
    for (const Backend* backend : backends) row.emplace_back(support_of(*backend, feature));
    table.add_row(std::move(row));
  }
  return table;
}

}  // namespace diffkv::cli
