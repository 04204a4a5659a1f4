// Steps on the GPU: recorded in a graph, on several streams at once, and with indices that make no
// sense.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "tests/cuda/rig.h"

namespace diffkv::cuda {
namespace {

struct Kind {
  std::string name;
  PlanKey key;
};

std::vector<Kind> kinds() {
  PlanKey key;
  key.num_heads = 16;
  key.num_kv_heads = 2;
  key.head_size_qk = 192;
  key.head_size_v = 128;
  std::vector<Kind> list{{"bf16", key}};
  list.push_back({"window", key});
  list.back().key.mask.window = 50;
  list.push_back({"fp8", key});
  list.back().key.key_dtype = list.back().key.value_dtype = DType::kE4M3;
  list.push_back({"batch_invariant", key});
  list.back().key.policy = SchedulePolicy::kBatchInvariant;
  return list;
}

class CudaSteps : public testing::TestWithParam<Kind> {};

INSTANTIATE_TEST_SUITE_P(Every, CudaSteps, testing::ValuesIn(kinds()),
                         [](const auto& kind) { return kind.param.name; });

// One recording honours the contents of every later step.
TEST_P(CudaSteps, AGraphHonoursNewContents) {
  DIFFKV_NEED_GPU();
  const RigSizes sizes{.max_seqs = 9, .max_tokens = 70, .max_blocks = 300, .block_size = 16};
  Rig recorded(GetParam().key, sizes);
  Rig eager(GetParam().key, sizes);
  const OwnStream stream;
  recorded.fill(0, stream.get());
  eager.fill(0, stream.get());

  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  DIFFKV_CUDA_CALL(cudaStreamBeginCapture(stream.handle(), cudaStreamCaptureModeThreadLocal));
  recorded.enqueue(stream.get());
  DIFFKV_CUDA_CALL(cudaStreamEndCapture(stream.handle(), &graph));
  DIFFKV_CUDA_CALL(cudaGraphInstantiate(&executable, graph, 0));
  for (unsigned step = 1; step <= 12; ++step) {
    SCOPED_TRACE("step " + std::to_string(step));
    recorded.fill(step, stream.get());
    eager.fill(step, stream.get());
    DIFFKV_CUDA_CALL(cudaGraphLaunch(executable, stream.handle()));
    eager.enqueue(stream.get());
    ASSERT_TRUE(recorded.results(stream.get()) == eager.results(stream.get()));
  }
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
}

// Two streams share nothing but the library.
TEST_P(CudaSteps, StreamsDoNotDisturbEachOther) {
  DIFFKV_NEED_GPU();
  const RigSizes sizes{.max_seqs = 6, .max_tokens = 40, .max_blocks = 200, .block_size = 32};
  const OwnStream first;
  const OwnStream second;
  Rig a(GetParam().key, sizes);
  Rig b(GetParam().key, sizes);
  Rig alone(GetParam().key, sizes);
  a.fill(1, first.get());
  b.fill(2, second.get());
  for (int i = 0; i < 20; ++i) {
    a.enqueue(first.get());
    b.enqueue(second.get());
  }
  const std::vector<std::byte> result_a = a.results(first.get());
  const std::vector<std::byte> result_b = b.results(second.get());
  alone.fill(1, first.get());
  alone.enqueue(first.get());
  EXPECT_TRUE(result_a == alone.results(first.get()));
  Rig other(GetParam().key, sizes);
  other.fill(2, first.get());
  other.enqueue(first.get());
  EXPECT_TRUE(result_b == other.results(first.get()));
}

// Random bits in every index tensor give wrong numbers, and the next step is right again.
TEST_P(CudaSteps, SenselessIndicesAreSurvived) {
  DIFFKV_NEED_GPU();
  const RigSizes sizes{.max_seqs = 12, .max_tokens = 50, .max_blocks = 60, .block_size = 16};
  const OwnStream stream;
  Rig spoilt(GetParam().key, sizes);
  Rig clean(GetParam().key, sizes);
  spoilt.fill(1, stream.get());
  const std::vector<std::byte> untouched = spoilt.results(stream.get());
  for (unsigned seed = 0; seed < 30; ++seed) {
    spoilt.spoil_indices(seed, stream.get());
    spoilt.enqueue(stream.get());
    DIFFKV_CUDA_CALL(cudaStreamSynchronize(stream.handle()));
  }
  spoilt.fill(2, stream.get());
  spoilt.enqueue(stream.get());
  clean.fill(1, stream.get());  // its first fill is that of the cache, too
  clean.fill(2, stream.get());
  clean.enqueue(stream.get());
  // Random slots are far out of the pool but for one in 2^50: the cache has kept its contents.
  EXPECT_TRUE(spoilt.results(stream.get()) == clean.results(stream.get()));
  EXPECT_FALSE(spoilt.results(stream.get()) == untouched);
}

}  // namespace
}  // namespace diffkv::cuda
