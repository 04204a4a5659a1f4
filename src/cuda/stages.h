// The stages' launches. All of them enqueue on a stream of `gpu`, the current device, allocate
// nothing and wait for nothing; which kernels run depends on shapes, types and the batch's bound on
// query lengths alone. They throw Error if a launch is refused.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/device.h"
#include "cuda/params.h"
#include "diffkv/attention.h"
#include "diffkv/batch.h"
#include "diffkv/cache.h"
#include "diffkv/plan.h"
#include "diffkv/tensor.h"

namespace diffkv::cuda {

// Fills the tables from lengths in device memory.
void plan_on_device(const PlanKey& key, const ScheduleLimits& limits, const Batch& batch,
                    const detail::PlanTables& tables, const Gpu& gpu, cudaStream_t stream);

void update_cache(const ConstTensorView& key, const ConstTensorView& value,
                  const KvCacheView& cache, const ConstTensorView& slot_mapping, const Gpu& gpu,
                  cudaStream_t stream);

// Partials of every class to outputs.
void combine(const AttendKernelParams& params, const Gpu& gpu, cudaStream_t stream);

void merge_attn_states(const AttnState& a, const AttnState& b, const ConstTensorView& sinks,
                       const TensorView& output, const TensorView& lse, cudaStream_t stream);

void fill_zero(const TensorView& output, cudaStream_t stream);

}  // namespace diffkv::cuda
