// The three classes: what they hold on to and what they refuse.
#include "diffkv/layer.h"

#include <gtest/gtest.h>
#include <omp.h>

#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <thread>
#include <vector>

namespace diffkv {
namespace {

PlanKey small_key() {
  PlanKey key;
  key.num_heads = 4;
  key.num_kv_heads = 2;
  key.head_size_qk = 16;
  key.head_size_v = 8;
  key.query_dtype = key.key_dtype = key.value_dtype = DType::kF32;
  return key;
}

// One sequence of 40 keys whose last token is the query.
struct Step {
  DiffKVBackend backend{"cpu"};
  PlanKey key = small_key();
  PlanMaxima maxima{.max_tokens = 8, .max_seqs = 2, .max_seq_len = 64};
  std::vector<std::int32_t> query_start_loc{0, 1};
  std::vector<std::int32_t> seq_lens{40};
  std::vector<std::int32_t> block_table{1, 2, 3};
  std::vector<float> pool = std::vector<float>(4 * 16 * 2 * 24, 0.25F);
  std::vector<float> query = std::vector<float>(4 * 16, 1.0F);
  std::vector<float> output = std::vector<float>(4 * 8);
  KvCacheView cache;
  Batch batch;
  DiffKVAttention::ForwardArgs args;

  Step() {
    const KvCacheSpec spec{.block_size = 16,
                           .num_kv_heads = 2,
                           .head_size_qk = 16,
                           .head_size_v = 8,
                           .dtype = DType::kF32};
    cache = spec.view(pool.data(), 4);
    batch.num_seqs = batch.num_actual_tokens = 1;
    batch.query_start_loc = view_of(query_start_loc.data(), {2});
    batch.seq_lens = view_of(seq_lens.data(), {1});
    batch.block_table = view_of(block_table.data(), {1, 3});
    args.query = view_of(query.data(), {1, 4, 16});
    args.cache = &cache;
    args.output = view_of(output.data(), {1, 4, 8});
  }

