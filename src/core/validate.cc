// Rules about what a layer and its plans are made for.
#include "core/validate.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string_view>

#include "core/param_tensors.h"
#include "core/rules.h"

namespace diffkv::core {
namespace {

// A power of two well below int32's end, so that kernels may round key positions up.
constexpr std::int64_t kMaxSeqLen = std::int64_t{1} << 30;
constexpr std::int64_t kMaxCount = kMaxInt32 - 1;  // offsets tables have one more entry
constexpr std::int64_t kWorkspaceAlignment = 64;

constexpr std::array kBiasDTypes = {DType::kF32, DType::kBF16};
constexpr std::array kOutputOfE4M3 = {DType::kF16, DType::kBF16};

void check_range(std::string_view name, std::int64_t value, std::int64_t low, std::int64_t high) {
  if (value < low || value > high) refuse("{} is {}, expected {} to {}", name, value, low, high);
}

void check_mask(const PlanKey& key) {
  const Mask& mask = key.mask;
  if (mask.chunk_size > 0 && mask.prefix_window > 0) {
    refuse("mask has chunk_size {} and prefix_window {}, expected at most one of them",
           mask.chunk_size, mask.prefix_window);
  }
  if (mask.chunk_size > 0 && mask.chunk_lookback < 0) {
    refuse("mask has chunk_lookback {}, expected 0 or more", mask.chunk_lookback);
  }
  if (mask.clamp_mm_ranges && !key.mm_ranges) {
    refuse("mask has clamp_mm_ranges, expected mm_ranges in the key");
  }
}

void check_biases(const PlanKey& key, const AttentionParams& params) {
  const Dim heads = exactly("num_heads", key.num_heads, "the layer was built for");
  if (params.alibi_slopes.given()) {
    check_tensor("alibi_slopes", params.alibi_slopes, DType::kF32, {heads});
    check_last_contiguous("alibi_slopes", params.alibi_slopes);
  } else if (params.alibi_sqrt) {
    refuse("alibi_sqrt is set and alibi_slopes is not given, expected both");
  }
  if (params.qq_bias.given()) {
    check_tensor(
        "qq_bias", params.qq_bias, kBiasDTypes,
        {any_extent("rows"), exactly("columns", params.qq_bias.shape[0], "expected as its rows")});
    check_last_contiguous("qq_bias", params.qq_bias);
  }
  if (params.sinks.given()) {
    check_tensor("sinks", params.sinks, kPlainDTypes, {heads});
    check_last_contiguous("sinks", params.sinks);
  }
}

// The tensors among the parameters share a device with each other.
void check_params_device(const AttentionParams& params) {
  const NamedTensor* first = nullptr;
  const ParamTensors tensors = param_tensors(params);
  for (const NamedTensor& tensor : tensors) {
    if (!tensor.view->given()) continue;
    if (first == nullptr) first = &tensor;
    check_device(tensor.name, tensor.view->device, first->name, first->view->device);
  }
}

}  // namespace

ParamTensors param_tensors(const AttentionParams& params) {
  return {{{"alibi_slopes", &params.alibi_slopes},
           {"qq_bias", &params.qq_bias},
           {"sinks", &params.sinks},
           {"q_scale", &params.q_scale},
           {"output_scale", &params.output_scale}}};
}

void validate_key(const PlanKey& key) {
  check_range("num_heads", key.num_heads, 1, kMaxInt32);
  check_range("num_kv_heads", key.num_kv_heads, 1, kMaxInt32);
  if (key.num_heads % key.num_kv_heads != 0) {
    refuse("num_heads is {}, expected a multiple of num_kv_heads {}", key.num_heads,
           key.num_kv_heads);
  }
  check_head_size("head_size_qk", key.head_size_qk);
  check_head_size("head_size_v", key.head_size_v);
  check_dtype("query_dtype", key.query_dtype, kQueryDTypes);
  check_dtype("key_dtype", key.key_dtype, kKvDTypes);
  check_dtype("value_dtype", key.value_dtype, kKvDTypes);
  check_mask(key);
  if (key.policy != SchedulePolicy::kBalanced && key.policy != SchedulePolicy::kBatchInvariant) {
    refuse("policy is {}, expected kBalanced or kBatchInvariant", static_cast<int>(key.policy));
  }
}

void validate_maxima(const PlanKey& key, const PlanMaxima& maxima) {
  // Rows, (token, head) pairs, are counted in int32.
  check_range("max_tokens", maxima.max_tokens, 0, kMaxInt32 / key.num_heads);
  check_range("max_seqs", maxima.max_seqs, 0, kMaxCount);
  check_range("max_seq_len", maxima.max_seq_len, 0, kMaxSeqLen);
  check_range("max_mm_ranges", maxima.max_mm_ranges, 0, kMaxInt32 / 2);
}

void validate_workspace(const TensorView& workspace, std::int64_t bytes, const Device& device) {
  check_tensor("workspace", workspace, DType::kU8, {at_least("bytes", bytes, "the plan needs")});
  check_last_contiguous("workspace", workspace);
  check_device("workspace", workspace.device, "the batch", device);
  if (reinterpret_cast<std::uintptr_t>(workspace.data) % kWorkspaceAlignment != 0) {
    refuse("workspace starts {} bytes past a multiple of {}, expected that alignment",
           reinterpret_cast<std::uintptr_t>(workspace.data) % kWorkspaceAlignment,
           kWorkspaceAlignment);
  }
}

void validate_output_dtype(const PlanKey& key, bool output_scale, DType output_dtype) {
  if (output_scale != (output_dtype == DType::kE4M3)) {
    refuse("output is {} and output_scale is {}, expected output_scale with fp8_e4m3 only",
           to_string(output_dtype), output_scale ? "given" : "not given");
  }
  if (output_scale) return;
  if (key.query_dtype == DType::kE4M3) {
    check_dtype("output of fp8_e4m3 queries", output_dtype, kOutputOfE4M3);
  } else if (output_dtype != key.query_dtype) {
    refuse("output is {}, expected {} as the queries (or output_scale and fp8_e4m3)",
           to_string(output_dtype), to_string(key.query_dtype));
  }
}

PlanKey normalised(PlanKey key) {
  Mask& mask = key.mask;
  for (std::int32_t* width : {&mask.window, &mask.chunk_size, &mask.prefix_window}) {
    *width = std::max(*width, 0);
  }
  if (mask.chunk_size == 0) mask.chunk_lookback = 0;
  // They replace the sliding window, but for multimodal ranges clamped to it.
  if ((mask.chunk_size > 0 || mask.prefix_window > 0) && !mask.clamp_mm_ranges) mask.window = 0;
  if (mask.window == 0) mask.clamp_mm_ranges = false;
  if (key.causal_per_seq) mask.causal = true;
  return key;
}

void validate_device(const Backend& backend, std::string_view what, const Device& device) {
  if (device.type == backend.device_type()) return;
  refuse("{} is on {}, backend {} runs on {}", what, to_string(device), backend.name(),
         to_string(Device{backend.device_type(), 0}));
}

void validate_params(const PlanKey& key, const AttentionParams& params, DType output_dtype) {
  if (!std::isfinite(params.scale)) refuse("scale is {}, expected a finite number", params.scale);
  if (!std::isfinite(params.soft_cap)) {
    refuse("soft_cap is {}, expected a finite number (0 or less: none)", params.soft_cap);
  }
  if (params.soft_cap > 0.0F && params.soft_cap < std::numeric_limits<float>::min()) {
    refuse("soft_cap is {}, expected at least {} (0 or less: none)", params.soft_cap,
           std::numeric_limits<float>::min());
  }
  if (params.output_block_scale.given()) {
    throw Error(ErrorCode::kUnsupported,
                "output_block_scale is given, expected none: per-block output scales are not "
                "supported, only output_scale is");
  }
  check_biases(key, params);
  if (params.q_scale.given() != (key.query_dtype == DType::kE4M3)) {
    refuse("q_scale is {} and queries are {}, expected q_scale with fp8_e4m3 queries only",
           params.q_scale.given() ? "given" : "not given", to_string(key.query_dtype));
  }
  if (params.q_scale.given()) {
    check_tensor("q_scale", params.q_scale, DType::kF32, {exactly("elements", 1)});
  }
  if (params.output_scale.given()) {
    check_tensor("output_scale", params.output_scale, DType::kF32, {exactly("elements", 1)});
  }
  validate_output_dtype(key, params.output_scale.given(), output_dtype);
  if (params.sink_mode != SinkMode::kIn && params.sink_mode != SinkMode::kOut) {
    refuse("sink_mode is {}, expected kIn or kOut", static_cast<int>(params.sink_mode));
  }
  check_params_device(params);
}

}  // namespace diffkv::core
