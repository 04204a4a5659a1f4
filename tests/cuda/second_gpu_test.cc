// Tensors on another GPU than the thread's current one, and two GPUs at the same time.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "cuda/device.h"
#include "diffkv/layer.h"
#include "tests/cuda/rig.h"
#include "verify/cases.h"
#include "verify/compare.h"
#include "verify/generate.h"
#include "verify/placed.h"
#include "verify/rows.h"
#include "verify/run.h"
#include "verify/run_flow.h"

namespace diffkv::cuda {
namespace {

#define DIFFKV_NEED_TWO_GPUS()                                                  \
  DIFFKV_NEED_GPU();                                                            \
  if (gpus().list.size() < 2) GTEST_SKIP() << "one GPU, expected two for this"; \
  static_assert(true)

Device on(int index) { return {DeviceType::kCuda, index}; }

int current() {
  int index = -1;
  DIFFKV_CUDA_CALL(cudaGetDevice(&index));
  return index;
}

// Of every feature its first case and every case of a model's shapes, which many kernels have.
const std::vector<verify::Case>& chosen_cases() {
  static const std::vector<verify::Case> chosen = [] {
    std::vector<verify::Case> list;
    for (const verify::Case& c : verify::cases(verify::Suite::kQuick)) {
      const bool known = std::any_of(list.begin(), list.end(), [&](const verify::Case& other) {
        return other.feature == c.feature;
      });
      if (!known || c.feature == "model") list.push_back(c);
    }
    return list;
  }();
  return chosen;
}

// Runs the cases on a GPU. "" or what was wrong first.
std::string run_cases(const Device& device, std::uint64_t seed) {
  int ran = 0;
  for (const verify::Case& c : chosen_cases()) {
    const verify::CaseResult result = verify::run_case(backend(), device, c, seed, false);
    if (!result.supported) continue;
    ++ran;
    if (!result.ok) return c.name + " on " + to_string(device) + ": " + result.message;
  }
  return ran < 20 ? "only " + std::to_string(ran) + " cases ran" : "";
}

struct Places {
  int current;  // GPU of the thread
  int tensors;
};

class CudaSecondGpu : public testing::TestWithParam<Places> {};

INSTANTIATE_TEST_SUITE_P(Every, CudaSecondGpu, testing::Values(Places{0, 1}, Places{1, 0}),
                         [](const auto& places) {
                           return "tensors_on_" + std::to_string(places.param.tensors);
                         });

TEST_P(CudaSecondGpu, MemoryIsWhereItWasAskedFor) {
  DIFFKV_NEED_TWO_GPUS();
  const DeviceGuard thread(on(GetParam().current));
  const device::Memory memory(backend(), 1000, on(GetParam().tensors));
  EXPECT_EQ(current(), GetParam().current);
  cudaPointerAttributes attributes{};
  DIFFKV_CUDA_CALL(cudaPointerGetAttributes(&attributes, memory.data()));
  EXPECT_EQ(attributes.device, GetParam().tensors);
}

TEST_P(CudaSecondGpu, CasesAreRight) {
  DIFFKV_NEED_TWO_GPUS();
  const DeviceGuard thread(on(GetParam().current));
  EXPECT_EQ(run_cases(on(GetParam().tensors), 21), "");
  EXPECT_EQ(current(), GetParam().current);
}

// Call by call, also where a call is refused.
TEST_P(CudaSecondGpu, CallsLeaveTheCurrentGpuAlone) {
  DIFFKV_NEED_TWO_GPUS();
  const DeviceGuard thread(on(GetParam().current));
  const Device device = on(GetParam().tensors);
  const auto expect_unchanged = [&](const char* call) {
    ASSERT_EQ(current(), GetParam().current) << "after " << call;
  };
  for (const verify::Case& c : chosen_cases()) {
    if (c.feature != "model" || c.flow != verify::CaseFlow::kStages) continue;
    SCOPED_TRACE(c.name);
    verify::GeneratedProblem problem(c, 22);
    const verify::PlacedProblem placed(backend(), problem, device);
    expect_unchanged("allocate and copy_to_device");
    fill_zero(backend(), placed.args().output);
    expect_unchanged("fill_zero");
    ASSERT_TRUE(problem.has_update());
    update_cache(backend(), placed.new_key(), placed.new_value(), placed.args().cache,
                 placed.slot_mapping());
    expect_unchanged("update_cache");
    const verify::PlanMemory memory(backend(), problem.key(), problem.maxima(), device);
    const Plan plan =
        make_plan(backend(), problem.key(), problem.maxima(), placed.args().batch, memory.view());
    expect_unchanged("make_plan");
    attend(backend(), placed.params(), placed.args(), plan);
    expect_unchanged("attend");
    AttendArgs elsewhere = placed.args();
    elsewhere.query.device = on(GetParam().current);
    EXPECT_THROW(attend(backend(), placed.params(), elsewhere, plan), Error);
    expect_unchanged("a refused attend");
    backend().synchronize(device, {});
    expect_unchanged("synchronize");
    EXPECT_EQ(memory.guard_damage(), "");
    placed.fetch();
    expect_unchanged("copy_to_host");
    constexpr std::int64_t kSampledWork = 30'000'000;
    const verify::RowsCheck rows =
        verify::check_rows(problem.key(), problem.params(), problem.args(),
                           verify::tolerance(problem.key(), c.output_dtype), kSampledWork, 22);
    EXPECT_GT(rows.rows, 0);
    EXPECT_EQ(rows.wrong, 0) << rows.what;
    EXPECT_EQ(problem.damage(), "");
  }
}

TEST(CudaTwoGpus, WorkAtTheSameTime) {
  DIFFKV_NEED_TWO_GPUS();
  for (const bool crossed : {false, true}) {
    std::string what[2];
    std::vector<std::thread> threads;
    for (const int index : {0, 1}) {
      threads.emplace_back([&what, index, crossed] {
        try {
          const DeviceGuard thread(on(crossed ? 1 - index : index));
          what[index] = run_cases(on(index), 23);
          if (current() != (crossed ? 1 - index : index)) what[index] += "another current GPU";
        } catch (const std::exception& error) {
          what[index] = error.what();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(what[0], "") << (crossed ? "crossed" : "");
    EXPECT_EQ(what[1], "") << (crossed ? "crossed" : "");
  }
}

TEST(CudaSecondGpuHost, AGpuThatIsNotThereIsRefused) {
  DIFFKV_NEED_GPU();
  const Device none = on(static_cast<int>(gpus().list.size()));
  const int before = current();
  try {
    backend().allocate(64, none);
    FAIL() << "expected a refusal";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kUnavailable);
    EXPECT_NE(std::string(error.what()).find("there is no " + to_string(none)), std::string::npos)
        << error.what();
  }
  EXPECT_EQ(current(), before);
}

}  // namespace
}  // namespace diffkv::cuda
