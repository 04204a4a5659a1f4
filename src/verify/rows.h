// Comparison of a whole call's rows with the reference.
#pragma once

#include <cstdint>
#include <string>

#include "verify/compare.h"

namespace diffkv::verify {

struct RowsCheck {
  std::int64_t rows = 0;   // (token, head) rows that were compared
  std::int64_t wrong = 0;  // of which were wrong
  double worst_error = 0;
  std::string what;  // of the first wrong row
};

// Compares the covered rows: all of them, or a random sample (always with the first and the last
// row) of what fits in max_work multiply-adds. Runs on all cores.
RowsCheck check_rows(const PlanKey& key, const AttentionParams& params, const AttendArgs& args,
                     const Tolerance& tolerance, std::int64_t max_work, std::uint64_t seed);

}  // namespace diffkv::verify
