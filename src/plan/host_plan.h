// The planner on the host.
#pragma once

#include <cstdint>

#include "diffkv/batch.h"
#include "diffkv/plan.h"

namespace diffkv::plan {

// Fills the tables for a batch in host memory.
void plan_on_host(const PlanKey& key, const ScheduleLimits& limits, const Batch& batch,
                  detail::PlanTables& tables);

// Whether any tile is cut, so that there is something to combine. Host tables only.
inline bool cuts_tiles(const ScheduleLimits& limits, SchedulePolicy policy,
                       const detail::PlanTables& tables) {
  if (policy == SchedulePolicy::kBatchInvariant) return tables.num_slots > 0;
  for (std::int32_t c = 0; c < limits.num_classes; ++c) {
    const TileClass& cls = limits.classes[c];
    for (std::int32_t share = 0; share < cls.workers / cls.head_lanes; ++share) {
      if (tables.starts[c][share].block > 0) return true;
    }
  }
  return false;
}

}  // namespace diffkv::plan
