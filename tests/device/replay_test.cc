// Replays on a device whose memory the host cannot touch.
#include <gtest/gtest.h>

#include <vector>

#include "diffkv/error.h"
#include "replay/layer_group.h"
#include "replay/replay.h"
#include "tests/device/separate_session.h"

namespace diffkv::testing {
namespace {

replay::ReplayOptions small_options() {
  replay::ReplayOptions options;
  options.model =
      replay::choose_layers(replay::divide_heads(replay::find_model("mimo-v2-flash"), 8), "2:2");
  options.cache_bytes = 8 << 20;
  options.max_num_batched_tokens = 50;
  options.max_num_seqs = 7;
  options.verify_rows = 80;
  return options;
}

std::vector<replay::TraceRequest> small_trace() {
  return {{0.0, 150, 9}, {0.5, 3, 20}, {1.0, 70, 1}, {100.0, 1, 1}, {100.5, 31, 12}};
}

bool always(const replay::Progress& /*progress*/) { return true; }

TEST(Replay, IsRightInSeparateMemory) {
  for (const DType cache : {DType::kBF16, DType::kE4M3}) {
    const SeparateMemoryBackend backend;
    SeparateSession session(backend);
    replay::ReplayOptions options = small_options();
    options.cache_dtype = cache;
    const replay::ReplayResult result = replay::replay(small_trace(), options, session, always);
    EXPECT_EQ(result.requests_finished, 5);
    EXPECT_EQ(result.verify.rows(), 80);
    EXPECT_EQ(result.verify.rows_wrong, 0) << result.verify.first_wrong;
    EXPECT_EQ(result.bandwidth, SeparateSession::kReadRate);
    EXPECT_EQ(result.graphs, 0);
    EXPECT_EQ(session.recordings(), 0);
    EXPECT_EQ(backend.allocations(), 0);
  }
}

// Steps of one padded shape share a recording, and each is right with contents of its own.
TEST(Replay, RecordedStepsAreRight) {
  const SeparateMemoryBackend backend;
  SeparateSession session(backend);
  replay::ReplayOptions options = small_options();
  options.graphs = true;
  options.verify_rows = 200;
  const replay::ReplayResult result = replay::replay(small_trace(), options, session, always);
  EXPECT_EQ(result.requests_finished, 5);
  EXPECT_EQ(result.verify.rows(), 200);
  EXPECT_EQ(result.verify.rows_wrong, 0) << result.verify.first_wrong;
  EXPECT_EQ(result.graphs, session.recordings());
  const auto steps = static_cast<std::int64_t>(result.steps.size());
  EXPECT_EQ(session.launches(), 2 * steps);
  EXPECT_LT(session.recordings(), steps);
  for (const replay::StepRecord& step : result.steps) {
    EXPECT_GT(step.plan_s, 0);
    EXPECT_GT(step.update_s, 0);
    EXPECT_GT(step.attend_s, 0);
  }
}

// Stages that lose what the last launch wrote.
class Forgetful final : public SeparateMemoryBackend {
 public:
  mutable int updates_left = 9;

  void update_cache(const ConstTensorView& key, const ConstTensorView& value,
                    const KvCacheView& cache, const ConstTensorView& slot_mapping,
                    Stream stream) const override {
    if (mode() == Mode::kLaunching && updates_left-- <= 0) return;
    SeparateMemoryBackend::update_cache(key, value, cache, slot_mapping, stream);
  }
};

TEST(Replay, WrongRecordedStepsAreFound) {
  const Forgetful backend;
  SeparateSession session(backend);
  replay::ReplayOptions options = small_options();
  options.graphs = true;
  const replay::ReplayResult result = replay::replay(small_trace(), options, session, always);
  EXPECT_GT(result.verify.rows_wrong, 0);
}

TEST(Replay, TheHostHasNoGraphs) {
  replay::ReplayOptions options = small_options();
  options.graphs = true;
  const auto session = device::open_session(find_backend("cpu"));
  EXPECT_THROW(replay::replay(small_trace(), options, *session, always), Error);
}

TEST(PaddedSize, CoversAndIsBounded) {
  std::int64_t last = 0;
  int sizes = 0;
  for (std::int64_t n = 1; n <= 1000; ++n) {
    const std::int64_t padded = replay::padded_size(n, 1000);
    EXPECT_GE(padded, n);
    EXPECT_LE(padded, 1000);
    EXPECT_GE(padded, last);
    EXPECT_EQ(replay::padded_size(padded, 1000), padded);
    sizes += padded != last ? 1 : 0;
    last = padded;
  }
  EXPECT_EQ(sizes, 4 + 31 + 3);
  EXPECT_EQ(replay::padded_size(3, 3), 3);
}

}  // namespace
}  // namespace diffkv::testing
