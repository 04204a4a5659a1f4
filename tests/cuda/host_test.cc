// What of the CUDA backend can be judged without a GPU.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <random>
#include <string>

#include "core/dtype.h"
#include "cuda/attend_kernel.h"
#include "cuda/backend.h"
#include "cuda/device.h"
#include "cuda/dispatch.h"
#include "cuda/quotient.h"
#include "diffkv/error.h"
#include "diffkv/layer.h"

namespace diffkv::cuda {
namespace {

PlanKey usual_key() {
  PlanKey key;
  key.num_heads = 64;
  key.num_kv_heads = 4;
  key.head_size_qk = 192;
  key.head_size_v = 128;
  return key;
}

Gpu usual_gpu() {
  Gpu gpu;
  gpu.name = "a GPU";
  gpu.major = 9;
  gpu.num_sms = 132;
  gpu.shared_bytes_per_block = 227 * 1024;
  gpu.shared_bytes_per_sm = 228 * 1024;
  return gpu;
}

// Sets an environment variable for a test.
class ScopedKernel {
 public:
  explicit ScopedKernel(const char* value) { setenv("DIFFKV_CUDA_KERNEL", value, 1); }
  ~ScopedKernel() { unsetenv("DIFFKV_CUDA_KERNEL"); }
  ScopedKernel(const ScopedKernel&) = delete;
  ScopedKernel& operator=(const ScopedKernel&) = delete;
};

TEST(CudaHost, IsRegisteredFirst) {
  ASSERT_GE(backends().size(), 2U);
  EXPECT_EQ(backends()[0]->name(), "cuda");
  EXPECT_EQ(backends()[0]->device_type(), DeviceType::kCuda);
}

TEST(CudaHost, WithoutAGpuEverythingIsRefusedWithTheReason) {
  const Backend& cuda = backend();
  if (cuda.available()) GTEST_SKIP() << "this machine has a GPU";
  const std::string reason = cuda.available().reason;
  EXPECT_FALSE(reason.empty());
  Problem problem;
  problem.key = usual_key();
  EXPECT_FALSE(cuda.supports(problem));
  EXPECT_NE(cuda.supports(problem).reason.find(reason), std::string::npos);
  EXPECT_NE(cuda.description().find(reason), std::string::npos);
  const auto code_of = [](auto&& call) {
    try {
      call();
    } catch (const Error& error) {
      return error.code();
    }
    ADD_FAILURE() << "nothing was thrown";
    return ErrorCode::kInvalidArgument;
  };
  EXPECT_EQ(code_of([&] { cuda.limits(usual_key()); }), ErrorCode::kUnavailable);
  EXPECT_EQ(code_of([&] { cuda.allocate(64, {DeviceType::kCuda, 0}); }), ErrorCode::kUnavailable);
  EXPECT_EQ(code_of([&] {
              cuda.synchronize({DeviceType::kCuda, 0}, {});
            }),
            ErrorCode::kUnavailable);
  EXPECT_EQ(code_of([&] { DiffKVBackend("cuda"); }), ErrorCode::kUnavailable);
}

// What each state of a machine is called; driver_test.cc has the command in some of them.
TEST(CudaHost, ReasonsWhyNoGpuCanBeUsed) {
  constexpr int kRuntime = 13000;
  EXPECT_EQ(why_unusable(cudaErrorInsufficientDriver, 0, kRuntime, {}),
            "there is no NVIDIA driver");
  EXPECT_EQ(why_unusable(cudaErrorInsufficientDriver, 12040, kRuntime, {}),
            "the NVIDIA driver is for CUDA 12.4, this library was built with CUDA 13.0");
  EXPECT_EQ(why_unusable(cudaErrorNoDevice, kRuntime, kRuntime, {}), "there is no GPU");
  EXPECT_EQ(why_unusable(cudaSuccess, kRuntime, kRuntime, {}), "there is no GPU");
  EXPECT_EQ(why_unusable(cudaErrorUnknown, kRuntime, kRuntime, {}),
            "no GPU can be used: unknown error (cudaErrorUnknown)");
  Gpu old = usual_gpu();
  old.name = "an old GPU";
  old.major = 7;
  old.minor = 5;
  EXPECT_EQ(why_unusable(cudaSuccess, kRuntime, kRuntime, {old}),
            "cuda:0 (an old GPU) has compute capability 7.5, expected 8.0 or more");
  Gpu least = usual_gpu();
  least.major = 8;
  least.index = 1;
  EXPECT_EQ(why_unusable(cudaSuccess, kRuntime, kRuntime, {least}), "");
  EXPECT_EQ(why_unusable(cudaSuccess, kRuntime, kRuntime, {old, least}), "");
}

TEST(CudaHost, AnIllegalKeyIsRefusedBeforeAnyGpuIsAsked) {
  Problem problem;
  problem.key = usual_key();
  problem.key.num_heads = 63;
  const Support support = backend().supports(problem);
  EXPECT_FALSE(support);
  EXPECT_NE(support.reason.find("multiple of num_kv_heads"), std::string::npos) << support.reason;
}

TEST(CudaHost, AKernelFamilyCanBeForced) {
  const PlanKey key = usual_key();
  PlanKey fp32_key = key;
  fp32_key.query_dtype = fp32_key.key_dtype = fp32_key.value_dtype = DType::kF32;
  {
    const ScopedKernel forced("fp32");
    const Choice choice = choose_kernel(key, usual_gpu());
    ASSERT_EQ(choice.kernel, &attend_fp32());
    EXPECT_EQ(choice.kernel->name, "fp32");
  }
  {
    const ScopedKernel forced("mma");
    const Choice choice = choose_kernel(fp32_key, usual_gpu());
    EXPECT_EQ(choice.kernel, nullptr);
    EXPECT_NE(choice.reason.find("DIFFKV_CUDA_KERNEL"), std::string::npos) << choice.reason;
  }
  {
    const ScopedKernel forced("fast");
    const Choice choice = choose_kernel(key, usual_gpu());
    EXPECT_EQ(choice.kernel, nullptr);
    EXPECT_NE(choice.reason.find("\"fast\""), std::string::npos) << choice.reason;
  }
  EXPECT_EQ(choose_kernel(fp32_key, usual_gpu()).kernel, &attend_fp32());
}

TEST(CudaHost, TheFp32KernelsClassesFitTheGpu) {
  PlanKey key = usual_key();
  const Gpu gpu = usual_gpu();
  const ScheduleLimits limits = attend_fp32().limits(key, gpu);
  ASSERT_EQ(limits.num_classes, 1);
  EXPECT_EQ(limits.classes[0].workers % gpu.num_sms, 0);
  EXPECT_GE(limits.classes[0].workers, 2 * gpu.num_sms);
  key.head_size_qk = key.head_size_v = 576;
  Gpu small = gpu;
  small.shared_bytes_per_sm = 100 * 1024;
  EXPECT_EQ(attend_fp32().limits(key, small).classes[0].workers, gpu.num_sms);
}

// Quotients have the fp8 bytes of true divisions: near ties, at the ends of both formats, for
// every kind of scale.
TEST(CudaHost, QuotientsAreThoseOfDivisions) {
  std::mt19937 rng(11);
  std::uniform_real_distribution<float> mantissa(1.0F, 2.0F);
  std::uniform_int_distribution<int> exponent(-40, 40);
  std::uniform_int_distribution<std::uint32_t> bits;
  std::uniform_int_distribution<int> code(0, 255);
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const auto expect_same = [](float x, float scale) {
    const float expected = x / scale;
    const float quotient = Divider(scale)(x);
    float among_others[3] = {1.5F * scale, x, x};
    if (Divider(scale).divide_usual(among_others)) {
      ASSERT_FALSE(std::isnan(expected) || expected == 0.0F) << x << " / " << scale;
      ASSERT_EQ(core::float_to_e4m3(among_others[1]), core::float_to_e4m3(expected)) << x;
      ASSERT_EQ(core::float_to_e5m2(among_others[2]), core::float_to_e5m2(expected)) << x;
    } else {
      ASSERT_EQ(core::bits_of(among_others[1]), core::bits_of(x));
    }
    ASSERT_EQ(core::float_to_e4m3(quotient), core::float_to_e4m3(expected)) << x << " / " << scale;
    ASSERT_EQ(core::float_to_e5m2(quotient), core::float_to_e5m2(expected)) << x << " / " << scale;
  };
  for (int i = 0; i < 200000; ++i) {
    const float scale = std::ldexp(mantissa(rng), exponent(rng));
    expect_same(core::float_of(bits(rng)), scale);
    // Products of the scale and a number between two codes land next to ties.
    const float low = core::e4m3_to_float(static_cast<std::uint8_t>(code(rng)));
    const float high = core::e4m3_to_float(static_cast<std::uint8_t>(code(rng)));
    expect_same((low + high) / 2 * scale, scale);
    expect_same(low * scale, scale);
    expect_same(core::bf16_to_float(core::float_to_bf16(low * scale)), scale);
  }
  for (float scale : {1.0F, 0x1p-70F, 0x1p70F, 3e-39F, kInf, -2.0F}) {
    for (float x : {0.0F, -0.0F, 1.0F, -3e-39F, 3e38F, kInf, -kInf}) {
      if (std::isnan(x / scale)) continue;  // 0 / 0 has no sign to agree on
      expect_same(x, scale);
    }
  }
}

}  // namespace
}  // namespace diffkv::cuda
