#include "verify/cases.h"

#include <fmt/format.h>

#include <algorithm>

#include "verify/case_list.h"
#include "verify/generate.h"

namespace diffkv::verify {
namespace {

// A case of features chosen at random: what no table of pairs would put together.
Case random_case(Random& random) {
  const auto chance = [&](std::int64_t of) { return random.below(of) == 0; };
  const std::vector<NamedBatch> batches = all_batches();
  const std::vector<NamedMask> masks = all_masks();
  constexpr DType kQueries[] = {DType::kF32, DType::kF16, DType::kBF16, DType::kE4M3};
  constexpr DType kStored[] = {DType::kF32, DType::kF16, DType::kBF16, DType::kE4M3, DType::kE5M2};
  constexpr std::int64_t kKvHeads[] = {1, 2, 3, 4, 4};
  constexpr std::int64_t kGroups[] = {1, 2, 3, 5, 8, 12, 16, 20};
  constexpr std::int64_t kBlockSizes[] = {1, 3, 5, 13, 16, 32, 64, 100};
  constexpr CaseCache kCaches[] = {CaseCache::kPackedNHD, CaseCache::kPackedHND,
                                   CaseCache::kPackedPadded, CaseCache::kSeparate,
                                   CaseCache::kDense};
  Case c = base_case(batches[static_cast<std::size_t>(random.below(std::ssize(batches)))]);
  set_mask(c, masks[static_cast<std::size_t>(random.below(std::ssize(masks)))]);
  const std::int64_t kv_heads = kKvHeads[random.below(std::ssize(kKvHeads))];
  set_heads(c, kv_heads * kGroups[random.below(std::ssize(kGroups))], kv_heads);
  set_head_sizes(c, 8 * (1 + random.below(26)), 8 * (1 + random.below(26)));
  set_dtypes(c, kQueries[random.below(std::ssize(kQueries))],
             kStored[random.below(std::ssize(kStored))]);
  c.cache = kCaches[random.below(std::ssize(kCaches))];
  c.block_size = kBlockSizes[random.below(std::ssize(kBlockSizes))];
  if (is_fp8(c.key.key_dtype)) {
    c.scales = static_cast<CaseScale>(random.below(4));
    c.uint8_cache = chance(3) && c.cache != CaseCache::kSeparate;
  }
  if (c.cache == CaseCache::kDense) c.uint8_cache = false;
  c.key.policy = chance(3) ? SchedulePolicy::kBatchInvariant : SchedulePolicy::kBalanced;
  c.fused_qkv = chance(3) && c.new_dtype == c.key.query_dtype && c.cache != CaseCache::kDense;
  c.strided_output = chance(3);
  c.least_alignment = chance(3);
  c.odd_unit_strides = chance(2);
  c.null_blocks = chance(2);
  c.skip_slots = chance(4);
  c.nan_keys = chance(8);
  c.extra_rows = random.below(4);
  c.soft_cap = chance(3) ? 4.0F : 0.0F;
  c.alibi = chance(3);
  c.alibi_sqrt = c.alibi && chance(2);
  c.qq_bias = chance(3) ? 6 : 0;
  c.qq_bias_dtype = chance(2) ? DType::kF32 : DType::kBF16;
  // Whether a bias of -inf hides a NaN is not what such a case is for.
  c.qq_bias_masks = chance(2) && !c.nan_keys;
  if (chance(2)) c.sinks = kQueries[random.below(3)];
  c.sinks_none = chance(3);
  c.sink_mode = chance(4) ? SinkMode::kOut : SinkMode::kIn;
  c.lse = chance(2);
  if (chance(5)) {
    c.output_scale = true;
    c.output_dtype = DType::kE4M3;
  }
  return c;
}

}  // namespace

void CaseList::add(Case c, const std::string& feature, const std::string& detail, bool quick) {
  if (suite_ == Suite::kQuick && !quick) return;
  c.feature = feature;
  c.name = feature + "/" + detail;
  cases_.push_back(std::move(c));
}

const NamedBatch& decode_batch() {
  static const NamedBatch batch{"decode", {{1, 1}, {1, 17}, {1, 64}, {1, 211}}};
  return batch;
}
const NamedBatch& multi_batch() {
  static const NamedBatch batch{"multi", {{4, 100}, {3, 37}, {4, 4}, {2, 65}}};
  return batch;
}
const NamedBatch& prefill_batch() {
  static const NamedBatch batch{"prefill", {{33, 33}, {5, 5}, {70, 70}}};
  return batch;
}
const NamedBatch& chunked_batch() {
  static const NamedBatch batch{"chunked", {{16, 80}, {33, 100}}};
  return batch;
}
const NamedBatch& mixed_batch() {
  static const NamedBatch batch{"mixed", {{1, 90}, {40, 40}, {16, 130}, {4, 75}, {1, 1}}};
  return batch;
}
const NamedBatch& degenerate_batch() {
  static const NamedBatch batch{
      "degenerate", {{0, 50}, {3, 0}, {0, 0}, {6, 2}, {1, 40}, {20, 13}, {5, 5}, {1, 0}, {0, 9}}};
  return batch;
}

std::vector<NamedBatch> all_batches() {
  return {decode_batch(),  multi_batch(), prefill_batch(),
          chunked_batch(), mixed_batch(), degenerate_batch()};
}

std::vector<NamedMask> all_masks() {
  const auto mask = [](bool causal, std::int32_t window) {
    Mask m;
    m.causal = causal;
    m.window = window;
    return m;
  };
  const auto chunk = [](bool causal, std::int32_t size, std::int32_t lookback) {
    Mask m;
    m.causal = causal;
    m.chunk_size = size;
    m.chunk_lookback = lookback;
    return m;
  };
  const auto prefix = [](bool causal, std::int32_t window) {
    Mask m;
    m.causal = causal;
    m.prefix_window = window;
    return m;
  };
  const auto clamp = [](Mask m) {
    m.clamp_mm_ranges = true;
    return m;
  };
  return {{"causal", mask(true, 0)},
          {"full", mask(false, 0)},
          {"causal_per_seq", mask(true, 0), false, true},
          {"window1", mask(true, 1)},
          {"window7", mask(true, 7)},
          {"window33", mask(true, 33)},
          {"window128", mask(true, 128)},
          {"window1_full", mask(false, 1)},
          {"window9_full", mask(false, 9)},
          {"window64_full", mask(false, 64)},
          {"window12_causal_per_seq", mask(false, 12), false, true},
          {"chunk16", chunk(true, 16, 0)},
          {"chunk16_lookback1", chunk(true, 16, 1)},
          {"chunk7_lookback2", chunk(true, 7, 2)},
          {"chunk50_lookback1", chunk(true, 50, 1)},
          {"chunk16_full", chunk(false, 16, 0)},
          {"chunk13_lookback1_full", chunk(false, 13, 1)},
          {"chunk16_causal_per_seq", chunk(true, 16, 1), false, true},
          {"prefix1", prefix(true, 1)},
          {"prefix10", prefix(true, 10)},
          {"prefix40", prefix(true, 40)},
          {"prefix10_full", prefix(false, 10)},
          {"prefix10_causal_per_seq", prefix(false, 10), false, true},
          {"mm", mask(true, 0), true},
          {"mm_full", mask(false, 0), true},
          {"mm_window7", mask(true, 7), true},
          {"mm_window7_clamp", clamp(mask(true, 7)), true},
          {"mm_window7_full", mask(false, 7), true},
          {"mm_window7_full_clamp", clamp(mask(false, 7)), true},
          {"mm_clamp_without_window", clamp(mask(true, 0)), true},
          {"mm_window20_causal_per_seq", mask(true, 20), true, true},
          {"mm_chunk16", chunk(true, 16, 0), true},
          {"mm_prefix10", prefix(true, 10), true}};
}

Case base_case() { return base_case(mixed_batch()); }

Case base_case(const NamedBatch& batch) {
  Case c;
  c.seqs = batch.seqs;
  set_heads(c, 4, 2);
  set_head_sizes(c, 48, 32);
  c.lse = true;
  return c;
}

void set_mask(Case& c, const NamedMask& mask) {
  c.key.mask = mask.mask;
  c.key.mm_ranges = mask.mm_ranges;
  c.key.causal_per_seq = mask.causal_per_seq;
}

void set_heads(Case& c, std::int64_t num_heads, std::int64_t num_kv_heads) {
  c.key.num_heads = num_heads;
  c.key.num_kv_heads = num_kv_heads;
}

void set_head_sizes(Case& c, std::int64_t head_size_qk, std::int64_t head_size_v) {
  c.key.head_size_qk = head_size_qk;
  c.key.head_size_v = head_size_v;
}

void set_dtypes(Case& c, DType query, DType stored) {
  c.key.query_dtype = query;
  c.key.key_dtype = stored;
  c.key.value_dtype = stored;
  c.new_dtype = is_fp8(query) ? DType::kBF16 : query;
  c.output_dtype = c.new_dtype;
}

void add_combined_cases(CaseList& list) {
  Random random(20);
  for (int i = 0; i < 160; ++i) {
    list.add(random_case(random), "combined", fmt::format("{:03}", i), i % 20 == 0);
  }
}

std::vector<Case> cases(Suite suite) {
  CaseList list(suite);
  add_shape_cases(list);
  add_memory_cases(list);
  add_mask_cases(list);
  add_score_cases(list);
  add_combined_cases(list);
  return list.take();
}

std::vector<std::string> features() {
  std::vector<std::string> names;
  for (const Case& c : cases(Suite::kFull)) {
    if (std::find(names.begin(), names.end(), c.feature) == names.end()) names.push_back(c.feature);
  }
  return names;
}

}  // namespace diffkv::verify
