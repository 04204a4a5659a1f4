// The online softmax of one row: sink, merge of two parts, and what is left to do at the end.
#pragma once

#include <cmath>
#include <limits>

#include "core/host_device.h"

namespace diffkv::core {

inline constexpr float kNegInf = -std::numeric_limits<float>::infinity();

// Over the keys seen so far: max of the scores and sum of exp(score - max). No key: -inf and 0.
// GPUs load and store both at once.
struct alignas(8) SoftmaxState {
  float max = kNegInf;
  float sum = 0.0F;
};

// exp(a - b) where -inf - -inf means "nothing there": 0.
DIFFKV_HD inline float exp_difference(float a, float b) {
  return a == kNegInf ? 0.0F : std::exp(a - b);
}

// Adds `other` to `state`; returns by the out-parameters what the two accumulators must be
// multiplied with: acc * keep + other_acc * add.
DIFFKV_HD inline void merge(SoftmaxState& state, const SoftmaxState& other, float& keep,
                            float& add) {
  const float max = state.max > other.max ? state.max : other.max;
  keep = exp_difference(state.max, max);
  add = exp_difference(other.max, max);
  // A NaN score leaves the max alone but makes the sum NaN, also of a part whose max is -inf.
  const bool nan = std::isnan(state.sum) || std::isnan(other.sum);
  state.sum = nan ? std::numeric_limits<float>::quiet_NaN() : state.sum * keep + other.sum * add;
  state.max = max;
}

// A row's end: the factor its accumulator is multiplied with, and its log-sum-exp. A sink of -inf
// is none; one of +inf takes all weight (zeros, lse +inf); one of NaN makes the row NaN. A row that
// saw no key, or only -inf, is zeros: factor 0 (the accumulator must be replaced, not multiplied,
// because 0 * inf is NaN: see `empty`).
struct SoftmaxEnd {
  float factor = 0.0F;
  float lse = kNegInf;
  bool empty = false;
};

DIFFKV_HD inline SoftmaxEnd finish(SoftmaxState state, float sink) {
  SoftmaxEnd end;
  end.empty = state.max == kNegInf && state.sum == 0.0F && !std::isnan(sink);
  if (end.empty) {
    end.lse = sink;
    return end;
  }
  if (std::isnan(state.sum) || std::isnan(sink)) {
    end.factor = end.lse = std::numeric_limits<float>::quiet_NaN();
    return end;
  }
  if (sink == std::numeric_limits<float>::infinity()) {
    end.lse = sink;
    return end;
  }
  const float max = sink > state.max ? sink : state.max;
  const float keep = exp_difference(state.max, max);
  const float sum = state.sum * keep + exp_difference(sink, max);
  end.factor = keep / sum;
  end.lse = max + std::log(sum);
  return end;
}

}  // namespace diffkv::core
