#include "replay/scheduler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>

#include "diffkv/error.h"

namespace diffkv::replay {
namespace {

TraceRequest request(std::int64_t prompt, std::int64_t generated) {
  return {0.0, prompt, generated};
}

// Runs a scheduler to its end and checks on the way what must hold after every step.
class Checked {
 public:
  explicit Checked(const SchedulerConfig& config) : config_(config), scheduler_(config) {}

  void add(const TraceRequest& added) {
    const std::int64_t id = scheduler_.add(added);
    requests_[id] = added;
  }

  // False when there was nothing to do.
  bool step() {
    if (scheduler_.idle()) return false;
    const Step step = scheduler_.schedule();
    EXPECT_FALSE(step.seqs.empty());
    EXPECT_LE(step.num_tokens, config_.max_num_batched_tokens);
    EXPECT_LE(scheduler_.num_running(), config_.max_num_seqs);
    preemptions_ += step.num_preempted;
    check_seqs(step);
    check_blocks(step);
    for (const std::int64_t id : scheduler_.finish(step)) {
      EXPECT_TRUE(finished_.insert(id).second) << "request " << id << " finished twice";
    }
    return !testing::Test::HasFailure();
  }

  void run_to_end() {
    while (step()) {
    }
    EXPECT_EQ(finished_.size(), requests_.size());
    for (const auto& [id, asked] : requests_) {
      EXPECT_EQ(generated_[id], asked.generated_tokens) << "request " << id;
    }
    EXPECT_EQ(scheduler_.full_pool().num_used(), 0);
    EXPECT_EQ(scheduler_.window_pool().num_used(), 0);
  }

  std::int64_t preemptions() const { return preemptions_; }
  std::int64_t computed_tokens() const { return computed_tokens_; }
  const Scheduler& scheduler() const { return scheduler_; }

 private:
  void check_seqs(const Step& step) {
    std::int64_t tokens = 0;
    std::int64_t decodes = 0;
    bool prefill_seen = false;
    std::set<std::int64_t> ids;
    for (const ScheduledSeq& seq : step.seqs) {
      const Sequence& sequence = *seq.sequence;
      EXPECT_TRUE(ids.insert(sequence.id).second) << "a sequence is twice in a step";
      EXPECT_GE(seq.query_len, 1);
      // Nothing is left out: a sequence goes on where it was, or starts again from nothing.
      if (seq.context_len != computed_[sequence.id]) {
        EXPECT_EQ(seq.context_len, 0);
      }
      EXPECT_LE(seq.context_len + seq.query_len, sequence.known());
      computed_[sequence.id] = seq.context_len + seq.query_len;
      generated_[sequence.id] += seq.context_len + seq.query_len == sequence.known() ? 1 : 0;
      EXPECT_TRUE(!seq.decode || !prefill_seen) << "a decode stands after a prefill";
      EXPECT_TRUE(!seq.decode || seq.query_len == 1);
      prefill_seen = prefill_seen || !seq.decode;
      tokens += seq.query_len;
      decodes += seq.decode ? 1 : 0;
    }
    EXPECT_EQ(tokens, step.num_tokens);
    EXPECT_EQ(decodes, step.num_decodes);
    computed_tokens_ += tokens;
  }

  void check_blocks(const Step& step) {
    const std::int64_t size = config_.block_size;
    for (const ScheduledSeq& seq : step.seqs) {
      const Sequence& sequence = *seq.sequence;
      const std::int64_t end = seq.context_len + seq.query_len;
      const auto blocks = static_cast<std::int64_t>(sequence.full_blocks.size());
      EXPECT_EQ(blocks, (end + size - 1) / size);
      EXPECT_EQ(sequence.window_blocks.size(), sequence.full_blocks.size());
      const std::int64_t first_visible =
          std::max<std::int64_t>(seq.context_len - config_.window + 1, 0);
      for (std::int64_t b = 0; b < blocks; ++b) {
        const auto i = static_cast<std::size_t>(b);
        EXPECT_NE(sequence.full_blocks[i], BlockAllocator::kNullBlock);
        // Nulled exactly where no row of this step or a later one sees a key of the block.
        const bool dead = (b + 1) * size <= first_visible;
        EXPECT_EQ(sequence.window_blocks[i] == BlockAllocator::kNullBlock, dead)
            << "block " << b << " at context " << seq.context_len;
        own(full_owner_, sequence.full_blocks[i], sequence.id);
        if (!dead) own(window_owner_, sequence.window_blocks[i], sequence.id);
      }
    }
    full_owner_.clear();
    window_owner_.clear();
  }

  static void own(std::map<std::int32_t, std::int64_t>& owners, std::int32_t block,
                  std::int64_t id) {
    EXPECT_TRUE(owners.emplace(block, id).second) << "block " << block << " has two owners";
  }

