#include "replay/scheduler.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "diffkv/error.h"

namespace diffkv::replay {
namespace {

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

const SchedulerConfig& checked(const SchedulerConfig& config) {
  const auto check = [](const char* name, std::int64_t value) {
    if (value < 1) {
      throw Error(ErrorCode::kInvalidArgument,
                  fmt::format("{} is {}, expected at least 1", name, value));
    }
  };
  check("max_num_batched_tokens", config.max_num_batched_tokens);
  check("max_num_seqs", config.max_num_seqs);
  check("block_size", config.block_size);
  check("window", config.window);
  return config;
}

}  // namespace

Scheduler::Scheduler(const SchedulerConfig& config)
    : config_(checked(config)), full_(config.num_full_blocks), window_(config.num_window_blocks) {}

void Scheduler::check_fits(const TraceRequest& request, std::int64_t index) const {
  // The last generated token is never computed.
  const std::int64_t tokens = request.prompt_tokens + request.generated_tokens - 1;
  const std::int64_t full = ceil_div(tokens, config_.block_size);
  // A chunk and the window before it, which may start and end inside a block.
  const std::int64_t live =
      ceil_div(config_.window - 1 + config_.max_num_batched_tokens, config_.block_size) + 1;
  const std::int64_t window = std::min(full, live);
  const auto refuse = [&](const char* kind, std::int64_t need, std::int64_t have) {
    throw Error(
        ErrorCode::kInvalidArgument,
        fmt::format("request {} ({} prompt + {} generated tokens) needs {} blocks of {} tokens in "
                    "the {} layers' cache, expected at most the {} there are; give the cache more "
                    "memory or the model fewer heads",
                    index, request.prompt_tokens, request.generated_tokens, need,
                    config_.block_size, kind, have));
  };
  if (full > full_.num_blocks() - 1) refuse("full-attention", full, full_.num_blocks() - 1);
  if (window > window_.num_blocks() - 1) refuse("window", window, window_.num_blocks() - 1);
}

std::int64_t Scheduler::add(const TraceRequest& request) {
  check_fits(request, next_id_);
  auto sequence = std::make_unique<Sequence>();
  sequence->id = next_id_++;
  sequence->prompt = request.prompt_tokens;
  sequence->to_generate = request.generated_tokens;
  waiting_.push_back(std::move(sequence));
  return next_id_ - 1;
}

void Scheduler::free_below_window(Sequence& sequence) {
  // The next row stands at `computed`; no row from now on sees keys below this one.
  const std::int64_t first_key = sequence.computed - config_.window + 1;
  const std::int64_t dead = std::max<std::int64_t>(first_key, 0) / config_.block_size;
  for (; sequence.window_nulled < dead; ++sequence.window_nulled) {
    std::int32_t& block = sequence.window_blocks[static_cast<std::size_t>(sequence.window_nulled)];
    window_.free(block);
    block = BlockAllocator::kNullBlock;
  }
}

bool Scheduler::grow(Sequence& sequence, std::int64_t query_len) {
  const std::int64_t need = ceil_div(sequence.computed + query_len, config_.block_size) -
                            static_cast<std::int64_t>(sequence.full_blocks.size());
  if (need > full_.num_free() || need > window_.num_free()) return false;
  return full_.allocate(need, sequence.full_blocks) &&
         window_.allocate(need, sequence.window_blocks);
}

void Scheduler::release(Sequence& sequence) {
  for (const std::int32_t block : sequence.full_blocks) full_.free(block);
  for (const std::int32_t block : sequence.window_blocks) {
    if (block != BlockAllocator::kNullBlock) window_.free(block);
  }
  sequence.full_blocks.clear();
  sequence.window_blocks.clear();
  sequence.window_nulled = 0;
  sequence.computed = 0;
}

bool Scheduler::grow_or_preempt(std::size_t position, std::int64_t query_len, Step& step) {
  Sequence& sequence = *running_[position];
  free_below_window(sequence);
  while (!grow(sequence, query_len)) {
    std::size_t victim = running_.size() - 1;
    while (victim > position && running_[victim]->scheduled) --victim;
    if (victim <= position) return false;
    release(*running_[victim]);
    waiting_.push_front(std::move(running_[victim]));
    running_.erase(running_.begin() + static_cast<std::ptrdiff_t>(victim));
    ++step.num_preempted;
  }
  return true;
}

void Scheduler::take(Sequence& sequence, std::int64_t query_len, Step& step) {
  const bool decode = sequence.is_decode();
  sequence.scheduled = true;
  step.seqs.push_back({&sequence, sequence.computed, query_len, decode});
  step.num_tokens += query_len;
  step.num_decodes += decode ? 1 : 0;
}

void Scheduler::admit(Step& step) {
  // Blocks that a preemption freed are for those who were running.
  if (step.num_preempted > 0) return;
  while (!waiting_.empty() && num_running() < config_.max_num_seqs) {
    Sequence& sequence = *waiting_.front();
    const std::int64_t query_len =
        std::min(sequence.known(), config_.max_num_batched_tokens - step.num_tokens);
    if (query_len == 0 || !grow(sequence, query_len)) return;
    take(sequence, query_len, step);
    running_.push_back(std::move(waiting_.front()));
    waiting_.pop_front();
  }
}

Step Scheduler::schedule() {
  Step step;
  for (const bool decodes : {true, false}) {
    // Preemption may shorten running_ behind the current position, never before it.
    for (std::size_t i = 0; i < running_.size(); ++i) {
      Sequence& sequence = *running_[i];
      if (sequence.is_decode() != decodes) continue;
      const std::int64_t query_len = std::min(sequence.known() - sequence.computed,
                                              config_.max_num_batched_tokens - step.num_tokens);
      if (query_len == 0) break;
      if (grow_or_preempt(i, query_len, step)) take(sequence, query_len, step);
    }
  }
  admit(step);
  return step;
}

std::vector<std::int64_t> Scheduler::finish(const Step& step) {
  std::vector<std::int64_t> finished;
  for (const ScheduledSeq& seq : step.seqs) {
    Sequence& sequence = *seq.sequence;
    sequence.scheduled = false;
    sequence.computed += seq.query_len;
    if (sequence.computed < sequence.known()) continue;
    if (++sequence.generated < sequence.to_generate) continue;
    finished.push_back(sequence.id);
    release(sequence);
  }
  std::erase_if(running_,
                [](const auto& sequence) { return sequence->generated >= sequence->to_generate; });
  return finished;
}

}  // namespace diffkv::replay
