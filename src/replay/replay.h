// Replays a request trace through the library as a serving engine would run it.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "device/session.h"
#include "diffkv/tensor.h"
#include "replay/model.h"
#include "replay/progress.h"
#include "replay/stats.h"
#include "replay/trace.h"

namespace diffkv::replay {

// Most rows that one replay compares: each takes up to milliseconds, and memory from the start.
inline constexpr std::int64_t kMaxVerifyRows = 1'000'000;

struct ReplayOptions {
  Model model;          // of one rank, with the layers to run
  std::string backend;  // as in find_backend; of a replay that opens its own session
  DType dtype = DType::kBF16;
  DType cache_dtype = DType::kBF16;
  std::int64_t block_size = 16;
  double cache_bytes = 0.0;  // of all layers that run
  std::int64_t max_num_batched_tokens = 2048;
  std::int64_t max_num_seqs = 128;
  double seconds = 0.0;   // of wall time after which to stop; 0: none
  double speed_up = 0.0;  // arrivals are this much faster than the trace's; 0: all at once
  std::uint64_t seed = 0;
  std::int64_t verify_rows = 0;  // 0 to kMaxVerifyRows
  double bandwidth = 0.0;  // peak read bandwidth, bytes / s; 0: measured before the first step
  // Record a step of each padded shape once (see padded_size) and launch that for later steps.
  bool graphs = false;
};

// How many blocks each layer of a kind has. The window layers' pool is what they can need at most
// (max_num_seqs windows and one step's tokens), but no more than half of the memory; the rest is
// the full-attention layers'.
struct CacheSizes {
  std::int64_t full_blocks = 0;
  std::int64_t window_blocks = 0;
};

// Throws Error if the memory is not enough for two blocks of each.
CacheSizes divide_cache(const ReplayOptions& options);

// Called after every step and every verified row. Once it has said no it is not asked again: the
// step is finished without verifying any more rows, and the replay stops.
using Observer = std::function<bool(const Progress&)>;

// Each step: schedule, build metadata once per layer kind, then for every layer of the kind write
// the cache and attend. The clock is simulated: it advances by the latency of each step (metadata,
// cache update and attention of the layers that run; not by making inputs or verifying), and where
// nothing has arrived it jumps to the next arrival. With speed_up 0 every request is there at the
// start. Half of verify_rows are rows of decode tokens, half of prefill tokens, uniformly spread
// over each, in a random layer and head, no token twice; a trace with fewer tokens has fewer rows,
// and rows that a stopped run does not reach are not checked.
// Throws Error before the first step if an option is out of range, a request cannot fit in the
// cache, or graphs are asked for where the session cannot record.
ReplayResult replay(const std::vector<TraceRequest>& requests, const ReplayOptions& options,
                    device::Session& session, const Observer& observer);
// The same in a session of options.backend.
ReplayResult replay(const std::vector<TraceRequest>& requests, const ReplayOptions& options,
                    const Observer& observer);

}  // namespace diffkv::replay