  SchedulerConfig config_;
  Scheduler scheduler_;
  std::map<std::int64_t, TraceRequest> requests_;
  std::map<std::int64_t, std::int64_t> computed_;
  std::map<std::int64_t, std::int64_t> generated_;
  std::set<std::int64_t> finished_;
  std::map<std::int32_t, std::int64_t> full_owner_;
  std::map<std::int32_t, std::int64_t> window_owner_;
  std::int64_t preemptions_ = 0;
  std::int64_t computed_tokens_ = 0;
};

TEST(Scheduler, RandomTracesFinishWithinEveryLimit) {
  std::int64_t preemptions = 0;
  for (std::uint32_t seed = 0; seed < 150; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    const auto between = [&](std::int64_t low, std::int64_t high) {
      return low + static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(high - low + 1));
    };
    SchedulerConfig config;
    config.block_size = between(1, 20);
    config.max_num_batched_tokens = between(1, 120);
    config.max_num_seqs = between(1, 12);
    config.window = between(1, 40);
    const std::int64_t longest = between(2, 200);
    // The least that the longest request needs, and a little: preemption is the rule.
    const std::int64_t blocks = (longest + config.block_size - 1) / config.block_size;
    config.num_full_blocks = blocks + 1 + between(0, blocks);
    config.num_window_blocks = blocks + 1 + between(0, blocks);
    Checked checked(config);
    std::int64_t left = between(1, 30);
    while (left > 0 || !checked.scheduler().idle()) {
      for (std::int64_t n = std::min(left, between(0, 4)); n > 0; --n, --left) {
        const std::int64_t prompt = between(1, longest);
        checked.add(request(prompt, between(1, longest - prompt + 1)));
      }
      checked.step();
      if (HasFailure()) return;
    }
    checked.run_to_end();
    preemptions += checked.preemptions();
  }
  EXPECT_GT(preemptions, 100);  // or the test would not be one of preemption
}

TEST(Scheduler, DecodesComeFirstAndPromptsAreCut) {
  Scheduler scheduler({.max_num_batched_tokens = 10,
                       .max_num_seqs = 4,
                       .block_size = 4,
                       .num_full_blocks = 50,
                       .num_window_blocks = 50,
                       .window = 8});
  scheduler.add(request(6, 3));
  scheduler.add(request(17, 2));
  Step step = scheduler.schedule();
  ASSERT_EQ(step.seqs.size(), 2U);
  EXPECT_EQ(step.seqs[0].query_len, 6);
  EXPECT_EQ(step.seqs[1].query_len, 4);  // what the budget left
  EXPECT_EQ(step.num_decodes, 0);
  scheduler.finish(step);
  step = scheduler.schedule();
  ASSERT_EQ(step.seqs.size(), 2U);
  EXPECT_TRUE(step.seqs[0].decode);
  EXPECT_EQ(step.seqs[0].context_len, 6);
  EXPECT_EQ(step.seqs[1].context_len, 4);
  EXPECT_EQ(step.seqs[1].query_len, 9);
  scheduler.finish(step);
  step = scheduler.schedule();
  EXPECT_EQ(step.seqs[1].query_len, 4);
  EXPECT_EQ(scheduler.finish(step), (std::vector<std::int64_t>{0}));
}

TEST(Scheduler, PreemptsTheLatestAndComputesItAgain) {
  // Two requests of 8 + 8 tokens over 6 blocks of 4: both start, one must give way.
  Checked checked({.max_num_batched_tokens = 64,
                   .max_num_seqs = 4,
                   .block_size = 4,
                   .num_full_blocks = 7,
                   .num_window_blocks = 20,
                   .window = 64});
  checked.add(request(8, 9));
  checked.add(request(8, 9));
  checked.run_to_end();
  EXPECT_EQ(checked.preemptions(), 1);
  // Each computes 16 tokens; the second was 4 decodes in and had 12 computed when it lost them.
  EXPECT_EQ(checked.computed_tokens(), 16 + 16 + 12);
}

TEST(Scheduler, WindowBlocksAreFreedWhileADecodeGoesOn) {
  Scheduler scheduler({.max_num_batched_tokens = 64,
                       .max_num_seqs = 1,
                       .block_size = 4,
                       .num_full_blocks = 100,
                       .num_window_blocks = 100,
                       .window = 8});
  scheduler.add(request(40, 40));
  std::int64_t most = 0;
  for (int i = 0; !scheduler.idle(); ++i) {
    const Step step = scheduler.schedule();
    if (i > 0) most = std::max(most, scheduler.window_pool().num_used());
    scheduler.finish(step);
  }
  EXPECT_EQ(most, 3);  // 8 keys lie in at most 3 blocks of 4
}

TEST(Scheduler, RefusesARequestThatCanNeverFit) {
  const SchedulerConfig config = {.max_num_batched_tokens = 64,
                                  .max_num_seqs = 4,
                                  .block_size = 4,
                                  .num_full_blocks = 6,
                                  .num_window_blocks = 100,
                                  .window = 8};
  Scheduler scheduler(config);
  EXPECT_EQ(scheduler.add(request(10, 11)), 0);  // 20 tokens, 5 blocks
  try {
    scheduler.add(request(11, 11));
    FAIL() << "a request of 6 blocks was taken";
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(),
                 "request 1 (11 prompt + 11 generated tokens) needs 6 blocks of 4 tokens in the "
                 "full-attention layers' cache, expected at most the 5 there are; give the cache "
                 "more memory or the model fewer heads");
  }
  SchedulerConfig narrow = config;
  narrow.num_full_blocks = 100;
  narrow.num_window_blocks = 6;
  EXPECT_THROW(Scheduler(narrow).check_fits(request(60, 1), 0), Error);
  EXPECT_NO_THROW(Scheduler(narrow).check_fits(request(20, 1), 0));
  narrow.max_num_batched_tokens = 8;  // smaller chunks need fewer blocks at a time
  EXPECT_NO_THROW(Scheduler(narrow).check_fits(request(60, 1), 0));
}

TEST(Scheduler, RefusesSizesThatAreNone) {
  for (const auto member :
       {&SchedulerConfig::max_num_batched_tokens, &SchedulerConfig::max_num_seqs,
        &SchedulerConfig::block_size, &SchedulerConfig::num_full_blocks,
        &SchedulerConfig::num_window_blocks, &SchedulerConfig::window}) {
    SchedulerConfig config;
    config.num_full_blocks = config.num_window_blocks = 10;
    EXPECT_NO_THROW(Scheduler{config});
    config.*member = 0;
    EXPECT_THROW(Scheduler{config}, Error);
  }
}

}  // namespace
}  // namespace diffkv::replay
