// What `diffkv plan` says about a plan.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "diffkv/plan.h"

namespace diffkv::cli {

// What one worker has to do.
struct Share {
  std::int64_t items = 0;
  std::int64_t cut = 0;  // items that are part of a tile
  std::int64_t rows = 0;
  std::int64_t keys = 0;
  std::int64_t cost = 0;  // every piece pays its tile's fixed cost
};

// A plan in words and numbers: classes, shares, balance, slots.
class PlanReport {
 public:
  // `workspace` is its size in bytes; `with_items` lists every piece of work as well.
  PlanReport(const Plan& plan, const Batch& batch, std::int64_t workspace, bool with_items);

  std::string text() const;
  nlohmann::json json() const;

 private:
  std::int64_t slots_used() const;

  const Plan& plan_;
  const Batch& batch_;
  std::int64_t workspace_;
  bool with_items_;
  std::vector<WorkItem> items_;
  std::vector<std::vector<Share>> shares_;  // [class][worker]
};

}  // namespace diffkv::cli