  DiffKVAttention layer() const { return {backend, key, {}, DType::kF32}; }
};

// Calls fn, which must throw Error, and returns the message.
std::string refusal(const std::function<void()>& fn) {
  try {
    fn();
  } catch (const Error& error) {
    return error.what();
  }
  return "not refused";
}

// A builder's plans fit its workspace whatever thread builds and whatever the thread count is then.
TEST(Layer, BuilderKeepsItsThreads) {
  const int before = omp_get_max_threads();
  omp_set_num_threads(1);
  Step step;
  DiffKVMetadataBuilder builder(step.backend, step.key, step.maxima);
  const auto run = [&] {
    const DiffKVMetadata metadata = builder.build(step.batch);
    EXPECT_EQ(metadata.plan().limits().threads, 1);
    step.args.metadata = &metadata;
    step.layer().forward(step.args);
    EXPECT_NEAR(step.output[0], 0.25F, 1e-6);
  };
  for (int threads : {8, 3}) {
    omp_set_num_threads(threads);
    run();
  }
  std::thread(run).join();
  omp_set_num_threads(before);
}

TEST(Layer, MasksThatMeanTheSameAreTheSame) {
  Step step;
  step.key.mask.window = -1;
  step.key.mask.chunk_lookback = 7;
  DiffKVMetadataBuilder builder(step.backend, step.key, step.maxima);
  const DiffKVMetadata metadata = builder.build(step.batch);
  step.args.metadata = &metadata;
  step.key.mask = {};
  EXPECT_EQ(refusal([&] { step.layer().forward(step.args); }), "not refused");
}

TEST(Layer, RefusesMetadataThatIsNotItsOwn) {
  Step step;
  DiffKVMetadataBuilder builder(step.backend, step.key, step.maxima);
  const DiffKVMetadata empty;
  step.args.metadata = &empty;
  EXPECT_NE(refusal([&] { step.layer().forward(step.args); }).find("is empty"), std::string::npos);
  const DiffKVMetadata first = builder.build(step.batch);
  const DiffKVMetadata second = builder.build(step.batch);
  step.args.metadata = &first;
  EXPECT_NE(refusal([&] { step.layer().forward(step.args); }).find("stale"), std::string::npos);
  step.args.metadata = &second;
  step.key.mask.window = 5;
  EXPECT_NE(refusal([&] { step.layer().forward(step.args); }).find("window 5"), std::string::npos);
}

// What the planner has read of the masks must still be so when the kernels read it again.
TEST(Layer, RefusesMasksThatChangedAfterPlanning) {
  Step step;
  step.key.mask.prefix_window = 4;
  std::vector<std::int32_t> prefix_lens{20};
  step.batch.prefix_lens = view_of(prefix_lens.data(), {1});
  DiffKVMetadataBuilder builder(step.backend, step.key, step.maxima);
  const DiffKVMetadata metadata = builder.build(step.batch);
  step.args.metadata = &metadata;
  prefix_lens[0] = 0;
  EXPECT_NE(refusal([&] { step.layer().forward(step.args); }).find("prefix_lens"),
            std::string::npos);
  EXPECT_NE(refusal([&] { metadata.plan().work_items(step.batch); }).find("prefix_lens"),
            std::string::npos);
  prefix_lens[0] = 20;
  EXPECT_EQ(refusal([&] { step.layer().forward(step.args); }), "not refused");
}

TEST(Layer, RefusesAnEmptyPlan) {
  EXPECT_NE(refusal([] { Plan().work_items({}); }).find("plan is empty"), std::string::npos);
}

TEST(Layer, RefusesWhatTheLayerWasNotBuiltFor) {
  Step step;
  const DiffKVAttention layer = step.layer();
  std::vector<std::int64_t> slots{16};
  std::vector<float> rows(4 * 16);
  KvCacheView other = step.cache;
  other.num_kv_heads = 1;
  EXPECT_NE(refusal([&] {
              layer.do_kv_cache_update(view_of(rows.data(), {1, 1, 16}),
                                       view_of(rows.data(), {1, 1, 8}), other,
                                       view_of(slots.data(), {1}));
            }).find("num_kv_heads 1"),
            std::string::npos);
  // A profiling run is held to the layer's shape too.
  step.args.metadata = nullptr;
  step.args.output = view_of(step.output.data(), {2, 2, 8});
  EXPECT_NE(refusal([&] { layer.forward(step.args); }).find("num_heads 2"), std::string::npos);
}

TEST(Layer, OutputMustNotLieOverWhatIsRead) {
  Step step;
  DiffKVMetadataBuilder builder(step.backend, step.key, step.maxima);
  const DiffKVMetadata metadata = builder.build(step.batch);
  step.args.metadata = &metadata;
  for (float* memory : {step.pool.data() + 48, step.query.data()}) {
    step.args.output = view_of(memory, {1, 4, 8});
    EXPECT_NE(refusal([&] { step.layer().forward(step.args); }).find("output lies over"),
              std::string::npos);
  }
}

TEST(Layer, BackendSaysNoBeforeALayerDoes) {
  const DiffKVBackend backend("cpu");
  Problem problem;
  EXPECT_FALSE(backend.supports(problem).ok);
  problem.key = small_key();
  problem.output_dtype = DType::kF32;
  EXPECT_TRUE(backend.supports(problem).ok) << backend.supports(problem).reason;
  problem.key.head_size_qk = 7;
  EXPECT_NE(backend.supports(problem).reason.find("head_size_qk"), std::string::npos);
  problem.key = small_key();
  problem.output_dtype = DType::kBF16;
  EXPECT_FALSE(backend.supports(problem).ok);
}

TEST(Layer, BuilderIsOnTheBackendsDevice) {
  Step step;
  EXPECT_NE(refusal([&] {
              DiffKVMetadataBuilder(step.backend, step.key, step.maxima, {DeviceType::kCuda, 0});
            }).find("cuda:0"),
            std::string::npos);
}

TEST(Layer, CacheBytes) {
  const KvCacheSpec spec{.block_size = 16, .num_kv_heads = 2, .head_size_qk = 16, .head_size_v = 8};
  EXPECT_EQ(DiffKVBackend::get_kv_cache_bytes(spec, 3), 3 * 16 * 2 * 24 * 2);
  EXPECT_NE(refusal([&] { DiffKVBackend::get_kv_cache_shape(spec, -1); }).find("0 or more"),
            std::string::npos);
  EXPECT_NE(refusal([&] {
              DiffKVBackend::get_kv_cache_bytes(spec, std::numeric_limits<std::int64_t>::max());
            }).find("more bytes than int64"),
            std::string::npos);
}

// kBatchInvariant has partials for every sequence that is cut; a window bounds them.
TEST(Layer, InvariantWorkspaceIsBounded) {
  const DiffKVBackend backend("cpu");
  PlanKey key;
  key.num_heads = 64;
  key.num_kv_heads = 4;
  key.head_size_qk = 192;
  key.head_size_v = 128;
  key.policy = SchedulePolicy::kBatchInvariant;
  const PlanMaxima maxima{.max_tokens = 8192, .max_seqs = 256, .max_seq_len = 131072};
  EXPECT_LT(workspace_bytes(backend.compute(), key, maxima), std::int64_t{400} << 20);
  key.num_kv_heads = 8;
  key.mask.window = 128;
  EXPECT_LT(workspace_bytes(backend.compute(), key, maxima), std::int64_t{300} << 20);
  key.num_heads = key.num_kv_heads = 61;  // no tile spans several of them
  EXPECT_NE(refusal([&] {
              PlanMaxima huge = maxima;
              huge.max_seqs = huge.max_tokens = 1 << 22;
              key.mask.window = 0;
              workspace_bytes(backend.compute(), key, huge);
            }).find("partials"),
            std::string::npos);
}

}  // namespace
}  // namespace diffkv
