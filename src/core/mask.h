// Each mask as at most two key intervals of a row: planner and kernels know only these.
#pragma once

#include <cstdint>

#include "core/host_device.h"
#include "diffkv/attention.h"
#include "diffkv/plan.h"

namespace diffkv::core {

// What the mask needs to know of one sequence.
struct SeqMask {
  std::int32_t query_len = 0;
  std::int32_t seq_len = 0;
  bool causal = true;
  std::int32_t prefix_len = 0;              // only with Mask::prefix_window
  const std::int32_t* mm_ranges = nullptr;  // [num_mm_ranges, 2]
  std::int32_t num_mm_ranges = 0;

  DIFFKV_HD std::int64_t context_len() const {
    return static_cast<std::int64_t>(seq_len) - query_len;
  }
};

// Keys [0, prefix_end) and [begin, end). Normal form: prefix_end < begin where both hold keys; an
// empty window has begin = end; a window reaching down to the prefix has swallowed it.
struct RowKeys {
  std::int32_t prefix_end = 0;
  std::int32_t begin = 0;
  std::int32_t end = 0;

  DIFFKV_HD bool empty() const { return prefix_end <= 0 && begin >= end; }
};

DIFFKV_HD inline std::int64_t floor_div(std::int64_t a, std::int64_t b) {
  const std::int64_t q = a / b;
  return q * b > a ? q - 1 : q;
}

DIFFKV_HD inline std::int32_t clamp_key(std::int64_t key, std::int32_t seq_len) {
  return static_cast<std::int32_t>(key < 0 ? 0 : key > seq_len ? seq_len : key);
}

DIFFKV_HD inline RowKeys normal_form(RowKeys keys) {
  if (keys.begin >= keys.end) keys.begin = keys.end = keys.prefix_end;
  if (keys.begin <= keys.prefix_end) {
    keys.begin = 0;
    keys.end = keys.end > keys.prefix_end ? keys.end : keys.prefix_end;
    keys.prefix_end = 0;
  }
  return keys;
}

// What the row at position p sees without multimodal ranges. The bounds never fall as p grows.
DIFFKV_HD inline RowKeys base_keys(const Mask& mask, const SeqMask& seq, std::int64_t p) {
  RowKeys keys;
  const std::int64_t last = seq.causal ? p + 1 : seq.seq_len;
  keys.end = clamp_key(last, seq.seq_len);
  if (mask.chunk_size > 0) {
    const std::int64_t first_chunk = floor_div(p, mask.chunk_size) - mask.chunk_lookback;
    keys.begin = clamp_key(first_chunk * mask.chunk_size, seq.seq_len);
  } else if (mask.prefix_window > 0) {
    keys.begin = clamp_key(p - mask.prefix_window + 1, seq.seq_len);
    keys.prefix_end = seq.prefix_len < keys.end ? seq.prefix_len : keys.end;
    if (keys.prefix_end < 0) keys.prefix_end = 0;
  } else if (mask.window > 0) {
    keys.begin = clamp_key(p - mask.window + 1, seq.seq_len);
    if (!seq.causal) keys.end = clamp_key(p + mask.window, seq.seq_len);
  }
  return normal_form(keys);
}

// Adds the multimodal range [start, last] to keys of rows at positions p_first .. p_last, all
// inside it. Range and window both contain p, so their union is one interval.
DIFFKV_HD inline RowKeys unite_mm_range(const Mask& mask, const SeqMask& seq, RowKeys keys,
                                        std::int32_t start, std::int32_t last,
                                        std::int64_t p_first) {
  std::int64_t first = start;
  if (mask.clamp_mm_ranges && mask.window > 0) {
    const std::int64_t window_first = p_first - mask.window + 1;
    if (window_first > first) first = window_first;
  }
  const std::int32_t begin = clamp_key(first, seq.seq_len);
  const std::int32_t end = clamp_key(static_cast<std::int64_t>(last) + 1, seq.seq_len);
  if (begin >= end) return keys;
  const bool had_window = keys.begin < keys.end;
  keys.begin = had_window && keys.begin < begin ? keys.begin : begin;
  keys.end = had_window && keys.end > end ? keys.end : end;
  return normal_form(keys);
}

// What the row of query `token` (0-based in its sequence) sees.
DIFFKV_HD inline RowKeys row_keys(const Mask& mask, const SeqMask& seq, std::int32_t token) {
  const std::int64_t p = seq.context_len() + token;
  RowKeys keys = base_keys(mask, seq, p);
  for (std::int32_t r = 0; r < seq.num_mm_ranges; ++r) {
    const std::int32_t* range = seq.mm_ranges + 2 * std::int64_t{r};
    const std::int32_t start = range[0];
    const std::int32_t last = range[1];
    if (start < last && start <= p && p <= last) {
      return unite_mm_range(mask, seq, keys, start, last, p);
    }
  }
  return keys;
}

// Keys that some row of queries [first_token, last_token] sees, as two intervals that hold them
// all.
DIFFKV_HD inline RowKeys tile_keys(const Mask& mask, const SeqMask& seq, std::int32_t first_token,
                                   std::int32_t last_token) {
  const std::int64_t p_first = seq.context_len() + first_token;
  const std::int64_t p_last = seq.context_len() + last_token;
  RowKeys first = base_keys(mask, seq, p_first);
  const RowKeys last = p_last == p_first ? first : base_keys(mask, seq, p_last);
  // The first row's window starts lowest, the last row's ends highest and has the longest prefix.
  RowKeys keys;
  keys.prefix_end = last.prefix_end;
  keys.begin = first.empty() ? 0 : first.begin;
  keys.end = last.end;
  keys = normal_form(keys);
  for (std::int32_t r = 0; r < seq.num_mm_ranges; ++r) {
    const std::int32_t* range = seq.mm_ranges + 2 * std::int64_t{r};
    const std::int32_t start = range[0];
    const std::int32_t range_last = range[1];
    if (start >= range_last || start > p_last || range_last < p_first) continue;
    keys = unite_mm_range(mask, seq, keys, start, range_last, p_first > start ? p_first : start);
  }
  return keys;
}

}  // namespace diffkv::core
