// The ways in which run_case calls the library.
#pragma once

#include <cstdint>
#include <string>

#include "diffkv/backend.h"
#include "verify/placed.h"

namespace diffkv::verify {

// A plan's workspace between guard zones.
class PlanMemory {
 public:
  PlanMemory(const Backend& backend, const PlanKey& key, const PlanMaxima& maxima,
             const Device& device);

  const TensorView& view() const { return view_; }
  std::string guard_damage() const { return memory_.guard_damage(); }

 private:
  GuardedMemory memory_;
  TensorView view_;
};

// Each runs one call of attention into the problem's output in the backend's memory, waits for it,
// and returns "" or what was wrong that is not a matter of the output's values. They throw what the
// library throws.
std::string attend_by_stages(const PlacedProblem& problem);
std::string attend_by_layer(PlacedProblem& problem);
// Two parts, each with its own plan, lse and no sinks, merged into the problem's output.
std::string attend_by_merge(const PlacedProblem& problem);

}  // namespace diffkv::verify
