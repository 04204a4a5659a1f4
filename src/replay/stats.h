// What a replay measured, step by step and in sum.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "diffkv/attention.h"

namespace diffkv::replay {

enum class StepKind : std::uint8_t { kPrefill, kDecode, kMixed };
inline constexpr int kNumStepKinds = 3;

std::string_view to_string(StepKind kind);

struct StepRecord {
  double start_s = 0.0;   // on the replay's clock
  double plan_s = 0.0;    // building metadata, once per layer kind
  double update_s = 0.0;  // writing keys and values, all layers
  double attend_s = 0.0;  // attention, all layers
  std::int64_t prefill_tokens = 0;
  std::int64_t decode_tokens = 0;
  std::int64_t num_seqs = 0;
  std::int64_t num_waiting = 0;  // requests that have arrived and hold no blocks
  std::int64_t num_preempted = 0;
  double full_occupancy = 0.0;  // share of the pool's blocks in use, 0 to 1
  double window_occupancy = 0.0;
  double kv_bytes = 0.0;  // of keys and values some row sees, each once per layer
  double flops = 0.0;     // of the visible (row, key) pairs of all query heads and layers

  double latency_s() const { return plan_s + update_s + attend_s; }
  std::int64_t tokens() const { return prefill_tokens + decode_tokens; }
  StepKind kind() const {
    if (decode_tokens == 0) return StepKind::kPrefill;
    return prefill_tokens == 0 ? StepKind::kDecode : StepKind::kMixed;
  }
};

// Rows compared with the fp64 reference.
struct VerifyResult {
  std::int64_t rows_asked = 0;
  std::int64_t rows_full = 0;    // checked, of full-attention layers
  std::int64_t rows_window = 0;  // checked, of sliding-window layers
  std::int64_t rows_wrong = 0;
  double worst_error = 0.0;  // |o - ref| / |ref|
  double worst_lse_error = 0.0;
  double tolerance = 0.0;
  double lse_tolerance = 0.0;
  std::string first_wrong;  // which row and what was wrong with it

  std::int64_t rows() const { return rows_full + rows_window; }
};

struct ReplayResult {
  std::vector<StepRecord> steps;
  std::int64_t requests = 0;
  std::int64_t requests_finished = 0;
  std::int64_t prompt_tokens = 0;  // computed, recomputed ones included
  std::int64_t generated_tokens = 0;
  double wall_s = 0.0;
  double bandwidth = 0.0;  // peak read bandwidth, bytes / s
  std::int64_t num_full_blocks = 0;
  std::int64_t num_window_blocks = 0;
  std::int64_t cache_bytes = 0;
  bool stopped = false;     // before every request had finished
  std::int64_t graphs = 0;  // padded shapes that were recorded, both kinds of layer
  VerifyResult verify;
  std::string backend;  // description of the compute backend
};

// The nearest-rank percentile: the least value that at least `percent` % of the values do not
// exceed. 0 of no values. `values` need not be sorted. percent is 0 to 100.
double percentile(std::vector<double> values, double percent);

struct KindSummary {
  std::int64_t steps = 0;
  std::int64_t tokens = 0;
  double p50_s = 0.0;
  double p90_s = 0.0;
  double p99_s = 0.0;
  double latency_s = 0.0;  // sum
  double attend_s = 0.0;   // sum
  double kv_bytes = 0.0;
  double flops = 0.0;
  double peak_fraction = 0.0;  // kv_bytes / attend_s as a share of the peak read bandwidth
};

struct Summary {
  std::array<KindSummary, kNumStepKinds> kinds;
  KindSummary all;
  double tokens_per_s = 0.0;       // by step latency
  double wall_tokens_per_s = 0.0;  // by wall time: making inputs and verifying included
  double full_occupancy_mean = 0.0;
  double full_occupancy_peak = 0.0;
  double window_occupancy_mean = 0.0;
  double window_occupancy_peak = 0.0;
  std::int64_t preemptions = 0;
  double clock_s = 0.0;  // of the replay's clock at the end
};

Summary summarize(const ReplayResult& result);

// A table as rows of cells, the first row being the header.
using Cells = std::vector<std::vector<std::string>>;

// Name and value of each overall figure (no header), for people.
Cells overall_table(const ReplayResult& result, const Summary& summary);
// One row a kind of step that occurred, and one for all.
Cells step_table(const Summary& summary);

// The same as JSON, with units in the names.
std::string to_json(const ReplayResult& result, const Summary& summary);

}  // namespace diffkv::replay
