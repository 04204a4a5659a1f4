// Which tile classes a batch can need.
#pragma once

#include <algorithm>
#include <cstdint>

#include "diffkv/attention.h"
#include "diffkv/batch.h"
#include "diffkv/plan.h"

namespace diffkv::plan {

// The classes without the last ones that the batch's longest query leaves empty. Should a query be
// longer, in device memory, it is the last class's, cut as finely as that has partials for. Where
// that takes the sequences of the classes before it, too, these have none.
inline ScheduleLimits bounded(ScheduleLimits limits, const PlanKey& key, const Batch& batch) {
  const std::int64_t query_len =
      batch.max_query_len > 0 ? batch.max_query_len : batch.num_actual_tokens;
  std::int32_t needed = 1;
  while (needed < limits.num_classes &&
         query_len * key.group() > limits.classes[needed - 1].max_seq_rows) {
    ++needed;
  }
  if (needed < limits.num_classes) {
    TileClass& last = limits.classes[needed - 1];
    last.invariant_max_tiles = std::min(last.invariant_max_tiles,
                                        (last.max_seq_rows + last.tile_rows - 1) / last.tile_rows);
    limits.num_classes = needed;
  }
  if (key.policy == SchedulePolicy::kBalanced && limits.classes[needed - 1].takes_smaller) {
    for (std::int32_t c = 0; c < needed - 1; ++c) limits.classes[c].max_seq_rows = 0;
  }
  return limits;
}

// Whether sequences of a batch can be of that class. The last one takes what the others do not.
inline bool can_have_sequences(const ScheduleLimits& limits, std::int32_t tile_class) {
  return tile_class + 1 == limits.num_classes || limits.classes[tile_class].max_seq_rows > 0;
}

}  // namespace diffkv::plan
