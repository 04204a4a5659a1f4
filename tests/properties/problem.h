// Random attention problems that can be laid out in memory in more than one way, so that two runs
// that must agree can be compared.
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "diffkv/diffkv.h"

namespace diffkv::properties {

using Rng = std::mt19937_64;

// Uniform in [low, high].
std::int64_t uniform(Rng& rng, std::int64_t low, std::int64_t high);
bool chance(Rng& rng, double probability);

template <class T>
const T& pick(Rng& rng, const std::vector<T>& list) {
  return list[static_cast<std::size_t>(
      uniform(rng, 0, static_cast<std::int64_t>(list.size()) - 1))];
}

// Multimodal ranges that every sequence has where the key says so; some are empty.
inline constexpr std::int64_t kRangesPerSeq = 2;

// A sequence and its numbers, each in the element type that its tensor has.
struct Seq {
  std::int32_t query_len = 0;
  std::int32_t seq_len = 0;
  bool causal = true;  // read with PlanKey::causal_per_seq
  std::int32_t prefix_len = 0;
  std::vector<std::pair<std::int32_t, std::int32_t>> mm_ranges;  // both ends inclusive
  std::vector<std::byte> query;                                  // [query_len, num_heads, qk]
  std::vector<std::byte> key;                                    // [seq_len, num_kv_heads, qk]
  std::vector<std::byte> value;                                  // [seq_len, num_kv_heads, v]

  std::int32_t context_len() const { return seq_len - query_len; }
};

struct Problem {
  PlanKey key;
  std::vector<Seq> seqs;
  DType output_dtype = DType::kF32;
  float scale = 1.0F;
  float soft_cap = 0.0F;
  std::vector<float> alibi_slopes;  // [num_heads] or empty
  bool alibi_sqrt = false;
  std::vector<float> sinks;  // [num_heads] or empty
  SinkMode sink_mode = SinkMode::kIn;
  std::int64_t qq_bias_size = 0;
  std::vector<float> qq_bias;  // [qq_bias_size, qq_bias_size]
  float q_scale = 1.0F;        // read with e4m3 queries
};

// What random_problem may choose.
struct Choice {
  bool any_mask = true;    // else causal
  bool long_seqs = false;  // some thousands of keys, so that keys are cut among workers
  bool scores = true;      // soft cap, ALiBi, query-query bias
  bool sinks = true;
  bool odd_seqs = true;  // empty sequences, sequences without queries, seq_len < query_len
  bool fp8_queries = true;
};

Problem random_problem(Rng& rng, const Choice& choice = {});

// A sequence of that problem with random numbers.
Seq random_seq(Rng& rng, const PlanKey& key, std::int32_t query_len, std::int32_t seq_len);

// Elements with magnitudes in [1/8, 2), all exact in the type; a part of them is negative.
std::vector<std::byte> random_elements(Rng& rng, DType dtype, std::size_t count, double negative);

// By the letter of the mask's definition: whether query row i of the sequence sees key j.
bool sees(const PlanKey& key, const Seq& seq, std::int64_t i, std::int64_t j);

// One line that tells the problem, for a failure's message.
std::string describe(const Problem& problem);

// A batch without the places of its keys, and the memory of its tensors.
class BatchTensors {
 public:
  // The sequences `order` of the problem.
  BatchTensors(const Problem& problem, const std::vector<std::size_t>& order);
  BatchTensors(const BatchTensors&) = delete;
  BatchTensors& operator=(const BatchTensors&) = delete;

  Batch batch;
  PlanMaxima maxima;
  std::vector<std::int32_t> query_start_loc = {0};

 private:
  std::vector<std::int32_t> seq_lens_;
  std::vector<std::uint8_t> causal_;
  std::vector<std::int32_t> prefix_lens_;
  std::vector<std::int32_t> mm_ranges_;
};

// The problem's scalars and per-head tensors as a layer has them; they live in the problem.
AttentionParams params_of(const Problem& problem);

// 0, 1, .. up to the number of sequences.
std::vector<std::size_t> all_seqs(const Problem& problem);

// How the cache lies in memory.
struct Layout {
  bool dense = false;
  KvCacheLayout order = KvCacheLayout::kNHD;
  std::int64_t block_size = 16;
  std::uint64_t page_seed = 1;    // which pages a sequence gets
  std::vector<std::size_t> seqs;  // which sequences the batch has, in this order; empty: all
  bool poison = false;            // bytes that no row may read: NaN and infinity, else zeros
};

// Random order, page size and pages.
Layout random_layout(Rng& rng);

struct SeqResult {
  std::vector<std::byte> output;  // [query_len, num_heads, head_size_v]
  std::vector<float> lse;         // [query_len, num_heads]
};

struct Result {
  std::vector<SeqResult> seqs;  // as in Layout::seqs
  bool guards_intact = false;   // nothing around the outputs or after the last row was written
  bool cache_intact = false;    // not a byte of the cache changed
};

// Plans and attends through the public functions.
Result run(const Backend& backend, const Problem& problem, const Layout& layout);

// Values of elements of a type.
std::vector<double> values_of(const std::vector<std::byte>& elements, DType dtype);

// "" or where the two differ: any bit of output or lse.
std::string bit_difference(const SeqResult& a, const SeqResult& b);
// "" or where they differ by more than rounding: each output row by its 2-norm, each lse.
std::string difference(const Problem& problem, const SeqResult& a, const SeqResult& b);

// Backends that run here and work on host memory.
std::vector<const Backend*> host_backends();

// The seed of this run of the program.
std::uint64_t program_seed();

// Calls body(backend, rng) `rounds` times on every host backend, each time with another seed that a
// failure names. --gtest_random_seed=N repeats a run; without it the seed is new every time.
template <class Body>
void for_random(int rounds, Body body) {
  for (const Backend* backend : host_backends()) {
    for (int round = 0; round < rounds; ++round) {
      SCOPED_TRACE(testing::Message() << "backend " << backend->name() << ", round " << round
                                      << ", repeat with --gtest_random_seed=" << program_seed());
      Rng rng(program_seed() * 1000003 + static_cast<std::uint64_t>(round));
      body(*backend, rng);
      if (testing::Test::HasFailure()) return;
    }
  }
}

}  // namespace diffkv::properties
