// Steps on the GPU: recorded in a graph, on several streams at once, and with indices that make no
// sense.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
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

// A step of the rig, recorded.
class Recorded {
 public:
  Recorded(Rig& rig, const OwnStream& stream) {
    DIFFKV_CUDA_CALL(cudaStreamBeginCapture(stream.handle(), cudaStreamCaptureModeThreadLocal));
    rig.enqueue(stream.get());
    DIFFKV_CUDA_CALL(cudaStreamEndCapture(stream.handle(), &graph_));
    DIFFKV_CUDA_CALL(cudaGraphInstantiate(&executable_, graph_, 0));
  }
  ~Recorded() {
    cudaGraphExecDestroy(executable_);
    cudaGraphDestroy(graph_);
  }
  Recorded(const Recorded&) = delete;
  Recorded& operator=(const Recorded&) = delete;

  void launch(const OwnStream& stream) const {
    DIFFKV_CUDA_CALL(cudaGraphLaunch(executable_, stream.handle()));
  }

  int num_kernels() const {
    std::size_t count = 0;
    DIFFKV_CUDA_CALL(cudaGraphGetNodes(graph_, nullptr, &count));
    std::vector<cudaGraphNode_t> nodes(count);
    DIFFKV_CUDA_CALL(cudaGraphGetNodes(graph_, nodes.data(), &count));
    int kernels = 0;
    for (const cudaGraphNode_t node : nodes) {
      cudaGraphNodeType type{};
      DIFFKV_CUDA_CALL(cudaGraphNodeGetType(node, &type));
      if (type == cudaGraphNodeTypeKernel) ++kernels;
    }
    return kernels;
  }

 private:
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t executable_ = nullptr;
};

// Rows of `columns` numbers differ by what rounding to bf16 makes of them: not by a part of a tile.
void expect_rows_alike(const std::vector<float>& rows, const std::vector<float>& expected,
                       std::size_t columns) {
  ASSERT_EQ(rows.size(), expected.size());
  for (std::size_t first = 0; first < rows.size(); first += columns) {
    double difference = 0;
    double size = 0;
    for (std::size_t i = first; i < first + columns; ++i) {
      ASSERT_NEAR(rows[i], expected[i], 0.03F);
      difference += std::pow(rows[i] - expected[i], 2);
      size += std::pow(expected[i], 2);
    }
    ASSERT_LE(std::sqrt(difference), 0.02 * std::sqrt(size)) << "row " << first / columns;
  }
}

// One recording honours the contents of every later step.
void expect_new_contents_honoured(const PlanKey& key, const RigSizes& sizes) {
  Rig rig(key, sizes);
  Rig eager(key, sizes);
  const OwnStream stream;
  rig.fill(0, stream.get());
  eager.fill(0, stream.get());
  const Recorded recorded(rig, stream);
  for (unsigned step = 1; step <= 12; ++step) {
    SCOPED_TRACE("step " + std::to_string(step));
    rig.fill(step, stream.get());
    eager.fill(step, stream.get());
    recorded.launch(stream);
    eager.enqueue(stream.get());
    ASSERT_TRUE(rig.results(stream.get()) == eager.results(stream.get()));
  }
}

TEST_P(CudaSteps, AGraphHonoursNewContents) {
  DIFFKV_NEED_GPU();
  expect_new_contents_honoured(
      GetParam().key, {.max_seqs = 9, .max_tokens = 70, .max_blocks = 300, .block_size = 16});
}

TEST_P(CudaSteps, AGraphOfSingleQueriesHonoursNewContents) {
  DIFFKV_NEED_GPU();
  expect_new_contents_honoured(GetParam().key, {.max_seqs = 9,
                                                .max_tokens = 9,
                                                .max_blocks = 300,
                                                .block_size = 16,
                                                .max_query_len = 1,
                                                .announced_query_len = 1});
}

// Tile classes that no query of the batch can need cost no launch, nor does a merge that attention
// does itself.
TEST_P(CudaSteps, OnlyWhatCanHaveWorkIsLaunched) {
  DIFFKV_NEED_GPU();
  RigSizes sizes{.max_seqs = 9, .max_tokens = 70, .max_blocks = 140, .block_size = 16};
  const OwnStream stream;
  const int classes = backend().limits(GetParam().key).num_classes;
  const int others = GetParam().key.policy == SchedulePolicy::kBatchInvariant
                         ? 3  // plan, update_cache, combine
                         : 2;
  Rig any(GetParam().key, sizes);
  any.fill(0, stream.get());
  EXPECT_EQ(Recorded(any, stream).num_kernels(), others + classes);
  sizes.max_query_len = sizes.announced_query_len = 1;
  Rig single(GetParam().key, sizes);
  single.fill(0, stream.get());
  EXPECT_EQ(Recorded(single, stream).num_kernels(), others + 1);
  sizes.max_query_len = sizes.announced_query_len = 4;
  Rig few(GetParam().key, sizes);
  few.fill(0, stream.get());
  const bool one_takes_all = backend().limits(GetParam().key).classes[1].takes_smaller &&
                             GetParam().key.policy == SchedulePolicy::kBalanced;
  EXPECT_EQ(Recorded(few, stream).num_kernels(), others + (one_takes_all ? 1 : 2));
}

