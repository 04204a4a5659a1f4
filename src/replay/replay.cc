#include "replay/replay.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <unordered_map>
#include <utility>

#include "diffkv/error.h"
#include "replay/layer_group.h"
#include "replay/row_sampler.h"
#include "replay/scheduler.h"

namespace diffkv::replay {
namespace {

using Clock = std::chrono::steady_clock;

void check_options(const std::vector<TraceRequest>& requests, const ReplayOptions& options) {
  const auto check = [](bool ok, const char* name, double value, const char* expected) {
    if (!ok) {
      throw Error(ErrorCode::kInvalidArgument,
                  fmt::format("{} is {}, expected {}", name, value, expected));
    }
  };
  const auto in_range = [&](const char* name, std::int64_t value, std::int64_t most) {
    check(value >= 1 && value <= most, name, static_cast<double>(value),
          fmt::format("1 to {}", most).c_str());
  };
  check(!requests.empty(), "the number of requests", 0, "at least 1");
  in_range("block_size", options.block_size, 1 << 16);
  in_range("max_num_batched_tokens", options.max_num_batched_tokens, 1 << 20);
  in_range("max_num_seqs", options.max_num_seqs, 1 << 16);
  check(options.seconds >= 0 && std::isfinite(options.seconds), "seconds", options.seconds,
        "a number of seconds, or 0 for no limit");
  check(options.speed_up >= 0 && std::isfinite(options.speed_up), "speed_up", options.speed_up,
        "a positive factor, or 0 for all requests at once");
  check(options.verify_rows >= 0 && options.verify_rows <= kMaxVerifyRows, "verify_rows",
        static_cast<double>(options.verify_rows), fmt::format("0 to {}", kMaxVerifyRows).c_str());
}

std::int64_t max_seq_len(const std::vector<TraceRequest>& requests) {
  std::int64_t longest = 0;
  for (const TraceRequest& request : requests) {
    longest = std::max(longest, request.prompt_tokens + request.generated_tokens - 1);
  }
  return longest;
}

double block_bytes(const ReplayOptions& options, const LayerKind& kind) {
  const std::int64_t head_sizes = options.model.head_size_qk + options.model.head_size_v;
  return static_cast<double>(options.block_size * kind.num_kv_heads * head_sizes *
                             size_of(options.cache_dtype) * kind.num_layers);
}

// What all parts of one replay share.
class Replay {
 public:
  Replay(const std::vector<TraceRequest>& requests, const ReplayOptions& options,
         device::Session& session)
      : requests_(requests),
        options_(options),
        sizes_(divide_cache(options)),
        scheduler_({.max_num_batched_tokens = options.max_num_batched_tokens,
                    .max_num_seqs = options.max_num_seqs,
                    .block_size = options.block_size,
                    .num_full_blocks = sizes_.full_blocks,
                    .num_window_blocks = sizes_.window_blocks,
                    .window = options.model.window.window}),
        session_(&fitting(session)),
        full_(session, group(options.model.full, sizes_.full_blocks, options.seed * 2 + 1)),
        window_(session, group(options.model.window, sizes_.window_blocks, options.seed * 2 + 2)),
        sampler_(requests, options.model, options.verify_rows, options.seed) {
    progress_.requests = static_cast<std::int64_t>(requests.size());
    for (const TraceRequest& request : requests) {
      progress_.tokens_total += request.prompt_tokens + request.generated_tokens;
    }
  }

  ReplayResult run(const Observer& observer) {
    observer_ = &observer;
    result_.requests = progress_.requests;
    result_.backend = session_->backend().description();
    result_.num_full_blocks = sizes_.full_blocks;
    result_.num_window_blocks = sizes_.window_blocks;
    result_.cache_bytes = full_.cache_bytes() + window_.cache_bytes();
    result_.verify.rows_asked = options_.verify_rows;
    result_.bandwidth = options_.bandwidth > 0 ? options_.bandwidth : session_->measure_read_rate();
    start_ = Clock::now();
    do {
      arrive();
      if (scheduler_.idle()) break;
      step();
    } while (go_on());
    result_.wall_s = progress_.elapsed_s;
    result_.graphs = full_.num_recorded() + window_.num_recorded();
    result_.requests_finished = progress_.requests_finished;
    result_.stopped = result_.requests_finished < result_.requests;
    return std::move(result_);
  }

 private:
  // Asks the observer and the clock, until one of them says stop.
  bool go_on() {
    progress_.elapsed_s = std::chrono::duration<double>(Clock::now() - start_).count();
    const bool out_of_time = options_.seconds > 0 && progress_.elapsed_s >= options_.seconds;
    if (!stopping_) stopping_ = !(*observer_)(progress_) || out_of_time;
    return !stopping_;
  }

  // Before anything large is allocated.
  device::Session& fitting(device::Session& session) const {
    for (std::size_t i = 0; i < requests_.size(); ++i) {
      scheduler_.check_fits(requests_[i], static_cast<std::int64_t>(i));
    }
    return session;
  }

  LayerGroupConfig group(const LayerKind& kind, std::int64_t num_blocks, std::uint64_t seed) const {
    return {.model = options_.model,
            .kind = kind,
            .dtype = options_.dtype,
            .cache_dtype = options_.cache_dtype,
            .block_size = options_.block_size,
            .num_blocks = num_blocks,
            .max_tokens = options_.max_num_batched_tokens,
            .max_seqs = std::min(options_.max_num_seqs, options_.max_num_batched_tokens),
            .max_seq_len = max_seq_len(requests_),
            .seed = seed,
            .graphs = options_.graphs};
  }

