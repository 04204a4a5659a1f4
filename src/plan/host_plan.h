// The planner on the host.
#pragma once

#include "diffkv/batch.h"
#include "diffkv/plan.h"

namespace diffkv::plan {

// Fills the tables for a batch in host memory.
void plan_on_host(const PlanKey& key, const ScheduleLimits& limits, const Batch& batch,
                  detail::PlanTables& tables);

}  // namespace diffkv::plan
