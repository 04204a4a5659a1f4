// The ways in which run_case calls the library.
#pragma once

#include <cstdint>
#include <string>

#include "diffkv/backend.h"
#include "verify/generate.h"

namespace diffkv::verify {

// Memory for a plan: poisoned with NaN, between guard zones, 64-byte aligned.
class PlanMemory {
 public:
  PlanMemory(const Backend& backend, const PlanKey& key, const PlanMaxima& maxima);

  const TensorView& view() const { return view_; }
  std::string guard_damage() const { return memory_.guard_damage(); }

 private:
  GuardedBuffer memory_;
  TensorView view_;
};

// Each runs one call of attention into the problem's output and returns "" or what was wrong that
// is not a matter of the output's values. They throw what the library throws.
std::string attend_by_stages(const Backend& backend, const GeneratedProblem& problem);
std::string attend_by_layer(const Backend& backend, GeneratedProblem& problem);
// Two parts, each with its own plan, lse and no sinks, merged into the problem's output.
std::string attend_by_merge(const Backend& backend, const GeneratedProblem& problem);

}  // namespace diffkv::verify