  double arrival(std::size_t i) const {
    return options_.speed_up > 0 ? requests_[i].arrival_s / options_.speed_up : 0.0;
  }

  // Queues what has arrived; where nothing is left to do, waits for the next.
  void arrive() {
    if (scheduler_.idle() && arrived_ < requests_.size()) {
      clock_s_ = std::max(clock_s_, arrival(arrived_));
    }
    for (; arrived_ < requests_.size() && arrival(arrived_) <= clock_s_; ++arrived_) {
      scheduler_.add(requests_[arrived_]);
    }
  }

  void step() {
    const Step step = scheduler_.schedule();
    StepRecord record;
    record.start_s = clock_s_;
    record.num_seqs = static_cast<std::int64_t>(step.seqs.size());
    record.num_waiting = scheduler_.num_waiting();
    record.num_preempted = step.num_preempted;
    record.decode_tokens = step.num_decodes;
    record.prefill_tokens = step.num_tokens - step.num_decodes;
    record.full_occupancy = occupancy(scheduler_.full_pool());
    record.window_occupancy = occupancy(scheduler_.window_pool());
    record.kv_bytes = full_.kv_bytes(step) + window_.kv_bytes(step);
    record.flops = full_.flops(step) + window_.flops(step);

    const SampledRows rows = sampler_.rows_of(step);
    const auto ask = [this] { return go_on(); };
    full_.run(step, rows.full, record, result_.verify, ask);
    window_.run(step, stopping_ ? std::vector<RowToVerify>{} : rows.window, record, result_.verify,
                ask);
    clock_s_ += record.latency_s();
    result_.steps.push_back(record);
    count(step);
    for (const std::int64_t id : scheduler_.finish(step)) {
      full_.forget(id);
      window_.forget(id);
      ++progress_.requests_finished;
    }
  }

  static double occupancy(const BlockAllocator& pool) {
    return static_cast<double>(pool.num_used()) / static_cast<double>(pool.num_blocks() - 1);
  }

  void count(const Step& step) {
    for (const ScheduledSeq& seq : step.seqs) {
      const Sequence& sequence = *seq.sequence;
      const std::int64_t end = seq.context_len + seq.query_len;
      const bool generates = end == sequence.known();
      result_.prompt_tokens += seq.decode ? 0 : seq.query_len;
      result_.generated_tokens += generates ? 1 : 0;
      // A recomputed token is no progress.
      std::int64_t& furthest = furthest_[sequence.id];
      progress_.tokens_done += std::max<std::int64_t>(end - furthest, 0);
      furthest = std::max(furthest, end);
      if (generates && sequence.generated + 1 == sequence.to_generate) {
        ++progress_.tokens_done;  // the last token is never computed
        furthest_.erase(sequence.id);
      }
    }
  }

  const std::vector<TraceRequest>& requests_;
  const ReplayOptions& options_;
  CacheSizes sizes_;
  Scheduler scheduler_;
  device::Session* session_;
  LayerGroup full_;
  LayerGroup window_;
  RowSampler sampler_;
  Progress progress_;
  ReplayResult result_;
  std::unordered_map<std::int64_t, std::int64_t> furthest_;  // tokens computed once, by id
  double clock_s_ = 0.0;
  std::size_t arrived_ = 0;
  const Observer* observer_ = nullptr;
  Clock::time_point start_;
  bool stopping_ = false;
};

}  // namespace

CacheSizes divide_cache(const ReplayOptions& options) {
  const double full = block_bytes(options, options.model.full);
  const double window = block_bytes(options, options.model.window);
  const std::int64_t size = options.block_size;
  const std::int64_t live = (options.model.window.window - 1 + size - 1) / size + 1;
  // Each sequence's window and one block that a step's tokens begin, and a step's tokens.
  const std::int64_t most =
      options.max_num_seqs * (live + 1) + (options.max_num_batched_tokens + size - 1) / size + 1;
  constexpr double kMost = 1 << 30;
  CacheSizes sizes;
  sizes.window_blocks =
      static_cast<std::int64_t>(std::clamp(options.cache_bytes / 2 / window, 0.0, kMost));
  sizes.window_blocks = std::min(sizes.window_blocks, most);
  const double rest = options.cache_bytes - static_cast<double>(sizes.window_blocks) * window;
  sizes.full_blocks = static_cast<std::int64_t>(std::clamp(rest / full, 0.0, kMost));
  if (sizes.full_blocks < 2 || sizes.window_blocks < 2) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("the cache has {:.0f} bytes, expected at least {:.0f}: two blocks of "
                            "{} tokens of each kind of layer",
                            options.cache_bytes, 2 * (full + 2 * window), size));
  }
  return sizes;
}

ReplayResult replay(const std::vector<TraceRequest>& requests, const ReplayOptions& options,
                    device::Session& session, const Observer& observer) {
  check_options(requests, options);
  return Replay(requests, options, session).run(observer);
}

ReplayResult replay(const std::vector<TraceRequest>& requests, const ReplayOptions& options,
                    const Observer& observer) {
  return replay(requests, options, *device::open_session(find_backend(options.backend)), observer);
}

}  // namespace diffkv::replay
