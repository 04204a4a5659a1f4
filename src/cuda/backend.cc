// Launches the stages on the caller's stream.
#include "cuda/backend.h"

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "core/validate.h"
#include "cuda/device.h"
#include "diffkv/error.h"

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
    } catch (const Error& error) {
      return {false, error.what(), ""};
    }
    return {false, "this build has no attention kernel", ""};
  }

  ScheduleLimits limits(const PlanKey& key, std::int32_t /*threads*/) const override {
    throw_unsupported(to_string(key));
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

  void plan(const PlanKey& /*key*/, const ScheduleLimits& /*limits*/, const Batch& /*batch*/,
            detail::PlanTables& /*tables*/, Stream /*stream*/) const override {
    throw_unsupported("plan");
  }
  void update_cache(const ConstTensorView& /*key*/, const ConstTensorView& /*value*/,
                    const KvCacheView& /*cache*/, const ConstTensorView& /*slot_mapping*/,
                    Stream /*stream*/) const override {
    throw_unsupported("update_cache");
  }
  void attend(const AttentionParams& /*params*/, const AttendArgs& /*args*/, const Plan& /*plan*/,
              Stream /*stream*/) const override {
    throw_unsupported("attend");
  }
  void combine(const AttentionParams& /*params*/, const AttendArgs& /*args*/, const Plan& /*plan*/,
               Stream /*stream*/) const override {
    throw_unsupported("combine");
  }
  void merge_attn_states(const AttnState& /*a*/, const AttnState& /*b*/,
                         const ConstTensorView& /*sinks*/, const TensorView& /*output*/,
                         const TensorView& /*lse*/, Stream /*stream*/) const override {
    throw_unsupported("merge_attn_states");
  }
  void fill_zero(const TensorView& /*output*/, Stream /*stream*/) const override {
    throw_unsupported("fill_zero");
  }

 private:
  static void copy(void* to, const void* from, std::int64_t bytes, const Device& device,
                   Stream stream, cudaMemcpyKind kind) {
    if (bytes == 0) return;
    const DeviceGuard guard(device);
    DIFFKV_CUDA_CALL(
        cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), kind, handle_of(stream)));
  }

  [[noreturn]] static void throw_unsupported(std::string_view what) {
    throw Error(ErrorCode::kUnsupported, fmt::format("backend cuda does not run {}", what));
  }
};

}  // namespace

const Backend& backend() {
  static const CudaBackend instance;
  return instance;
}

}  // namespace diffkv::cuda
