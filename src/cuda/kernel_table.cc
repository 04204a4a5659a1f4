#include "cuda/kernel_table.h"

#include <fmt/format.h>

#include <cstdint>
#include <string>

#include "cuda/instances/instances.h"
#include "diffkv/tensor.h"

namespace diffkv::cuda {
namespace {

bool takes_types(const Instance& instance, const PlanKey& key) {
  if (instance.stored != key.key_dtype) return false;
  return is_fp8(instance.stored) ? key.query_dtype != DType::kF32
                                 : key.query_dtype == instance.stored;
}

bool holds(const Instance& instance, const PlanKey& key) {
  return key.head_size_qk <= instance.head_size_qk && key.head_size_v <= instance.head_size_v;
}

std::int64_t room(const Instance& instance) { return instance.head_size_qk + instance.head_size_v; }

}  // namespace

KernelChoice find_mma_kernel(const PlanKey& key, const Gpu& gpu) {
  if (key.key_dtype != key.value_dtype) {
    return {nullptr, fmt::format("keys are {} and values {}, expected one type",
                                 to_string(key.key_dtype), to_string(key.value_dtype))};
  }
  // Rows are copied in units of 16 bytes.
  const std::int64_t unit = 16 / size_of(key.key_dtype);
  if (key.head_size_qk % unit != 0 || key.head_size_v % unit != 0) {
    return {nullptr, fmt::format("head sizes {}/{} of {} are no multiples of 16 bytes",
                                 key.head_size_qk, key.head_size_v, to_string(key.key_dtype))};
  }
  const Instance* best = nullptr;
  bool types = false;
  for (const Instance& instance : instances()) {
    if (!takes_types(instance, key)) continue;
    types = true;
    if (holds(instance, key) && (best == nullptr || room(instance) < room(*best))) {
      best = &instance;
    }
  }
  if (!types) {
    return {nullptr, fmt::format("no kernel for queries of {} and a cache of {}",
                                 to_string(key.query_dtype), to_string(key.key_dtype))};
  }
  if (best == nullptr) {
    return {nullptr,
            fmt::format("no kernel for head sizes {}/{}", key.head_size_qk, key.head_size_v)};
  }
  if (!best->kernel().fits(gpu)) {
    return {nullptr, fmt::format("{} has {} bytes of shared memory a block, too few for {}",
                                 gpu.name, gpu.shared_bytes_per_block, best->kernel().attend.name)};
  }
  return {&best->kernel().attend, ""};
}

KernelChoice find_mma_kernel(const Problem& problem, const Gpu& gpu) {
  if (problem.row_alignment % 16 != 0) {
    return {nullptr,
            fmt::format("rows start at multiples of {} bytes, expected 16", problem.row_alignment)};
  }
  return find_mma_kernel(problem.key, gpu);
}

}  // namespace diffkv::cuda
