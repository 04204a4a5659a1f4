// Rules about a step's batch.
#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string_view>
#include <utility>
#include <vector>

#include "core/batch_rules.h"
#include "core/rules.h"
#include "core/validate.h"

namespace diffkv::core {
namespace {

// An index tensor [num_seqs, ...] on the device of query_start_loc.
void check_index(std::string_view name, const Batch& batch, const ConstTensorView& view,
                 DType dtype, std::initializer_list<Dim> dims) {
  check_tensor(name, view, dtype, dims);
  check_last_contiguous(name, view);
  check_device(name, view.device, "query_start_loc", batch.query_start_loc.device);
}

void check_presence(std::string_view name, const ConstTensorView& view, std::string_view condition,
                    bool expected) {
  if (view.given() == expected) return;
  refuse("{} is {}, expected it with {} only and always", name,
         view.given() ? "given" : "not given", condition);
}

void check_optional(const PlanKey& key, const Batch& batch, Dim seqs) {
  check_presence("causal_per_seq", batch.causal_per_seq, "the key's causal_per_seq",
                 key.causal_per_seq);
  check_presence("prefix_lens", batch.prefix_lens, "a mask that has a prefix_window",
                 key.mask.prefix_window > 0);
  check_presence("mm_ranges", batch.mm_ranges, "the key's mm_ranges", key.mm_ranges);
  if (batch.causal_per_seq.given()) {
    check_index("causal_per_seq", batch, batch.causal_per_seq, DType::kBool, {seqs});
  }
  if (batch.prefix_lens.given()) {
    check_index("prefix_lens", batch, batch.prefix_lens, DType::kI32, {seqs});
  }
  if (!batch.mm_ranges.given()) return;
  const ConstTensorView& ranges = batch.mm_ranges;
  check_index("mm_ranges", batch, ranges, DType::kI32,
              {seqs, at_most("max_ranges", kMaxInt32 / 2), exactly("bounds", 2)});
  if (ranges.shape[1] > 1 && ranges.strides[1] != 2 && !is_empty(ranges)) {
    refuse("mm_ranges has stride {} in dimension 1, expected 2 (contiguous)", ranges.strides[1]);
  }
}

const std::int32_t* int32_data(const ConstTensorView& view) {
  return static_cast<const std::int32_t*>(view.data);
}

void check_query_start_loc(const Batch& batch, const BatchLimits& limits) {
  const std::int32_t* starts = int32_data(batch.query_start_loc);
  if (starts[0] != 0) refuse("query_start_loc[0] is {}, expected 0", starts[0]);
  for (std::int64_t s = 0; s < batch.num_seqs; ++s) {
    if (starts[s + 1] < starts[s]) {
      refuse("query_start_loc[{}] is {}, expected query_start_loc[{}] = {} or more", s + 1,
             starts[s + 1], s, starts[s]);
    }
    const std::int64_t query_len = std::int64_t{starts[s + 1]} - starts[s];
    if (batch.max_query_len > 0 && query_len > batch.max_query_len) {
      refuse("query_start_loc[{}] - query_start_loc[{}] is {}, the batch has max_query_len {}",
             s + 1, s, query_len, batch.max_query_len);
    }
  }
  if (starts[batch.num_seqs] > limits.tokens) {
    refuse("query_start_loc[{}] is {}, {} {}", batch.num_seqs, starts[batch.num_seqs],
           limits.because_tokens, limits.tokens);
  }
}

void check_seq_lens(const Batch& batch, const BatchLimits& limits) {
  const std::int32_t* seq_lens = int32_data(batch.seq_lens);
  for (std::int64_t s = 0; s < batch.num_seqs; ++s) {
    if (seq_lens[s] < 0) refuse("seq_lens[{}] is {}, expected 0 or more", s, seq_lens[s]);
    if (seq_lens[s] > limits.seq_len) {
      refuse("seq_lens[{}] is {}, {} {}", s, seq_lens[s], limits.because_seq_len, limits.seq_len);
    }
  }
}

// Non-empty ranges of a sequence share no position. Ranges in ascending order, the usual case, take
// one pass and no memory.
void check_mm_ranges(const ConstTensorView& ranges) {
  std::vector<std::pair<std::int32_t, std::int32_t>> sorted;
  for (std::int64_t s = 0; s < ranges.shape[0]; ++s) {
    const std::int32_t* pairs = int32_data(ranges) + s * ranges.strides[0];
    bool ascending = true;
    std::int64_t last = -kMaxInt32 - 2;  // below every int32
    for (std::int64_t r = 0; r < ranges.shape[1]; ++r) {
      if (pairs[2 * r] >= pairs[2 * r + 1]) continue;
      ascending = ascending && pairs[2 * r] > last;
      last = pairs[2 * r + 1];
    }
    if (ascending) continue;
    sorted.clear();
    for (std::int64_t r = 0; r < ranges.shape[1]; ++r) {
      if (pairs[2 * r] < pairs[2 * r + 1]) sorted.emplace_back(pairs[2 * r], pairs[2 * r + 1]);
    }
    std::sort(sorted.begin(), sorted.end());
    for (std::size_t i = 1; i < sorted.size(); ++i) {
      if (sorted[i].first > sorted[i - 1].second) continue;
      refuse("mm_ranges[{}] holds [{}, {}] and [{}, {}], expected ranges that do not overlap", s,
             sorted[i - 1].first, sorted[i - 1].second, sorted[i].first, sorted[i].second);
    }
  }
}

}  // namespace

void check_batch_tensors(const PlanKey& key, const Batch& batch) {
  if (batch.num_seqs < 0 || batch.num_seqs >= kMaxInt32) {
    refuse("num_seqs is {}, expected 0 to {}", batch.num_seqs, kMaxInt32 - 1);
  }
  if (batch.num_actual_tokens < 0 || batch.num_actual_tokens > kMaxInt32) {
    refuse("num_actual_tokens is {}, expected 0 to {}", batch.num_actual_tokens, kMaxInt32);
  }
  if (batch.max_query_len < 0 || batch.max_query_len > kMaxInt32) {
    refuse("max_query_len is {}, expected 0 (not known) to {}", batch.max_query_len, kMaxInt32);
  }
  const Dim seqs = exactly("num_seqs", batch.num_seqs, "the batch has");
  check_index("query_start_loc", batch, batch.query_start_loc, DType::kI32,
              {exactly("entries", batch.num_seqs + 1, "expected num_seqs + 1 =")});
  check_index("seq_lens", batch, batch.seq_lens, DType::kI32, {seqs});
  if (batch.block_table.given()) {
    check_index("block_table", batch, batch.block_table, DType::kI32,
                {seqs, any_extent("max_blocks")});
  }
  if (batch.kv_start.given()) {
    check_index("kv_start", batch, batch.kv_start, DType::kI32, {seqs});
  }
  check_optional(key, batch, seqs);
}

void check_batch_values(const Batch& batch, const BatchLimits& limits) {
  if (batch.query_start_loc.device.type != DeviceType::kCpu) return;
  check_query_start_loc(batch, limits);
  check_seq_lens(batch, limits);
  if (batch.mm_ranges.given() && !is_empty(batch.mm_ranges)) check_mm_ranges(batch.mm_ranges);
}

void validate_batch(const PlanKey& key, const PlanMaxima& maxima, const Batch& batch) {
  check_batch_tensors(key, batch);
  if (batch.num_seqs > maxima.max_seqs) {
    refuse("num_seqs is {}, the plan's maxima have max_seqs {}", batch.num_seqs, maxima.max_seqs);
  }
  if (batch.num_actual_tokens > maxima.max_tokens) {
    refuse("num_actual_tokens is {}, the plan's maxima have max_tokens {}", batch.num_actual_tokens,
           maxima.max_tokens);
  }
  if (batch.mm_ranges.given() && batch.mm_ranges.shape[1] > maxima.max_mm_ranges) {
    refuse("mm_ranges has max_ranges {}, the plan's maxima have max_mm_ranges {}",
           batch.mm_ranges.shape[1], maxima.max_mm_ranges);
  }
  check_batch_values(batch, {.tokens = maxima.max_tokens,
                             .because_tokens = "the plan's maxima have max_tokens",
                             .seq_len = maxima.max_seq_len,
                             .because_seq_len = "the plan's maxima have max_seq_len"});
}

std::uint64_t mask_fingerprint(const Batch& batch) {
  if (batch.query_start_loc.device.type != DeviceType::kCpu) return 0;
  std::uint64_t hash = 0xcbf29ce484222325ULL;  // FNV-1a, 64 bits
  const auto add = [&hash](const void* data, std::int64_t bytes) {
    const auto* byte = static_cast<const unsigned char*>(data);
    for (std::int64_t i = 0; i < bytes; ++i) hash = (hash ^ byte[i]) * 0x100000001b3ULL;
  };
  if (batch.causal_per_seq.given()) add(batch.causal_per_seq.data, batch.num_seqs);
  if (batch.prefix_lens.given()) {
    add(batch.prefix_lens.data, batch.num_seqs * size_of(DType::kI32));
  }
  if (batch.mm_ranges.given()) {
    const std::int64_t row = batch.mm_ranges.shape[1] * 2 * size_of(DType::kI32);
    for (std::int64_t s = 0; s < batch.num_seqs; ++s) {
      add(static_cast<const std::int32_t*>(batch.mm_ranges.data) + s * batch.mm_ranges.strides[0],
          row);
    }
  }
  return hash;
}

}  // namespace diffkv::core
