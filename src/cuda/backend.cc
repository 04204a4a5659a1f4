// Launches the stages on the caller's stream.
#include "cuda/backend.h"

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "core/problem.h"
#include "core/validate.h"
#include "cuda/attend_kernel.h"
#include "cuda/device.h"
#include "cuda/dispatch.h"
#include "cuda/params.h"
#include "cuda/stages.h"
#include "diffkv/error.h"
#include "plan/classes.h"

namespace diffkv::cuda {
namespace {

class CudaBackend final : public Backend {
 public:
  std::string_view name() const override { return "cuda"; }
  DeviceType device_type() const override { return DeviceType::kCuda; }

  std::string description() const override {
    if (!gpus().unavailable.empty()) return fmt::format("CUDA, {}", gpus().unavailable);
    const Gpu& first = gpus().list[0];
    return fmt::format("CUDA, {} x {} (sm_{}, {} SMs, {:.0f} GB)", gpus().list.size(), first.name,
                       first.capability(), first.num_sms,
                       static_cast<double>(first.memory_bytes) * 1e-9);
  }

  Support available() const override {
    if (!gpus().unavailable.empty()) return {false, gpus().unavailable, ""};
    return {true, "", fmt::format("cuda/sm_{}", gpus().list[0].capability())};
  }

  Support supports(const Problem& problem) const override {
    try {
      core::validate_key(problem.key);
      core::validate_output_dtype(problem.key, problem.output_scale, problem.output_dtype);
      if (!problem.dense && problem.block_size < 1) return {false, "block_size is below 1", ""};
      if (problem.output_block_scale) return {false, "output_block_scale is not supported", ""};
      const Gpu& gpu = current_gpu();
      const Choice choice = choose_kernel(problem, gpu);
      if (choice.kernel == nullptr) return {false, choice.reason, ""};
      return {true, "", fmt::format("{}/sm_{}", choice.kernel->name, gpu.capability())};
    } catch (const Error& error) {
      return {false, error.what(), ""};
    }
  }

  ScheduleLimits limits(const PlanKey& key, std::int32_t /*threads*/) const override {
    const Gpu& gpu = current_gpu();
    return kernel_of(key, gpu).limits(key, gpu);
  }

  void* allocate(std::int64_t bytes, const Device& device) const override {
    const DeviceGuard guard(device);
    void* data = nullptr;
    const auto size = static_cast<std::size_t>(std::max<std::int64_t>(bytes, 1));
    const cudaError_t status = cudaMalloc(&data, size);
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      throw Error(ErrorCode::kUnavailable,
                  fmt::format("no memory for {} bytes on {}", bytes, to_string(device)));
    }
    check(status, "cudaMalloc");
    return data;
  }

  void deallocate(void* data, const Device& /*device*/) const noexcept override {
    // An address says which device it is on; at the program's end the runtime may be gone, and the
    // memory with it.
    cudaFree(data);
  }

  void copy_to_device(void* to, const void* from, std::int64_t bytes, const Device& device,
                      Stream stream) const override {
    copy(to, from, bytes, device, stream, cudaMemcpyHostToDevice);
  }

  void copy_to_host(void* to, const void* from, std::int64_t bytes, const Device& device,
                    Stream stream) const override {
    copy(to, from, bytes, device, stream, cudaMemcpyDeviceToHost);
  }

  void fill_bytes(void* data, std::uint8_t value, std::int64_t bytes, const Device& device,
                  Stream stream) const override {
    if (bytes == 0) return;
    const DeviceGuard guard(device);
    DIFFKV_CUDA_CALL(
        cudaMemsetAsync(data, value, static_cast<std::size_t>(bytes), handle_of(stream)));
  }

  void synchronize(const Device& device, Stream stream) const override {
    const DeviceGuard guard(device);
    DIFFKV_CUDA_CALL(cudaStreamSynchronize(handle_of(stream)));
  }

  void plan(const PlanKey& key, const ScheduleLimits& limits, const Batch& batch,
            detail::PlanTables& tables, Stream stream) const override {
    const DeviceGuard guard(batch.query_start_loc.device);
    plan_on_device(key, limits, batch, tables, gpu(batch.query_start_loc.device.index),
                   handle_of(stream));
  }

