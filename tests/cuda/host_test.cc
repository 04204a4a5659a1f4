// What of the CUDA backend can be judged without a GPU.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <utility>

#include "core/dtype.h"
#include "cuda/attend_kernel.h"
#include "cuda/backend.h"
#include "cuda/device.h"
#include "cuda/dispatch.h"
#include "cuda/generic/tile.h"
#include "cuda/instances/instances.h"
#include "cuda/kernel_table.h"
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

Gpu gpu_of_little_shared_memory() {  // as 8.6, 8.9 and 12.0 have
  Gpu gpu = usual_gpu();
  gpu.shared_bytes_per_block = 99 * 1024;
  gpu.shared_bytes_per_sm = 100 * 1024;
  return gpu;
}

PlanKey key_of(DType query, DType stored, std::int64_t head_size_qk, std::int64_t head_size_v) {
  PlanKey key = usual_key();
  key.query_dtype = query;
  key.key_dtype = key.value_dtype = stored;
  key.head_size_qk = head_size_qk;
  key.head_size_v = head_size_v;
  return key;
}

// The instance that the table chooses, or null.
const Instance* chosen(const PlanKey& key, const Gpu& gpu) {
  const KernelChoice choice = find_mma_kernel(key, gpu);
  if (choice.kernel == nullptr) return nullptr;
  for (const Instance& instance : instances()) {
    if (&instance.kernel().attend == choice.kernel) return &instance;
  }
  ADD_FAILURE() << "a kernel of no instance";
  return nullptr;
}

// Whether the build has the head sizes that it has by default.
bool has_default_instances() {
  for (const auto& [qk, v] : {std::pair{64, 64}, {128, 128}, {192, 128}, {256, 256}}) {
    const auto is_of_size = [qk = qk, v = v](const Instance& instance) {
      return instance.head_size_qk == qk && instance.head_size_v == v;
    };
    if (std::none_of(instances().begin(), instances().end(), is_of_size)) return false;
  }
  return true;
}

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
  Choice choice = choose_kernel(key, usual_gpu(), "fp32");
  ASSERT_EQ(choice.kernel, &attend_fp32());
  EXPECT_EQ(choice.kernel->name, "fp32");
  choice = choose_kernel(fp32_key, usual_gpu(), "mma");
  EXPECT_EQ(choice.kernel, nullptr);
  EXPECT_NE(choice.reason.find("DIFFKV_CUDA_KERNEL"), std::string::npos) << choice.reason;
  choice = choose_kernel(key, usual_gpu(), "fast");
  EXPECT_EQ(choice.kernel, nullptr);
  EXPECT_NE(choice.reason.find("\"fast\""), std::string::npos) << choice.reason;
  EXPECT_EQ(choose_kernel(fp32_key, usual_gpu(), "").kernel, &attend_fp32());
}

TEST(CudaHost, TheSmallestInstanceThatHoldsTheHeadSizesIsTaken) {
  if (!has_default_instances()) GTEST_SKIP() << "built for other head sizes";
  struct Row {
    std::int64_t qk, v;
    int instance_qk, instance_v;  // 0: none holds it
  };
  const Row rows[] = {
      {64, 64, 64, 64},     {16, 64, 64, 64},     {32, 48, 64, 64},     {80, 64, 128, 128},
      {64, 80, 128, 128},   {128, 96, 128, 128},  {128, 128, 128, 128}, {192, 128, 192, 128},
      {144, 64, 192, 128},  {128, 144, 256, 256}, {208, 128, 256, 256}, {208, 144, 256, 256},
      {256, 256, 256, 256}, {272, 64, 0, 0},      {64, 272, 0, 0},      {576, 512, 0, 0}};
  for (const DType stored : {DType::kBF16, DType::kF16, DType::kE4M3, DType::kE5M2}) {
    const DType query = is_fp8(stored) ? DType::kBF16 : stored;
    for (const Row& row : rows) {
      SCOPED_TRACE(std::string(to_string(stored)) + " " + std::to_string(row.qk) + "/" +
                   std::to_string(row.v));
      const Instance* instance = chosen(key_of(query, stored, row.qk, row.v), usual_gpu());
      ASSERT_EQ(instance != nullptr, row.instance_qk > 0);
      if (instance == nullptr) continue;
      EXPECT_EQ(instance->stored, stored);
      EXPECT_EQ(instance->head_size_qk, row.instance_qk);
      EXPECT_EQ(instance->head_size_v, row.instance_v);
    }
  }
  // Rows of 2-byte elements may be any multiple of 8.
  const PlanKey odd = key_of(DType::kBF16, DType::kBF16, 200, 136);
  ASSERT_NE(chosen(odd, usual_gpu()), nullptr);
  EXPECT_EQ(chosen(odd, usual_gpu())->head_size_v, 256);
  EXPECT_EQ(chosen(key_of(DType::kBF16, DType::kE4M3, 200, 136), usual_gpu()), nullptr);
}

