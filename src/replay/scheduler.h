// Continuous batching with chunked prefill: which tokens of which requests a step computes, and
// which cache blocks they live in. Pure bookkeeping: no tensors, no clock.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "replay/block_allocator.h"
#include "replay/trace.h"

namespace diffkv::replay {

struct SchedulerConfig {
  std::int64_t max_num_batched_tokens = 2048;  // query tokens of a step
  std::int64_t max_num_seqs = 128;             // requests that hold blocks at the same time
  std::int64_t block_size = 16;
  std::int64_t num_full_blocks = 0;    // pool of the full-attention layers, null block included
  std::int64_t num_window_blocks = 0;  // pool of the sliding-window layers, likewise
  std::int64_t window = 128;           // a row at p sees keys above p - window
};

// A request that has been added and has not finished.
struct Sequence {
  std::int64_t id = 0;      // order of adding
  std::int64_t prompt = 0;  // tokens of the prompt
  std::int64_t to_generate = 0;
  std::int64_t generated = 0;  // survives preemption
  std::int64_t computed = 0;   // tokens whose keys are in the cache
  std::vector<std::int32_t> full_blocks;
  // As long as full_blocks; blocks wholly below the window are freed and nulled.
  std::vector<std::int32_t> window_blocks;
  std::int64_t window_nulled = 0;  // so many entries of window_blocks are null
  bool scheduled = false;          // in the step being made

  // Tokens that exist: what must be computed before the next one is generated.
  std::int64_t known() const { return prompt + generated; }
  bool is_decode() const { return generated > 0 && known() - computed == 1; }
};

// A sequence's share of a step: query tokens [context_len, context_len + query_len).
struct ScheduledSeq {
  Sequence* sequence = nullptr;
  std::int64_t context_len = 0;
  std::int64_t query_len = 0;
  bool decode = false;
};

struct Step {
  std::vector<ScheduledSeq> seqs;  // decodes first
  std::int64_t num_tokens = 0;
  std::int64_t num_decodes = 0;
  std::int64_t num_preempted = 0;
};

// Each step: decodes first, then prefills under way, then waiting requests, in order of admission
// and within the token budget; a prompt is cut where the budget ends. When a running sequence needs
// blocks and there are none, the latest running sequence behind it that the step does not hold yet
// is preempted: it loses its blocks, keeps what it generated and computes all again (first in the
// queue). If there is none to preempt the sequence sits the step out with its blocks. The first
// running sequence can always preempt or be waited for, so every request finishes.
class Scheduler {
 public:
  // Throws Error if a size is not positive.
  explicit Scheduler(const SchedulerConfig& config);

  // Throws Error, naming the request by `index`, if it can never fit in the pools; else nothing.
  void check_fits(const TraceRequest& request, std::int64_t index) const;

  // Queues a request; returns its id. Throws as check_fits.
  std::int64_t add(const TraceRequest& request);

  // Chooses the next step and gets its blocks. Empty only when there are no requests. Must be
  // followed by finish. Sequences stay valid until then.
  Step schedule();

  // The step has been computed: its tokens are in the cache, each sequence that is through with its
  // known tokens generated one more. Returns the ids that finished; their blocks are free.
  std::vector<std::int64_t> finish(const Step& step);

  std::int64_t num_running() const { return static_cast<std::int64_t>(running_.size()); }
  std::int64_t num_waiting() const { return static_cast<std::int64_t>(waiting_.size()); }
  bool idle() const { return running_.empty() && waiting_.empty(); }
  const BlockAllocator& full_pool() const { return full_; }
  const BlockAllocator& window_pool() const { return window_; }

 private:
  // Blocks for `query_len` more tokens in both pools, or nothing and false.
  bool grow(Sequence& sequence, std::int64_t query_len);
  // As grow, preempting sequences behind running_[position].
  bool grow_or_preempt(std::size_t position, std::int64_t query_len, Step& step);
  void free_below_window(Sequence& sequence);
  void release(Sequence& sequence);
  void take(Sequence& sequence, std::int64_t query_len, Step& step);
  void admit(Step& step);

  SchedulerConfig config_;
  BlockAllocator full_;
  BlockAllocator window_;
  std::vector<std::unique_ptr<Sequence>> running_;  // in order of admission
  std::deque<std::unique_ptr<Sequence>> waiting_;
  std::int64_t next_id_ = 0;
};

}  // namespace diffkv::replay