  void update_cache(const ConstTensorView& key, const ConstTensorView& value,
                    const KvCacheView& cache, const ConstTensorView& slot_mapping,
                    Stream stream) const override {
    const DeviceGuard guard(cache.device);
    cuda::update_cache(key, value, cache, slot_mapping, gpu(cache.device.index), handle_of(stream));
  }

  bool attend(const AttentionParams& params, const AttendArgs& args, const Plan& plan,
              Stream stream) const override {
    if (plan.tables().num_seqs == 0) return false;
    const DeviceGuard guard(args.query.device);
    const AttendKernel& kernel = kernel_of(params, args, plan);
    AttendKernelParams p = attend_kernel_params(params, args, plan);
    // Pieces of kBatchInvariant plans may be any number a worker, and their tiles' parts anywhere.
    p.merges_tiles = kernel.can_merge_tiles && plan.key().policy == SchedulePolicy::kBalanced;
    // The classes of the largest tiles first: what is left over then is small.
    const std::int32_t classes = plan.limits().num_classes;
    for (std::int32_t c = classes - 1; c >= 0; --c) {
      if (!plan::can_have_sequences(plan.limits(), c)) continue;
      p.after_sibling = c < classes - 1;
      kernel.launch(p, c, handle_of(stream));
    }
    return !p.merges_tiles;
  }

  void combine(const AttentionParams& params, const AttendArgs& args, const Plan& plan,
               Stream stream) const override {
    const DeviceGuard guard(args.query.device);
    cuda::combine(attend_kernel_params(params, args, plan), gpu(args.query.device.index),
                  handle_of(stream));
  }

  void merge_attn_states(const AttnState& a, const AttnState& b, const ConstTensorView& sinks,
                         const TensorView& output, const TensorView& lse,
                         Stream stream) const override {
    const DeviceGuard guard(output.device);
    cuda::merge_attn_states(a, b, sinks, output, lse, handle_of(stream));
  }

  void fill_zero(const TensorView& output, Stream stream) const override {
    const DeviceGuard guard(output.device);
    cuda::fill_zero(output, handle_of(stream));
  }

 private:
  static void copy(void* to, const void* from, std::int64_t bytes, const Device& device,
                   Stream stream, cudaMemcpyKind kind) {
    if (bytes == 0) return;
    const DeviceGuard guard(device);
    DIFFKV_CUDA_CALL(
        cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), kind, handle_of(stream)));
  }

  static const AttendKernel& kernel_of(const PlanKey& key, const Gpu& gpu) {
    const Choice choice = choose_kernel(key, gpu);
    if (choice.kernel == nullptr) core::refuse_problem("cuda", key, choice.reason);
    return *choice.kernel;
  }

  // The kernel for this call. The fp32 kernel takes any plan's tile classes and an empty pool.
  static const AttendKernel& kernel_of(const AttentionParams& params, const AttendArgs& args,
                                       const Plan& plan) {
    const KvCacheView& cache = args.cache;
    const bool empty = cache.num_blocks == 0 || cache.block_size == 0 ||
                       (!cache.dense && args.batch.block_table.shape[1] == 0);
    if (empty) return attend_fp32();
    const Gpu& on = gpu(args.query.device.index);
    const Choice choice = choose_kernel(core::problem_of(plan.key(), params, args), on);
    if (choice.kernel == nullptr) core::refuse_problem("cuda", plan.key(), choice.reason);
    if (choice.kernel != &attend_fp32()) {
      check_classes(*choice.kernel, choice.kernel->limits(plan.key(), on), plan.limits());
    }
    return *choice.kernel;
  }

  // Only another choice of kernels since the plan was made makes these differ. Plans leave out the
  // last classes where they can have no work.
  static void check_classes(const AttendKernel& kernel, const ScheduleLimits& own,
                            const ScheduleLimits& planned) {
    bool same = own.num_classes >= planned.num_classes;
    for (std::int32_t c = 0; same && c < planned.num_classes; ++c) {
      same = own.classes[c].tile_rows == planned.classes[c].tile_rows &&
             own.classes[c].block_keys == planned.classes[c].block_keys &&
             own.classes[c].workers == planned.classes[c].workers;
    }
    if (same) return;
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("the plan was made for other tile classes than those of kernel {}",
                            kernel.name));
  }
};

}  // namespace

const Backend& backend() {
  static const CudaBackend instance;
  return instance;
}

}  // namespace diffkv::cuda
