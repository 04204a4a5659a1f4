// The rate of fp32 multiply-adds: one source, compiled for each instruction set like the kernels.
#include "cpu/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "bench/harness/gemm_rate.cc"
#include "hwy/foreach_target.h"
// foreach_target.h comes first.
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace diffkv::bench::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Depth of the product: the panels of A and B then fit the first-level cache.
constexpr std::size_t kDepth = 96;
constexpr std::size_t kVectors = 3;
// Accumulators, three vectors of B and a value of A: 28 of 32 registers, or 16 of 16.
constexpr std::size_t kRows = HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM_A64 ? 8 : 4;
constexpr std::size_t kMostLanes = 16;

// C[kRows, kVectors * lanes] += A[kRows, kDepth] B[kDepth, kVectors * lanes], `times` times.
// Returns the multiplications and additions done; `sink` gets a number that depends on all.
double multiply(std::size_t times, float* sink) {
  const hn::CappedTag<float, kMostLanes> d;
  using V = hn::Vec<decltype(d)>;
  const std::size_t lanes = hn::Lanes(d);
  const std::size_t width = kVectors * lanes;
  HWY_ALIGN float a[kDepth * kRows];
  HWY_ALIGN float b[kDepth * kVectors * kMostLanes];
  for (std::size_t i = 0; i < kDepth * kRows; ++i) a[i] = 1e-3F * static_cast<float>(i % 7);
  for (std::size_t i = 0; i < kDepth * width; ++i) b[i] = 1e-3F * static_cast<float>(i % 5);

  V c[kRows][kVectors];
  for (auto& row : c) {
    for (V& v : row) v = hn::Zero(d);
  }
  for (std::size_t time = 0; time < times; ++time) {
    for (std::size_t k = 0; k < kDepth; ++k) {
      const V b0 = hn::Load(d, b + k * width);
      const V b1 = hn::Load(d, b + k * width + lanes);
      const V b2 = hn::Load(d, b + k * width + 2 * lanes);
      for (std::size_t r = 0; r < kRows; ++r) {
        const V value = hn::Set(d, a[k * kRows + r]);
        c[r][0] = hn::MulAdd(value, b0, c[r][0]);
        c[r][1] = hn::MulAdd(value, b1, c[r][1]);
        c[r][2] = hn::MulAdd(value, b2, c[r][2]);
      }
    }
  }
  V sum = hn::Zero(d);
  for (const auto& row : c) {
    for (const V& v : row) sum = hn::Add(sum, v);
  }
  *sink = hn::GetLane(hn::SumOfLanes(d, sum));
  return 2.0 * static_cast<double>(times * kDepth * kRows * width);
}

}  // namespace diffkv::bench::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <algorithm>
#include <chrono>

#include "bench/harness/machine.h"

namespace diffkv::bench {

HWY_EXPORT(multiply);

double measure_gemm_rate() {
  constexpr int kRuns = 400;
  constexpr std::size_t kTimes = 200;  // about a tenth of a millisecond
  // Each thread's best run counts, all threads running: a thread that another process held up for
  // a moment has other runs.
  double rate = 0.0;
#pragma omp parallel reduction(+ : rate)
  {
    // Written to memory, so that no run can be left out.
    [[maybe_unused]] volatile float sink = 0.0F;
    double best = 0.0;
    for (int run = 0; run < kRuns; ++run) {
      float sum = 0.0F;
      const auto start = std::chrono::steady_clock::now();
      const double flops = HWY_DYNAMIC_DISPATCH(multiply)(kTimes, &sum);
      const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
      sink = sum;
      best = std::max(best, flops / elapsed.count());
    }
    rate += best;
  }
  return rate;
}

}  // namespace diffkv::bench
#endif  // HWY_ONCE
