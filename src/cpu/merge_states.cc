// Two parts of a split attention into one.
#include "cpu/merge_states.h"

#include <cmath>
#include <limits>

#include "core/dtype.h"
#include "core/softmax.h"

namespace diffkv::cpu {
namespace {

float lse_at(const ConstTensorView& lse, std::int64_t token, std::int64_t head) {
  const float x =
      static_cast<const float*>(lse.data)[head * lse.strides[0] + token * lse.strides[1]];
  if (x == std::numeric_limits<float>::infinity()) return core::kNegInf;
  return x;
}

}  // namespace

void merge_row(const MergeCall& call, std::int64_t token, std::int64_t head) {
  // exp(lse) is a sum of exps: as softmax states the parts have max = lse and sum = 1, and their
  // outputs are already divided by that sum.
  const float lse_a = lse_at(call.a.lse, token, head);
  const float lse_b = lse_at(call.b.lse, token, head);
  core::SoftmaxState state{lse_a, lse_a == core::kNegInf ? 0.0F : 1.0F};
  const core::SoftmaxState other{lse_b, lse_b == core::kNegInf ? 0.0F : 1.0F};
  float keep = 0.0F;
  float add = 0.0F;
  core::merge(state, other, keep, add);
  if (std::isnan(lse_a) || std::isnan(lse_b)) state.sum = std::numeric_limits<float>::quiet_NaN();
  const float sink = call.sinks.given() ? core::load_element(call.sinks.dtype, call.sinks.data,
                                                             head * call.sinks.strides[0])
                                        : core::kNegInf;
  const core::SoftmaxEnd end = core::finish(state, sink);

  const std::int64_t head_size = call.output.shape[2];
  const auto row_of = [&](const auto& tensor) {
    return tensor.strides[0] * token + tensor.strides[1] * head;
  };
  constexpr std::int64_t kChunk = 64;
  float row[kChunk];
  for (std::int64_t c = 0; c < head_size; c += kChunk) {
    const std::int64_t count = head_size - c < kChunk ? head_size - c : kChunk;
    for (std::int64_t i = 0; i < count; ++i) {
      float sum = 0.0F;
      // A part that saw nothing is left out: its rows may hold anything.
      if (lse_a != core::kNegInf) {
        sum += keep * core::load_element(call.a.output.dtype, call.a.output.data,
                                         row_of(call.a.output) + c + i);
      }
      if (lse_b != core::kNegInf) {
        sum += add * core::load_element(call.b.output.dtype, call.b.output.data,
                                        row_of(call.b.output) + c + i);
      }
      row[i] = end.empty ? 0.0F : sum * end.factor;
    }
    auto* to = static_cast<std::byte*>(call.output.data) +
               (row_of(call.output) + c) * size_of(call.output.dtype);
    core::store_row(call.output.dtype, row, count, to);
  }
  if (call.lse.given()) {
    static_cast<float*>(call.lse.data)[head * call.lse.strides[0] + token * call.lse.strides[1]] =
        end.lse;
  }
}

}  // namespace diffkv::cpu
