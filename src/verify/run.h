// Runs cases on a backend the way an engine would and judges everything it wrote.
#pragma once

#include <cstdint>
#include <string>

#include "diffkv/backend.h"
#include "verify/cases.h"

namespace diffkv::verify {

struct CaseResult {
  std::string name;
  std::string feature;
  bool supported = false;  // the backend says that it runs the problem
  bool ok = false;         // it ran and everything was right; false where not supported
  double worst_error = 0;  // of the compared output rows
  double tolerance = 0;    // what they may have
  std::int64_t rows = 0;   // (token, head) rows that were compared
  std::string kernel;      // the code path, by the backend
  std::string message;     // why not supported, or the first thing that was wrong
};

// The cache starts poisoned with the context of earlier steps in it; update_cache brings this
// step's tokens (every byte of the cache is compared with what it must be then), a plan is made,
// attend runs; output and lse rows are compared with the reference, and everything else must be
// untouched. `deep` compares every row instead of a sample of big cases, checks the index tensors'
// values, runs both policies, and runs each twice and wants the same bits.
// Never throws for what the backend does: an Error of the library is a wrong result. Of a backend
// that does not compute in host memory everything is copied to its device, guard zones and poison
// included, and back to be judged.
CaseResult run_case(const Backend& backend, const Case& c, std::uint64_t seed, bool deep);
// On that device of the backend instead of its first.
CaseResult run_case(const Backend& backend, const Device& device, const Case& c, std::uint64_t seed,
                    bool deep);

}  // namespace diffkv::verify
