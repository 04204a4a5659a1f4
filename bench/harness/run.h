// Runs scenarios: verify first, then time.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "bench/harness/machine.h"
#include "bench/harness/scenario.h"
#include "bench/harness/timing.h"
#include "device/session.h"
#include "diffkv/backend.h"

namespace diffkv::bench {

struct RunOptions {
  double seconds = 1.0;  // of repetitions of one scenario; it gets a few even if that takes longer
  bool in_turn = false;  // rounds of one repetition of each scenario; all are in memory at once
};

// What comparing with the reference gave.
struct Verification {
  std::int64_t rows = 0;  // (token, head) rows of the output that were compared
  std::int64_t wrong = 0;
  double worst_error = 0.0;  // |o - ref| / |ref|
  double tolerance = 0.0;
  std::string what;  // the first thing that was wrong, "" if nothing

  bool ok() const { return what.empty(); }
};

struct ScenarioResult {
  std::string name;
  std::string batch;  // for people
  std::string layer;  // for people
  bool supported = false;
  std::string kernel;  // the code path, or why the backend does not run it
  Verification verification;
  double bytes = 0.0;  // that attention must move
  double flops = 0.0;
  double soft_cap = 0.0;
  bool alibi = false;
  std::string layout = "NHD";  // of the cache
  Timing attend;  // attend and combine of one layer; nothing was timed if the result was wrong
  Timing plan;
  Timing update;
  double read_rate = 0.0;  // median bytes / s of reading memory, between the repetitions
  // On a device: seconds of one launch that only reads and writes as many bytes. 0: not measured.
  double floor_s = 0.0;
};

struct RunResult {
  std::string backend;      // name
  std::string description;  // of the backend, for people
  bool device = false;      // computed in memory of its own and timed by its own clock
  Machine machine;
  std::string date;  // UTC, ISO 8601
  double seconds = 0.0;
  bool in_turn = false;
  std::int64_t flush_bytes = 0;
  double read_rate = 0.0;         // bytes / s, the best pass of the run
  double gemm_rate_before = 0.0;  // flops / s
  double gemm_rate_after = 0.0;
  std::vector<ScenarioResult> scenarios;

  double gemm_rate() const {
    return gemm_rate_before > gemm_rate_after ? gemm_rate_before : gemm_rate_after;
  }
  bool all_right() const;
  // Seconds that the machine needs only to move the bytes, or only for the flops (0: not known).
  double read_floor_s(const ScenarioResult& result) const;
  double gemm_floor_s(const ScenarioResult& result) const;
  // Whether the scenario's times vary widely, or memory was slow meanwhile.
  bool is_noisy(const ScenarioResult& result) const;
  // Why the figures are not to be trusted, a sentence each; empty: the machine was quiet.
  std::vector<std::string> noise() const;

 private:
  bool read_was_slow(const ScenarioResult& result) const;
};

// Called before each scenario with its index.
using OnScenario = std::function<void(std::size_t)>;

// On the host all threads read a buffer far beyond the caches before each repetition, so that keys,
// values and queries come from memory; the rate of those reads is the read floor. On a device work
// is recorded and launched from cold caches, and the floor is a launch that only moves the
// scenario's bytes. Throws Error if memory is lacking.
RunResult run(device::Session& session, const std::vector<Scenario>& scenarios,
              const RunOptions& options, const OnScenario& on_scenario);
// The same in a session of its own. Throws Error if the backend cannot run here.
RunResult run(const Backend& backend, const std::vector<Scenario>& scenarios,
              const RunOptions& options, const OnScenario& on_scenario);

}  // namespace diffkv::bench
