// What must not change a single bit.
#include <gtest/gtest.h>
#include <omp.h>

#include <algorithm>
#include <cstddef>
#include <numeric>

#include "problem.h"

namespace diffkv::properties {
namespace {

// Sets the number of threads while it lives.
class Threads {
 public:
  explicit Threads(int count) : before_(omp_get_max_threads()) { omp_set_num_threads(count); }
  ~Threads() { omp_set_num_threads(before_); }
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

 private:
  int before_;
};

void expect_same_bits(const Problem& problem, const Result& a, const Result& b) {
  ASSERT_EQ(a.seqs.size(), b.seqs.size());
  for (std::size_t s = 0; s < a.seqs.size(); ++s) {
    EXPECT_EQ(bit_difference(a.seqs[s], b.seqs[s]), "")
        << "sequence " << s << " of " << describe(problem);
  }
}

Problem invariant_problem(Rng& rng) {
  Problem problem = random_problem(rng, {.long_seqs = true});
  problem.key.policy = SchedulePolicy::kBatchInvariant;
  return problem;
}

TEST(Invariance, DefaultPolicyRepeatsItselfBitForBit) {
  for_random(30, [](const Backend& backend, Rng& rng) {
    const Threads threads(static_cast<int>(uniform(rng, 1, 4)));
    const Problem problem = random_problem(rng, {.long_seqs = true});
    const Layout layout = random_layout(rng);
    const Result first = run(backend, problem, layout);
    for (int repeat = 0; repeat < 3; ++repeat) {
      expect_same_bits(problem, run(backend, problem, layout), first);
    }
  });
}

TEST(Invariance, PagesChangeNoBit) {
  for_random(40, [](const Backend& backend, Rng& rng) {
    const Problem problem = random_problem(rng, {.long_seqs = true});
    Layout layout = random_layout(rng);
    layout.dense = false;
    const Result first = run(backend, problem, layout);
    layout.page_seed = rng();
    expect_same_bits(problem, run(backend, problem, layout), first);
  });
}

TEST(Invariance, BatchInvariantSequenceIsTheSameAlone) {
  for_random(30, [](const Backend& backend, Rng& rng) {
    const Problem problem = invariant_problem(rng);
    Layout layout = random_layout(rng);
    const Result together = run(backend, problem, layout);
    for (std::size_t s = 0; s < problem.seqs.size(); ++s) {
      layout.seqs = {s};
      layout.page_seed = rng();
      const Result alone = run(backend, problem, layout);
      EXPECT_EQ(bit_difference(alone.seqs[0], together.seqs[s]), "")
          << "sequence " << s << " of " << describe(problem);
    }
  });
}

TEST(Invariance, BatchInvariantOrderChangesNoBit) {
  for_random(30, [](const Backend& backend, Rng& rng) {
    const Problem problem = invariant_problem(rng);
    Layout layout = random_layout(rng);
    const Result first = run(backend, problem, layout);
    layout.seqs.resize(problem.seqs.size());
    std::iota(layout.seqs.begin(), layout.seqs.end(), std::size_t{0});
    std::shuffle(layout.seqs.begin(), layout.seqs.end(), rng);
    const Result shuffled = run(backend, problem, layout);
    for (std::size_t s = 0; s < layout.seqs.size(); ++s) {
      EXPECT_EQ(bit_difference(shuffled.seqs[s], first.seqs[layout.seqs[s]]), "")
          << "sequence " << layout.seqs[s] << " of " << describe(problem);
    }
  });
}

TEST(Invariance, BatchInvariantThreadsChangeNoBit) {
  for_random(30, [](const Backend& backend, Rng& rng) {
    const Problem problem = invariant_problem(rng);
    const Layout layout = random_layout(rng);
    Result first;
    for (const int count : {1, 2, 3, 7}) {
      const Threads threads(count);
      Result result = run(backend, problem, layout);
      if (count > 1) expect_same_bits(problem, result, first);
      first = std::move(result);
    }
  });
}

TEST(Invariance, SequenceOrderChangesNothingInTheDefaultPolicy) {
  for_random(30, [](const Backend& backend, Rng& rng) {
    const Problem problem = random_problem(rng, {.long_seqs = true});
    Layout layout = random_layout(rng);
    const Result first = run(backend, problem, layout);
    for (std::size_t s = problem.seqs.size(); s > 0; --s) layout.seqs.push_back(s - 1);
    const Result reversed = run(backend, problem, layout);
    for (std::size_t s = 0; s < layout.seqs.size(); ++s) {
      EXPECT_EQ(difference(problem, reversed.seqs[s], first.seqs[layout.seqs[s]]), "")
          << "sequence " << layout.seqs[s] << " of " << describe(problem);
    }
  });
}

// Many workers cut the keys, one worker does not.
TEST(Invariance, SplitEqualsUnsplit) {
  for_random(30, [](const Backend& backend, Rng& rng) {
    const Problem problem = random_problem(rng, {.long_seqs = true});
    const Layout layout = random_layout(rng);
    Result unsplit;
    {
      const Threads one(1);
      unsplit = run(backend, problem, layout);
    }
    const Threads many(static_cast<int>(uniform(rng, 5, 16)));
    const Result split = run(backend, problem, layout);
    for (std::size_t s = 0; s < problem.seqs.size(); ++s) {
      EXPECT_EQ(difference(problem, split.seqs[s], unsplit.seqs[s]), "")
          << "sequence " << s << " of " << describe(problem);
    }
  });
}

}  // namespace
}  // namespace diffkv::properties
