// Benchmarks on a device whose memory the host cannot touch.
#include <gtest/gtest.h>

#include "bench/harness/run.h"
#include "bench/harness/workload.h"
#include "tests/device/separate_session.h"

namespace diffkv::testing {
namespace {

bench::Scenario tiny(std::int64_t block_size = 4) {
  bench::Scenario s;
  s.name = "tiny";
  s.num_heads = 4;
  s.num_kv_heads = 2;
  s.head_size_qk = 24;
  s.head_size_v = 16;
  s.block_size = block_size;
  s.seqs = {{1, 300}, {3, 40}, {5, 5}};
  return s;
}

bench::RunResult run_tiny(device::Session& session, const bench::Scenario& scenario) {
  return bench::run(session, {scenario}, {.seconds = 0}, [](std::size_t) {});
}

TEST(Bench, IsRightInSeparateMemory) {
  for (const std::int64_t block_size : {0, 16}) {
    for (const DType kv_dtype : {DType::kBF16, DType::kE4M3}) {
      const SeparateMemoryBackend backend;
      SeparateSession session(backend);
      bench::Scenario s = tiny(block_size);
      s.kv_dtype = kv_dtype;
      s.sinks = true;
      s.soft_cap = 2;
      s.alibi = true;
      s.layout = kv_dtype == DType::kBF16 ? KvCacheLayout::kHND : KvCacheLayout::kNHD;
      const bench::RunResult result = run_tiny(session, s);
      EXPECT_TRUE(result.all_right()) << result.scenarios[0].verification.what;
      EXPECT_EQ(result.scenarios[0].verification.rows, 9 * 4);
      EXPECT_EQ(backend.allocations(), 0);
    }
  }
}

TEST(Bench, TimesRecordedWorkAgainstAFloor) {
  const SeparateMemoryBackend backend;
  SeparateSession session(backend);
  const bench::RunResult run = run_tiny(session, tiny());
  const bench::ScenarioResult& result = run.scenarios.at(0);
  EXPECT_TRUE(run.device);
  EXPECT_EQ(session.recordings(), 3);  // plan, update, attend
  EXPECT_EQ(session.launches(), session.flushes());
  EXPECT_GE(result.attend.repetitions, 20);
  EXPECT_GE(result.plan.repetitions, 20);
  EXPECT_GT(result.attend.median_s, 0);
  EXPECT_GT(result.update.median_s, 0);
  EXPECT_DOUBLE_EQ(run.read_floor_s(result), tiny().bytes() / SeparateSession::kReadRate);
  EXPECT_EQ(run.read_rate, SeparateSession::kReadRate);
  EXPECT_EQ(run.gemm_floor_s(result), 0);
  EXPECT_FALSE(run.is_noisy(result) && result.attend.spread() < 0.1);
}

class Spoiling final : public SeparateMemoryBackend {
 public:
  bool attend(const AttentionParams& params, const AttendArgs& args, const Plan& plan,
              Stream stream) const override {
    attend_whole(params, args, plan, stream);
    fill_bytes(args.output.data, 0x3f, 64, {}, stream);
    return false;
  }
};

TEST(Bench, WhatIsWrongInSeparateMemoryIsFoundAndNotTimed) {
  const Spoiling backend;
  SeparateSession session(backend);
  const bench::RunResult run = run_tiny(session, tiny());
  EXPECT_FALSE(run.all_right());
  EXPECT_EQ(session.recordings(), 0);
  EXPECT_EQ(run.scenarios.at(0).attend.repetitions, 0);
}

}  // namespace
}  // namespace diffkv::testing
