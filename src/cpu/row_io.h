// A finished row on its way out: sink, lse, scales and output type.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/softmax.h"
#include "cpu/kernels.h"
#include "diffkv/attention.h"

namespace diffkv::cpu {

// An fp32 scale tensor of 1 or num_kv_heads elements; 1 if it is not given.
inline float scale_of(const ConstTensorView& scale, std::int64_t head) {
  if (!scale.given()) return 1.0F;
  const std::int64_t at = scale.shape[0] > 1 ? head * scale.strides[0] : 0;
  return static_cast<const float*>(scale.data)[at];
}

// The sink logit of a head, -inf where there is none or it is left out.
inline float sink_of(const AttentionParams& params, std::int64_t head) {
  if (!params.sinks.given() || params.sink_mode == SinkMode::kOut) return core::kNegInf;
  return core::load_element(params.sinks.dtype, params.sinks.data, head * params.sinks.strides[0]);
}

// Writes row (token, head): `acc` [head_size_v] is sum p v without scales, overwritten on the way.
inline void write_row(const AttendCall& call, std::int64_t token, std::int64_t head,
                      std::int64_t kv_head, core::SoftmaxState state, float* acc) {
  const AttentionParams& params = *call.params;
  const AttendArgs& args = *call.args;
  const core::SoftmaxEnd end = core::finish(state, sink_of(params, head));
  const std::int64_t head_size_v = args.cache.head_size_v;
  const float factor = end.factor * scale_of(args.cache.v_scale, kv_head);
  if (end.empty) {
    for (std::int64_t d = 0; d < head_size_v; ++d) acc[d] = 0.0F;
  } else {
    for (std::int64_t d = 0; d < head_size_v; ++d) acc[d] *= factor;
  }
  if (params.output_scale.given()) {
    const float output_scale = *static_cast<const float*>(params.output_scale.data);
    for (std::int64_t d = 0; d < head_size_v; ++d) acc[d] /= output_scale;
  }
  const TensorView& output = args.output;
  auto* row = static_cast<std::byte*>(output.data) +
              (token * output.strides[0] + head * output.strides[1]) * size_of(output.dtype);
  core::store_row(output.dtype, acc, head_size_v, row);
  if (args.lse.given()) {
    static_cast<float*>(args.lse.data)[head * args.lse.strides[0] + token * args.lse.strides[1]] =
        end.lse;
  }
}

}  // namespace diffkv::cpu
