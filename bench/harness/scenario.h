// What is timed: named batches over one layer, read from JSON.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "diffkv/attention.h"
#include "diffkv/cache.h"

namespace diffkv::bench {

// One sequence of a step, causal.
struct Seq {
  std::int64_t query_len = 0;
  std::int64_t seq_len = 0;  // keys, this step's included

  friend bool operator==(const Seq&, const Seq&) = default;
};

// A layer and a step over it. docs/performance.md describes the file's fields.
struct Scenario {
  std::string name;
  std::vector<std::string> tags;
  std::vector<Seq> seqs;
  std::int64_t num_heads = 64;
  std::int64_t num_kv_heads = 4;
  std::int64_t head_size_qk = 192;
  std::int64_t head_size_v = 128;
  DType dtype = DType::kBF16;     // of query, new keys and values, and output
  DType kv_dtype = DType::kBF16;  // of the cache
  std::int64_t block_size = 16;   // tokens of a page; 0: contiguous keys, no block table
  std::int32_t window = 0;        // 0: full attention
  bool sinks = false;
  float soft_cap = 0.0F;  // 0: none
  bool alibi = false;     // the ALiBi paper's slopes
  KvCacheLayout layout = KvCacheLayout::kNHD;
  SchedulePolicy policy = SchedulePolicy::kBalanced;
  std::string backend;  // the only one that it is for; "": every one

  PlanKey key() const;
  std::int64_t num_tokens() const;  // query rows
  std::int64_t max_seq_len() const;
  std::int64_t context_tokens() const;  // keys of earlier steps, all sequences

  // Bytes that attention must move: keys and values that some row sees, each once.
  double kv_bytes() const;
  // The same and queries in and output out.
  double bytes() const;
  // Of the output alone.
  double output_bytes() const;
  // Multiplications and additions of the visible (row, key) pairs, all heads.
  double flops() const;
};

// "1x4096" or "8x(1x4096)": what the batch is, for people. Ragged batches show their longest.
std::string describe_batch(const Scenario& scenario);

// The scenarios of a JSON text in its order. `where` names the text in messages. Throws
// Error(kInvalidArgument) that names the scenario and the field: malformed JSON, an unknown field,
// a wrong type or value, a name twice.
std::vector<Scenario> parse_scenarios(std::string_view text, std::string_view where);

// The text of bench/scenarios.json, as built in.
std::string_view embedded_scenarios();

// The scenarios for that backend ("": for any) whose name or one of whose tags matches the pattern
// (the shell's *, ? and [...]); "" matches all. Throws Error that lists the names if none does.
std::vector<Scenario> select_scenarios(const std::vector<Scenario>& scenarios,
                                       const std::string& pattern, std::string_view backend);

}  // namespace diffkv::bench
