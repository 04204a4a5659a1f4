// Merging two parts of a split attention, one row at a time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "diffkv/attention.h"

namespace diffkv::cpu {

struct MergeCall {
  AttnState a;
  AttnState b;
  ConstTensorView sinks;
  TensorView output;
  TensorView lse;
};

void merge_row(const MergeCall& call, std::int64_t token, std::int64_t head);

}  // namespace diffkv::cpu
