#include "cuda/dispatch.h"

#include <fmt/format.h>

#include <cstdlib>
#include <string>
#include <string_view>

#ifdef DIFFKV_HAS_MMA
#include "cuda/kernel_table.h"
#endif

namespace diffkv::cuda {
namespace {

constexpr const char* kVariable = "DIFFKV_CUDA_KERNEL";

// `what` is a PlanKey or a Problem.
template <class What>
Choice choose(const What& what, const Gpu& gpu, std::string_view wanted) {
  if (!wanted.empty() && wanted != "fp32" && wanted != "mma") {
    return {nullptr, fmt::format("{} is \"{}\", expected fp32 or mma", kVariable, wanted)};
  }
  if (wanted == "fp32") return {&attend_fp32(), ""};
#ifdef DIFFKV_HAS_MMA
  const KernelChoice mma = find_mma_kernel(what, gpu);
  if (mma.kernel != nullptr) return {mma.kernel, ""};
  const std::string& reason = mma.reason;
#else
  static_cast<void>(what);
  static_cast<void>(gpu);
  const std::string reason = "this build has no mma kernels";
#endif
  if (wanted == "mma") return {nullptr, fmt::format("{} is mma: {}", kVariable, reason)};
  return {&attend_fp32(), ""};
}

}  // namespace

std::string_view wanted_kernel() {
  static const std::string wanted = [] {
    const char* value = std::getenv(kVariable);
    return std::string(value == nullptr ? "" : value);
  }();
  return wanted;
}

Choice choose_kernel(const PlanKey& key, const Gpu& gpu, std::string_view wanted) {
  return choose(key, gpu, wanted);
}
Choice choose_kernel(const Problem& problem, const Gpu& gpu, std::string_view wanted) {
  return choose(problem, gpu, wanted);
}

}  // namespace diffkv::cuda