// Of 192/128 in bf16 two thread blocks share an SM: a block of 64 keys of each is 80 KB.
TEST(CudaHost, HowMuchIsReadBeforeTheCacheEvictsTheRestFirst) {
  using Tile = mma::Tile<mma::DecodeGrid<192, 128>, DType::kBF16, 192, 128>;
  EXPECT_EQ(Tile::kept_blocks(1, 2), 0);
  EXPECT_EQ(Tile::kept_blocks(2 * 12, 2), 0);  // 1 MB
  EXPECT_EQ(Tile::kept_blocks(2 * 13, 2), 1);
  EXPECT_EQ(Tile::kept_blocks(2 * 26, 2), 1);  // 2.1 MB
  EXPECT_EQ(Tile::kept_blocks(2 * 27, 2), 15);
  EXPECT_EQ(Tile::kept_blocks(1 << 30, 2), 15);
}

TEST(CudaHost, WhichQueriesRunOverWhichCache) {
  if (instances().empty()) GTEST_SKIP() << "built without tensor-core kernels";
  const DType types[] = {DType::kF32, DType::kF16, DType::kBF16, DType::kE4M3, DType::kE5M2};
  for (const DType stored : types) {
    for (const DType query : {DType::kF32, DType::kF16, DType::kBF16, DType::kE4M3}) {
      SCOPED_TRACE(std::string(to_string(query)) + " over " + std::string(to_string(stored)));
      const bool expected = query != DType::kF32 && (is_fp8(stored) || stored == query);
      const Instance* instance = chosen(key_of(query, stored, 64, 64), usual_gpu());
      ASSERT_EQ(instance != nullptr, expected);
      if (!expected) continue;
      EXPECT_EQ(instance->stored, stored);
    }
  }
}

TEST(CudaHost, LittleSharedMemoryLeavesOutTheLargestInstanceOfTwoBytes) {
  if (!has_default_instances()) GTEST_SKIP() << "built for other head sizes";
  const Gpu gpu = gpu_of_little_shared_memory();
  for (const DType stored : {DType::kBF16, DType::kF16, DType::kE4M3, DType::kE5M2}) {
    SCOPED_TRACE(to_string(stored));
    const DType query = is_fp8(stored) ? DType::kBF16 : stored;
    for (const auto& [qk, v] : {std::pair{64, 64}, {128, 128}, {192, 128}}) {
      EXPECT_NE(chosen(key_of(query, stored, qk, v), gpu), nullptr) << qk;
    }
    const PlanKey largest = key_of(query, stored, 256, 256);
    EXPECT_EQ(chosen(largest, gpu) != nullptr, is_fp8(stored));
    if (is_fp8(stored)) continue;
    EXPECT_NE(find_mma_kernel(largest, gpu).reason.find("shared memory"), std::string::npos);
    EXPECT_EQ(choose_kernel(largest, gpu).kernel, &attend_fp32());
  }
}

