// What a backend is asked about before it runs something.
#pragma once

#include <string_view>

#include "diffkv/attention.h"

namespace diffkv::core {

// The problem that a call of attend poses.
Problem problem_of(const PlanKey& key, const AttentionParams& params, const AttendArgs& args);

// The part of it known when a layer is made: no batch, no cache yet.
Problem problem_of(const PlanKey& key, const AttentionParams& params, DType output_dtype);

// Throws Error(kUnsupported): the backend of that name does not run problems of this key.
[[noreturn]] void refuse_problem(std::string_view backend, const PlanKey& key,
                                 std::string_view reason);

}  // namespace diffkv::core
