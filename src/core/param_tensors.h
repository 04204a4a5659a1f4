// The tensors among a layer's parameters, for rules that hold for all of them alike.
#pragma once

#include <array>
#include <string_view>

#include "diffkv/attention.h"

namespace diffkv::core {

struct NamedTensor {
  std::string_view name;
  const ConstTensorView* view = nullptr;
};

using ParamTensors = std::array<NamedTensor, 5>;

// Given or not; the pointers are into `params`.
ParamTensors param_tensors(const AttentionParams& params);

}  // namespace diffkv::core