// A query that is longer than the batch says is computed all the same.
TEST_P(CudaSteps, LongerQueriesThanAnnouncedAreRight) {
  DIFFKV_NEED_GPU();
  RigSizes sizes{.max_seqs = 9, .max_tokens = 70, .max_blocks = 60, .block_size = 16};
  const OwnStream stream;
  // Of one token, and of as many as only the second class has room for, which may take all.
  for (const std::int64_t announced : {1, 4}) {
    sizes.announced_query_len = 0;
    Rig any(GetParam().key, sizes);
    sizes.announced_query_len = announced;
    Rig bounded(GetParam().key, sizes);
    for (unsigned step = 0; step < 4; ++step) {
      SCOPED_TRACE(std::to_string(announced) + " tokens, step " + std::to_string(step));
      any.fill(step, stream.get());
      bounded.fill(step, stream.get());
      any.enqueue(stream.get());
      bounded.enqueue(stream.get());
      const std::vector<float> expected = any.outputs(stream.get());
      const std::vector<float> outputs = bounded.outputs(stream.get());
      expect_rows_alike(outputs, expected, static_cast<std::size_t>(GetParam().key.head_size_v));
    }
  }
}

// Kernels that start early keep the order of the stream, among themselves and with the caller's
// work before and after a step: steps in a row have the results of steps one by one.
TEST_P(CudaSteps, StepsKeepTheOrderOfTheirStream) {
  DIFFKV_NEED_GPU();
  const RigSizes sizes{.max_seqs = 9, .max_tokens = 40, .max_blocks = 100, .block_size = 16};
  constexpr unsigned kSteps = 5;
  const OwnStream stream;
  std::vector<std::unique_ptr<Rig>> steps;  // for their inputs and outputs
  for (unsigned step = 0; step < kSteps; ++step) {
    steps.push_back(std::make_unique<Rig>(GetParam().key, sizes));
    steps.back()->fill(step, stream.get());
  }
  std::vector<std::vector<float>> outputs[2];  // in a row, one by one
  for (const bool waits : {false, true}) {
    Rig rig(GetParam().key, sizes);
    rig.fill(0, stream.get());
    for (const auto& step : steps) {
      rig.copy_inputs(*step, stream);
      if (waits) DIFFKV_CUDA_CALL(cudaStreamSynchronize(stream.handle()));
      rig.enqueue(stream.get());
      if (waits) DIFFKV_CUDA_CALL(cudaStreamSynchronize(stream.handle()));
      step->copy_outputs(rig, stream);
    }
    for (const auto& step : steps) outputs[waits ? 1 : 0].push_back(step->outputs(stream.get()));
  }
  EXPECT_TRUE(outputs[0] == outputs[1]);
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

// The same with one cache: what a stream's steps write to their pages shows in no other's.
TEST_P(CudaSteps, StreamsShareACache) {
  DIFFKV_NEED_GPU();
  const RigSizes sizes{
      .max_seqs = 6, .max_tokens = 40, .max_blocks = 200, .block_size = 32, .sharing = 2};
  const OwnStream streams[2];
  std::vector<std::byte> results[2][2];  // at once and one after the other, of each stream
  for (const bool at_once : {true, false}) {
    Rig first(GetParam().key, sizes);
    Rig second(first);
    first.fill(1, streams[0].get());
    second.fill(2, streams[1].get());
    for (int i = 0; i < 20; ++i) {
      first.enqueue(streams[0].get());
      if (at_once) second.enqueue(streams[1].get());
    }
    DIFFKV_CUDA_CALL(cudaStreamSynchronize(streams[0].handle()));
    if (!at_once) second.enqueue(streams[1].get());
    DIFFKV_CUDA_CALL(cudaStreamSynchronize(streams[1].handle()));
    results[at_once ? 0 : 1][0] = first.results(streams[0].get());
    results[at_once ? 0 : 1][1] = second.results(streams[1].get());
  }
  EXPECT_TRUE(results[0][0] == results[1][0]);
  EXPECT_TRUE(results[0][1] == results[1][1]);
  EXPECT_FALSE(results[0][0] == results[0][1]);
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
