// The rules about a batch that planning and attending share.
#pragma once

#include <cstdint>
#include <string_view>

#include "diffkv/attention.h"
#include "diffkv/batch.h"

namespace diffkv::core {

// Upper bounds that a batch's values are held against where they are on the host; because... says
// who set them, as in Dim.
struct BatchLimits {
  std::int64_t tokens = 0;
  std::string_view because_tokens;
  std::int64_t seq_len = 0;
  std::string_view because_seq_len;
};

// Counts, shapes, dtypes, devices and which optional tensors are given. Reads no element.
void check_batch_tensors(const PlanKey& key, const Batch& batch);

// query_start_loc, seq_lens and mm_ranges where they are on the host; check_batch_tensors must have
// passed.
void check_batch_values(const Batch& batch, const BatchLimits& limits);

}  // namespace diffkv::core