template <int kHeadSizeV>
void expect_kernels() {
  using Prefill = mma::Tile<mma::PrefillGrid, DType::kBF16, 64, kHeadSizeV>;
  using Tall = mma::Tile<mma::TallPrefillGrid, DType::kBF16, 64, kHeadSizeV>;
  using Group = mma::Tile<mma::GroupPrefillGrid, DType::kBF16, 64, kHeadSizeV>;
  using Fp8Prefill = mma::Tile<mma::PrefillGrid, DType::kE4M3, 64, kHeadSizeV>;
  using Fp8Tall = mma::Tile<mma::TallPrefillGrid, DType::kE4M3, 64, kHeadSizeV>;
  using Fp8Group = mma::Tile<mma::GroupPrefillGrid, DType::kE4M3, 64, kHeadSizeV>;
  using Wide = mma::Tile<mma::WideDecodeGrid, DType::kBF16, 64, kHeadSizeV>;
  using Long = mma::Tile<mma::LongWideDecodeGrid, DType::kBF16, 64, kHeadSizeV>;
  using GroupWide = mma::Tile<mma::GroupWideDecodeGrid, DType::kBF16, 64, kHeadSizeV>;
  using Fp8Wide = mma::Tile<mma::WideDecodeGrid, DType::kE4M3, 64, kHeadSizeV>;
  using Fp8Long = mma::Tile<mma::LongWideDecodeGrid, DType::kE4M3, 64, kHeadSizeV>;
  using Fp8GroupWide = mma::Tile<mma::GroupWideDecodeGrid, DType::kE4M3, 64, kHeadSizeV>;
  using Decode = mma::Tile<mma::DecodeGrid<64, kHeadSizeV>, DType::kBF16, 64, kHeadSizeV>;
  using Heads =
      mma::Tile<mma::HeadsDecodeGrid<(64 + kHeadSizeV) * 2>, DType::kBF16, 64, kHeadSizeV>;
  using Fp8Heads = mma::Tile<mma::HeadsDecodeGrid<64 + kHeadSizeV>, DType::kE4M3, 64, kHeadSizeV>;
  for (const int major : {8, 9, 10, 12}) {
    SCOPED_TRACE(major);
    const bool hopper = major == 9 && kHeadSizeV <= 128;
    EXPECT_EQ(mma::has_kernel<Wide>(major), !hopper);
    EXPECT_EQ(mma::has_kernel<GroupWide>(major), hopper);
    EXPECT_EQ(mma::has_kernel<Long>(major), major == 10 && kHeadSizeV <= 128);
    EXPECT_EQ(mma::has_kernel<Fp8Wide>(major), mma::has_kernel<Wide>(major));
    EXPECT_EQ(mma::has_kernel<Fp8GroupWide>(major), hopper);
    EXPECT_EQ(mma::has_kernel<Fp8Long>(major), mma::has_kernel<Long>(major));
    EXPECT_TRUE(mma::has_kernel<Decode>(major));
    EXPECT_EQ(mma::has_kernel<Heads>(major), major >= 9 && kHeadSizeV <= 128);
    EXPECT_EQ(mma::has_kernel<Fp8Heads>(major), mma::has_kernel<Heads>(major));
    EXPECT_EQ(mma::has_kernel<Prefill>(major), !hopper);
    EXPECT_EQ(mma::has_kernel<Group>(major), hopper);
    EXPECT_FALSE(mma::has_kernel<Tall>(major));
    EXPECT_EQ(mma::has_kernel<Fp8Prefill>(major), !hopper);
    EXPECT_EQ(mma::has_kernel<Fp8Tall>(major), hopper);
    EXPECT_FALSE(mma::has_kernel<Fp8Group>(major));
  }
}

// Of speculative decode 9.0 has one kernel, whose stages fit.
template <DType kStored, int kHeadSizeQk, int kHeadSizeV>
void expect_wide_kernel() {
  using Wide = mma::Tile<mma::WideDecodeGrid, kStored, kHeadSizeQk, kHeadSizeV>;
  using Group = mma::Tile<mma::GroupWideDecodeGrid, kStored, kHeadSizeQk, kHeadSizeV>;
  SCOPED_TRACE(std::to_string(kHeadSizeQk) + "/" + std::to_string(kHeadSizeV));
  const bool fits = mma::SharedLayout<Group>({2, 1}).bytes <= 227 * 1024;
  EXPECT_EQ(mma::has_kernel<Group>(9), fits && kHeadSizeV <= 128);
  EXPECT_NE(mma::has_kernel<Wide>(9), mma::has_kernel<Group>(9));
  for (const int major : {8, 10, 12}) {
    EXPECT_TRUE(mma::has_kernel<Wide>(major));
    EXPECT_FALSE(mma::has_kernel<Group>(major));
  }
}

TEST(CudaHost, SpeculativeDecodeHasAKernelOfEverySize) {
  expect_wide_kernel<DType::kBF16, 192, 128>();
  expect_wide_kernel<DType::kE4M3, 192, 128>();
  expect_wide_kernel<DType::kBF16, 256, 128>();
  expect_wide_kernel<DType::kE4M3, 256, 128>();
  expect_wide_kernel<DType::kF16, 384, 128>();
  expect_wide_kernel<DType::kF16, 256, 256>();
  using Large = mma::Tile<mma::WideDecodeGrid, DType::kBF16, 256, 128>;
  EXPECT_TRUE(mma::has_kernel<Large>(9));
}

TEST(CudaHost, EveryArchitectureHasItsKernels) {
  expect_kernels<64>();
  expect_kernels<128>();
  expect_kernels<256>();
}

TEST(CudaHost, DecodeSparesOneSmIn32AtMost) {
  EXPECT_EQ(mma::sms_for_reading(132), 128);
  EXPECT_EQ(mma::sms_for_reading(128), 128);
  EXPECT_EQ(mma::sms_for_reading(114), 112);
  EXPECT_EQ(mma::sms_for_reading(108), 108);
  EXPECT_EQ(mma::sms_for_reading(20), 20);
  EXPECT_TRUE((mma::DecodeGrid<192, 128>::kSparesSms));
  EXPECT_FALSE(mma::GroupPrefillGrid::kSparesSms);
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
