// One step's sequences: how long, where their keys are, where new tokens go.
#pragma once

#include <cstdint>

#include "diffkv/tensor.h"

namespace diffkv {

// Tensors live in the cache's memory space. Sequence s has query rows
// [query_start_loc[s], query_start_loc[s + 1]) and keys 0 .. seq_lens[s] - 1; query i of it stands
// at position p = context_len + i with context_len = seq_len - query_len (which may be negative).
// query_len 0 and seq_len 0 are legal.
struct Batch {
  std::int64_t num_seqs = 0;
  // Query rows to compute: rows at and past min(num_actual_tokens, query_start_loc[num_seqs]) are
  // not touched.
  std::int64_t num_actual_tokens = 0;
  // Optional: no sequence has more query rows than this; 0: not known, so num_actual_tokens is
  // taken. Tile classes that only longer queries need are then neither planned nor launched. On the
  // host a longer query is refused. In device memory nobody can see one beforehand: it is computed
  // in tiles of the largest class there is, which is right but slow, and in a batch-invariant plan
  // not bit for bit the same.
  std::int64_t max_query_len = 0;

  ConstTensorView query_start_loc;  // int32 [num_seqs + 1], starts at 0, never falls
  ConstTensorView seq_lens;         // int32 [num_seqs]
  // Paged caches: int32 [num_seqs, max_blocks], page of each logical block; entries past a
  // sequence's last block are never read.
  ConstTensorView block_table;
  // Dense caches instead: int32 [num_seqs], the sequence's first key's token index.
  ConstTensorView kv_start;

  // Optional: bool [num_seqs], whether the sequence is causal; overrides Mask::causal.
  ConstTensorView causal_per_seq;
  // Needed with Mask::prefix_window: int32 [num_seqs], keys below it are always in the window.
  ConstTensorView prefix_lens;
  // Optional: multimodal ranges, int32 [num_seqs, max_ranges, 2], both ends inclusive; start >= end
  // is empty; the ranges of a sequence do not overlap. A row sees every key of its own range.
  ConstTensorView mm_ranges;
};

}  // namespace diffkv
