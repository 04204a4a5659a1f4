#include "cuda/params.h"

#include <algorithm>
#include <bit>

namespace diffkv::cuda {
namespace {

PlaneParams plane_of(const KvPlane& plane) {
  return {static_cast<const std::byte*>(plane.data), plane.stride_block, plane.stride_token,
          plane.stride_head, plane.dtype};
}

}  // namespace

RowsParams rows_params(const ConstTensorView& view) {
  RowsParams rows{};
  rows.data = static_cast<std::byte*>(const_cast<void*>(view.data));  // inputs are only read
  rows.stride_token = view.strides[0];
  rows.stride_head = view.strides[1];
  rows.dtype = view.dtype;
  return rows;
}

VectorParams vector_params(const ConstTensorView& view) {
  if (!view.given()) return {nullptr, 0, DType::kF32};
  return {view.data, view.shape[0] > 1 ? view.strides[0] : 0, view.dtype};
}

std::int32_t block_shift(std::int64_t block_size) {
  const auto size = static_cast<std::uint64_t>(block_size);
  return std::has_single_bit(size) ? std::countr_zero(size) : -1;
}

AttendKernelParams attend_kernel_params(const AttentionParams& params, const AttendArgs& args,
                                        const Plan& plan) {
  AttendKernelParams p{};
  p.schedule = plan::schedule_view(plan.key(), plan.limits(), plan.tables(), args.batch);
  p.query = rows_params(args.query);
  p.output = rows_params(args.output);
  if (args.lse.given()) {
    p.lse = static_cast<float*>(args.lse.data);
    p.lse_stride_head = args.lse.strides[0];
    p.lse_stride_token = args.lse.strides[1];
  }

  const KvCacheView& cache = args.cache;
  p.key = plane_of(cache.key);
  p.value = plane_of(cache.value);
  p.head_size_qk = static_cast<std::int32_t>(cache.head_size_qk);
  p.head_size_v = static_cast<std::int32_t>(cache.head_size_v);
  p.num_blocks = static_cast<std::int32_t>(cache.num_blocks);
  p.block_size = static_cast<std::int32_t>(cache.block_size);
  p.block_shift = block_shift(cache.block_size);
  if (cache.dense) {
    p.kv_start = static_cast<const std::int32_t*>(args.batch.kv_start.data);
    p.kv_start_stride = args.batch.kv_start.strides[0];
  } else {
    p.block_table = static_cast<const std::int32_t*>(args.batch.block_table.data);
    p.block_table_stride = args.batch.block_table.strides[0];
    p.max_blocks = static_cast<std::int32_t>(args.batch.block_table.shape[1]);
  }

  p.scale = params.scale;
  // Of a larger one, in units of log2, the inverse may be no normal number.
  constexpr float kMostCap = 1e37F;
  p.soft_cap = std::clamp(params.soft_cap, 0.0F, kMostCap);
  p.alibi_sqrt = params.alibi_sqrt;
  p.alibi_slopes = vector_params(params.alibi_slopes);
  if (params.sink_mode == SinkMode::kIn) p.sinks = vector_params(params.sinks);
  p.q_scale = vector_params(params.q_scale);
  p.k_scale = vector_params(cache.k_scale);
  p.v_scale = vector_params(cache.v_scale);
  p.output_scale = vector_params(params.output_scale);
  if (params.qq_bias.given()) {
    p.qq_bias = params.qq_bias.data;
    p.qq_bias_stride_row = params.qq_bias.strides[0];
    p.qq_bias_stride_column = params.qq_bias.strides[1];
    p.qq_bias_size = static_cast<std::int32_t>(params.qq_bias.shape[0]);
    p.qq_bias_dtype = params.qq_bias.dtype;
  }
  return p;
}

}  // namespace diffkv::cuda
