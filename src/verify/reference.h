// What the library must compute, in fp64 and by the letter of the contract: own type decoding, own
// page walk, the mask as predicates on single (row, key) pairs. Slow and plain on purpose.
#pragma once

#include <cstdint>
#include <vector>

#include "diffkv/attention.h"
#include "diffkv/batch.h"
#include "diffkv/cache.h"
#include "diffkv/tensor.h"

namespace diffkv::verify {

// One row of output [head_size_v], before it is rounded to the output's type, and its natural-log
// sum of exponentials.
struct RowRef {
  std::vector<double> output;
  double lse = 0;
};

// Where a query row stands.
struct RowPlace {
  std::int64_t seq = 0;
  std::int64_t query = 0;        // i: index within its sequence
  std::int64_t seq_len = 0;      // keys of its sequence
  std::int64_t context_len = 0;  // seq_len - query_len, may be negative
  std::int64_t position = 0;     // p = context_len + i
};

// Throws Error if no sequence of the batch has that token.
RowPlace place_row(const Batch& batch, std::int64_t token);

// Rows that attend writes: the first min(num_actual_tokens, query_start_loc[num_seqs]).
std::int64_t covered_tokens(const Batch& batch);

// Whether the mask lets the row see key j. False outside 0 <= j < seq_len.
bool sees(const Mask& mask, const Batch& batch, const RowPlace& row, std::int64_t j);

// Where row `j` of a sequence's keys starts, as (block, token): through the block table, or
// (0, kv_start + j) of a dense cache.
struct KeyPlace {
  std::int64_t block = 0;
  std::int64_t token = 0;
};
KeyPlace place_key(const KvCacheView& cache, const Batch& batch, std::int64_t seq, std::int64_t j);

// Attention of one row. The output is the real value divided by output_scale where one is given,
// not rounded. A row that sees no key, or only scores of -inf, gives zeros; a NaN in a visible key
// gives NaN. Host memory. Throws Error if the batch has no such token.
RowRef reference_row(const PlanKey& key, const AttentionParams& params, const AttendArgs& args,
                     std::int64_t token, std::int64_t head);

// Does what update_cache must do, in place: run it on a copy of the cache to get the bytes that are
// expected. A NaN that is converted becomes some NaN: which one is not part of the contract.
// key [n, num_kv_heads, head_size_qk], value [n, num_kv_heads, head_size_v], n >= slots.
void reference_update(const ConstTensorView& key, const ConstTensorView& value,
                      const KvCacheView& cache, const ConstTensorView& slot_mapping);

// Bits that `value` has in a cache of that type: e(value / scale) in fp32 arithmetic and saturated
// for fp8, else the nearest value (the scale is not used).
std::uint32_t cache_bits(DType stored, double value, double scale);

// Element `head` of a scale tensor of 1 or num_kv_heads elements; 1 where it is not given.
double scale_of(const ConstTensorView& scale, std::int64_t head);

// One row of merge_attn_states; sinks may be not given. A part of lse -inf or +inf is empty and its
// output is not read.
RowRef reference_merge_row(const AttnState& a, const AttnState& b, const ConstTensorView& sinks,
                           std::int64_t token, std::int64_t head);

}  // namespace diffkv::verify
