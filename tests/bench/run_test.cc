#include "bench/harness/run.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "bench/harness/workload.h"
#include "device/forwarding_backend.h"
#include "diffkv/error.h"

namespace diffkv::bench {
namespace {

// The CPU backend, or one that does what the flags say.
class Changed final : public device::ForwardingBackend {
 public:
  Changed() : ForwardingBackend(find_backend("cpu")) {}

  bool spoil_output = false;  // the last value of the output is off
  bool skip_update = false;   // nothing reaches the cache
  bool refuse = false;        // it supports nothing
  bool is_available = true;
  std::function<void(AttentionParams&)> change;  // of what attention is called with
  mutable int attends = 0;
  mutable KvCacheView seen;  // the cache of the last call of attention

  Support available() const override { return {is_available, "it is away", ""}; }
  Support supports(const Problem& problem) const override {
    return refuse ? Support{false, "it does not want to", ""} : base().supports(problem);
  }
  void update_cache(const ConstTensorView& key, const ConstTensorView& value,
                    const KvCacheView& cache, const ConstTensorView& slot_mapping,
                    Stream stream) const override {
    if (!skip_update) base().update_cache(key, value, cache, slot_mapping, stream);
  }
  bool attend(const AttentionParams& params, const AttendArgs& args, const Plan& plan,
              Stream stream) const override {
    ++attends;
    seen = args.cache;
    AttentionParams changed = params;
    if (change) change(changed);
    if (base().attend(changed, args, plan, stream)) base().combine(changed, args, plan, stream);
    if (spoil_output) {
      auto* bits = static_cast<std::uint16_t*>(args.output.data);
      bits[args.output.numel() - 1] ^= 0x4000U;
    }
    return false;
  }
};

Scenario tiny(std::int64_t block_size = 4) {
  Scenario s;
  s.name = "tiny";
  s.num_heads = 4;
  s.num_kv_heads = 2;
  s.head_size_qk = 24;
  s.head_size_v = 16;
  s.block_size = block_size;
  s.seqs = {{1, 70}, {3, 40}, {5, 5}};
  return s;
}

RunResult run_tiny(const Backend& backend, const Scenario& scenario) {
  return run(backend, {scenario}, {.seconds = 0}, [](std::size_t) {});
}

Verification verify(const Backend& backend, const Scenario& scenario) {
  const auto session = device::open_session(backend);
  return Workload(*session, scenario).verify();
}

TEST(Workload, IsRightForEveryKindOfScenario) {
  for (const std::int64_t block_size : {0, 1, 4, 16}) {
    for (const DType kv_dtype : {DType::kF32, DType::kF16, DType::kBF16, DType::kE4M3}) {
      for (const SchedulePolicy policy :
           {SchedulePolicy::kBalanced, SchedulePolicy::kBatchInvariant}) {
        Scenario s = tiny(block_size);
        s.kv_dtype = kv_dtype;
        s.dtype = is_fp8(kv_dtype) ? DType::kBF16 : kv_dtype;
        s.policy = policy;
        s.sinks = block_size == 4;
        s.window = block_size == 4 ? 9 : 0;
        s.soft_cap = block_size == 16 ? 2 : 0;
        s.alibi = block_size == 16;
        const Verification result = verify(find_backend("cpu"), s);
        EXPECT_TRUE(result.ok()) << block_size << " " << to_string(kv_dtype) << result.what;
        EXPECT_EQ(result.rows, 9 * 4);
        EXPECT_LT(result.worst_error, result.tolerance);
      }
    }
  }
}

// Right with the feature, and wrong once the backend is not told of it: so both the call and the
// reference have it, and it makes a difference.
void expect_reached(const Scenario& scenario,
                    const std::function<void(AttentionParams&)>& leave_out) {
  Changed backend;
  const Verification right = verify(backend, scenario);
  EXPECT_TRUE(right.ok()) << right.what;
  backend.change = leave_out;
  EXPECT_GT(verify(backend, scenario).wrong, 0);
}

TEST(Workload, HasTheSoftCap) {
  Scenario s = tiny();
  s.soft_cap = 2;
  expect_reached(s, [](AttentionParams& params) { params.soft_cap = 0; });
  EXPECT_TRUE(Workload::problem_of(s).soft_cap);
  EXPECT_FALSE(Workload::problem_of(tiny()).soft_cap);
}

TEST(Workload, HasTheSlopes) {
  Scenario s = tiny();
  s.alibi = true;
  expect_reached(s, [](AttentionParams& params) { params.alibi_slopes = {}; });
  EXPECT_TRUE(Workload::problem_of(s).alibi);
  EXPECT_FALSE(Workload::problem_of(tiny()).alibi);
  Changed backend;
  std::vector<float> slopes;
  backend.change = [&](const AttentionParams& params) {
    const auto* data = static_cast<const float*>(params.alibi_slopes.data);
    slopes.assign(data, data + params.alibi_slopes.numel());
  };
  verify(backend, s);
  EXPECT_EQ(slopes, (std::vector<float>{1.0F / 4, 1.0F / 16, 1.0F / 64, 1.0F / 256}));
}

TEST(Workload, HasTheLayout) {
  constexpr std::int64_t kRow = 24 + 16;
  for (const std::int64_t block_size : {0, 4, 16}) {
    for (const DType kv_dtype : {DType::kBF16, DType::kE4M3}) {
      Scenario s = tiny(block_size);
      s.kv_dtype = kv_dtype;
      EXPECT_EQ(Workload::problem_of(s).layout, KvCacheLayout::kNHD);
      s.layout = KvCacheLayout::kHND;
      EXPECT_EQ(Workload::problem_of(s).layout, KvCacheLayout::kHND);
      const Changed backend;
      const Verification result = verify(backend, s);
      EXPECT_TRUE(result.ok()) << result.what;
      EXPECT_EQ(backend.seen.dense, block_size == 0);
      EXPECT_EQ(backend.seen.key.stride_token, kRow);
      EXPECT_EQ(backend.seen.key.stride_head, backend.seen.block_size * kRow);
    }
  }
}

TEST(Run, SaysWhatTheProblemIs) {
  Changed backend;
  backend.refuse = true;
  Scenario s = tiny();
  s.soft_cap = 2.5F;
  s.alibi = true;
  s.layout = KvCacheLayout::kHND;
  const RunResult result = run(backend, {tiny(), s}, {.seconds = 0}, [](std::size_t) {});
  EXPECT_EQ(result.scenarios[0].layer, "4/2 heads, 24/16, bf16, pages of 4");
  EXPECT_EQ(result.scenarios[0].soft_cap, 0);
  EXPECT_FALSE(result.scenarios[0].alibi);
  EXPECT_EQ(result.scenarios[0].layout, "NHD");
  EXPECT_EQ(result.scenarios[1].layer,
            "4/2 heads, 24/16, bf16, pages of 4, HND, soft cap 2.5, ALiBi");
  EXPECT_EQ(result.scenarios[1].soft_cap, 2.5);
  EXPECT_TRUE(result.scenarios[1].alibi);
  EXPECT_EQ(result.scenarios[1].layout, "HND");
}

TEST(Run, TimesWhatIsRight) {
  const Changed backend;
  std::vector<std::size_t> begun;
  const RunResult result =
      run(backend, {tiny()}, {.seconds = 0}, [&](std::size_t i) { begun.push_back(i); });
  EXPECT_EQ(begun, std::vector<std::size_t>{0});
  ASSERT_EQ(result.scenarios.size(), 1U);
  const ScenarioResult& tiny_result = result.scenarios[0];
  EXPECT_TRUE(result.all_right()) << tiny_result.verification.what;
  EXPECT_EQ(tiny_result.attend.repetitions, 5);
  EXPECT_EQ(backend.attends, 6);  // verified once
  EXPECT_GT(tiny_result.attend.least_s, 0);
  EXPECT_LE(tiny_result.attend.least_s, tiny_result.attend.median_s);
  EXPECT_GT(tiny_result.plan.median_s, 0);
  EXPECT_GT(tiny_result.update.median_s, 0);
  EXPECT_EQ(tiny_result.bytes, tiny().bytes());
  EXPECT_GT(result.read_rate, 0);
  EXPECT_GT(result.gemm_rate_before, 0);
  EXPECT_GE(result.flush_bytes, 4 * result.machine.last_level_bytes);
  EXPECT_DOUBLE_EQ(result.read_floor_s(tiny_result), tiny().bytes() / result.read_rate);
}

// In turn: a repetition of each scenario a round, after all were verified.
TEST(Run, ScenariosTakeTurns) {
  class Turns final : public device::ForwardingBackend {
   public:
    Turns() : ForwardingBackend(find_backend("cpu")) {}
    bool attend(const AttentionParams& params, const AttendArgs& args, const Plan& plan,
                Stream stream) const override {
      block_sizes.push_back(args.cache.block_size);
      return base().attend(params, args, plan, stream);
    }
    mutable std::vector<std::int64_t> block_sizes;
  };
  const Turns backend;
  const RunResult result = run(backend, {tiny(4), tiny(8), tiny(16)},
                               {.seconds = 0, .in_turn = true}, [](std::size_t) {});
  std::vector<std::int64_t> expected;
  for (int round = -1; round < 5; ++round) {
    for (const std::int64_t block_size : {4, 8, 16}) expected.push_back(block_size);
  }
  EXPECT_EQ(backend.block_sizes, expected);
  EXPECT_TRUE(result.in_turn);
  ASSERT_EQ(result.scenarios.size(), 3U);
  for (const ScenarioResult& scenario : result.scenarios) {
    EXPECT_EQ(scenario.attend.repetitions, 5);
    EXPECT_GT(scenario.attend.to_first, 0);
    EXPECT_GT(scenario.read_rate, 0);
  }
  EXPECT_EQ(result.scenarios[0].attend.to_first, 1);
}

// What is wrong has no turn, also where it would be the first.
TEST(Run, OnlyWhatIsRightTakesTurns) {
  Changed backend;
  backend.refuse = true;
  const RunResult result =
      run(backend, {tiny(), tiny()}, {.seconds = 0, .in_turn = true}, [](std::size_t) {});
  ASSERT_EQ(result.scenarios.size(), 2U);
  EXPECT_EQ(result.scenarios[1].attend.repetitions, 0);
  EXPECT_EQ(backend.attends, 0);
}

TEST(Run, AWrongOutputIsFoundAndNotTimed) {
  Changed backend;
  backend.spoil_output = true;
  const RunResult result = run_tiny(backend, tiny());
  EXPECT_FALSE(result.all_right());
  EXPECT_EQ(result.scenarios[0].verification.wrong, 1);
  EXPECT_EQ(result.scenarios[0].attend.repetitions, 0);
}

TEST(Run, ACacheThatIsNotWrittenIsFound) {
  Changed backend;
  backend.skip_update = true;
  const RunResult result = run_tiny(backend, tiny());
  EXPECT_FALSE(result.all_right());
}

TEST(Run, WhatIsNotSupportedIsSaid) {
  Changed backend;
  backend.refuse = true;
  const RunResult result = run_tiny(backend, tiny());
  EXPECT_TRUE(result.all_right());
  EXPECT_FALSE(result.scenarios[0].supported);
  EXPECT_EQ(result.scenarios[0].kernel, "it does not want to");
}

TEST(Run, BackendsThatCannotRunAreRefused) {
  Changed away;
  away.is_available = false;
  EXPECT_THROW(run_tiny(away, tiny()), Error);
}

RunResult quiet() {
  RunResult run;
  run.read_rate = 10e9;
  run.gemm_rate_before = 100e9;
  run.gemm_rate_after = 101e9;
  ScenarioResult result;
  result.name = "first";
  result.read_rate = 9e9;
  result.attend = {.repetitions = 5, .median_s = 1, .least_s = 1, .p25_s = 1, .p75_s = 1.05};
  run.scenarios = {result, result};
  run.scenarios[1].name = "second";
  return run;
}

TEST(Noise, AQuietMachineHasNone) { EXPECT_TRUE(quiet().noise().empty()); }

TEST(Noise, WideTimesAreSaid) {
  RunResult run = quiet();
  run.scenarios[1].attend.p75_s = 1.3;
  ASSERT_EQ(run.noise().size(), 1U);
  EXPECT_NE(run.noise()[0].find("1 of 2"), std::string::npos) << run.noise()[0];
  EXPECT_NE(run.noise()[0].find("second: 30 %"), std::string::npos) << run.noise()[0];
  EXPECT_FALSE(run.is_noisy(run.scenarios[0]));
  EXPECT_TRUE(run.is_noisy(run.scenarios[1]));
}

TEST(Noise, SlowMemoryIsSaid) {
  RunResult run = quiet();
  run.scenarios[0].read_rate = 4e9;
  ASSERT_EQ(run.noise().size(), 1U);
  EXPECT_NE(run.noise()[0].find("first: 4.0 GB/s of 10.0"), std::string::npos) << run.noise()[0];
  EXPECT_TRUE(run.is_noisy(run.scenarios[0]));
}

TEST(Noise, PreemptionsAreSaid) {
  RunResult run = quiet();
  run.scenarios[1].attend.preemptions_per_s = 70;
  ASSERT_EQ(run.noise().size(), 1U);
  EXPECT_NE(run.noise()[0].find("second: 70 times"), std::string::npos) << run.noise()[0];
  EXPECT_TRUE(run.is_noisy(run.scenarios[1]));
}

TEST(Noise, AChangedGemmRateIsSaid) {
  for (const double after : {90e9, 110e9}) {
    RunResult run = quiet();
    run.gemm_rate_after = after;
    ASSERT_EQ(run.noise().size(), 1U);
    EXPECT_NE(run.noise()[0].find("100 GFLOP/s before"), std::string::npos) << run.noise()[0];
  }
}

// Rates that a machine can have: a kernel left out by the compiler would be far beyond.
TEST(Machine, TheGemmRateIsPossible) {
  const double rate = measure_gemm_rate();
  EXPECT_GT(rate, 1e8);
  EXPECT_LT(rate, 1e12 * this_machine().threads);
}

TEST(Machine, IsTold) {
  const Machine machine = this_machine();
  EXPECT_FALSE(machine.cpu.empty());
  EXPECT_GT(machine.threads, 0);
  EXPECT_GE(flush_bytes(machine), std::int64_t{256} << 20);
  EXPECT_EQ(flush_bytes({.cpu = "", .threads = 1, .last_level_bytes = std::int64_t{1} << 30}),
            std::int64_t{4} << 30);
}

}  // namespace
}  // namespace diffkv::bench
