// Comparison of what was written with the reference, row by row.
#pragma once

#include <cstdint>
#include <string>

#include "diffkv/attention.h"
#include "verify/reference.h"

namespace diffkv::verify {

// Bounds on a row's errors, see check_row.
struct Tolerance {
  double output = 0;
  double lse = 0;
};

// output: 1e-5 fp32, 1e-3 fp16, 6e-3 bf16 (the coarser of query and output), 5e-2 with fp8 queries.
// An e4m3 output has the bound of its queries: the half unit in the last place that the rounding to
// e4m3 may cost (2^-4 relative, 2^-10 below the smallest normal) is taken off each element's error
// first, see check_row. lse: 1e-4, with 16-bit or fp8 queries 1e-3.
Tolerance tolerance(const PlanKey& key, DType output_dtype);

struct RowCheck {
  bool ok = false;
  double error = 0;      // of the output; infinite where NaN or infinities are misplaced
  double lse_error = 0;  // 0 if lse was not asked for
  std::string what;      // of a failure: token, head, errors, first bad element
};

// Compares row (token, head) of args.output, and of args.lse where given, with the reference.
//  - error = |o - ref| / max(|ref|, floor), 2-norms over the row. floor = sqrt(head_size_v) x the
//    smallest normal of the output type: below it the type has no relative precision.
//  - A reference of exact zeros (no visible key) must be met exactly.
//  - NaN and infinities must be in the same places. Where the reference is finite but rounds past
//    the largest finite value of a 16-bit output, infinity is right (and the largest finite value
//    is within the error); an e4m3 output saturates there, and also where the reference is
//    infinite.
//  - lse_error = |lse - ref| / max(1, |ref|).
RowCheck check_row(const RowRef& reference, const AttendArgs& args, std::int64_t token,
                   std::int64_t head, const Tolerance& tolerance);

}  // namespace diffkv::verify
