#include "cuda/launch.h"

namespace diffkv::cuda {
namespace {

// Stands for all kernels: a build has code for 9.0 and later of all or of none.
__global__ void compiled_like_all() {}

enum class Answer : int { kUnknown, kNo, kYes };

Answer ask(const Gpu& gpu) {
  constexpr int kLeast = 90;           // what dependent_launch.cuh needs
  constexpr int kLeastDriver = 12030;  // that records such launches in graphs
  if (gpu.capability() < kLeast) return Answer::kNo;
  int driver = 0;
  DIFFKV_CUDA_CALL(cudaDriverGetVersion(&driver));
  if (driver < kLeastDriver) return Answer::kNo;
  cudaFuncAttributes attributes{};
  DIFFKV_CUDA_CALL(cudaFuncGetAttributes(&attributes, compiled_like_all));
  return attributes.ptxVersion >= kLeast ? Answer::kYes : Answer::kNo;
}

}  // namespace

bool can_start_early(const Gpu& gpu) {
  static std::array<std::atomic<Answer>, kMostGpus> answers{};
  std::atomic<Answer>& answer = answers[static_cast<std::size_t>(gpu.index)];
  if (answer.load(std::memory_order_relaxed) == Answer::kUnknown) {
    answer.store(ask(gpu), std::memory_order_relaxed);
  }
  return answer.load(std::memory_order_relaxed) == Answer::kYes;
}

}  // namespace diffkv::cuda
