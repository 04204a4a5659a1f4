// What the tables of cases are written with.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "verify/cases.h"

namespace diffkv::verify {

// Named steps; every name says what an engine would call it.
struct NamedBatch {
  const char* name;
  std::vector<SeqShape> seqs;
};
const NamedBatch& decode_batch();      // one token a sequence
const NamedBatch& multi_batch();       // speculative: a few tokens a sequence
const NamedBatch& prefill_batch();     // whole prompts
const NamedBatch& chunked_batch();     // parts of prompts
const NamedBatch& mixed_batch();       // all of these
const NamedBatch& degenerate_batch();  // nothing to do, no keys, more queries than keys
std::vector<NamedBatch> all_batches();

struct NamedMask {
  const char* name;
  Mask mask;
  bool mm_ranges = false;
  bool causal_per_seq = false;
};
std::vector<NamedMask> all_masks();

// Collects cases; `quick` ones are in both suites.
class CaseList {
 public:
  explicit CaseList(Suite suite) : suite_(suite) {}

  // Names it "<feature>/<detail>".
  void add(Case c, const std::string& feature, const std::string& detail, bool quick = false);
  std::vector<Case> take() { return std::move(cases_); }

 private:
  Suite suite_;
  std::vector<Case> cases_;
};

// bf16, 4 query heads on 2 KV heads, 48/32, the mixed batch, lse asked for.
Case base_case();
Case base_case(const NamedBatch& batch);
void set_mask(Case& c, const NamedMask& mask);
void set_heads(Case& c, std::int64_t num_heads, std::int64_t num_kv_heads);
void set_head_sizes(Case& c, std::int64_t head_size_qk, std::int64_t head_size_v);
// Query, key and value of this step, and output are of one type; with e4m3 queries all but the
// query are bf16. The cache holds `stored`.
void set_dtypes(Case& c, DType query, DType stored);

// The tables.
void add_shape_cases(CaseList& list);
void add_memory_cases(CaseList& list);
void add_mask_cases(CaseList& list);
void add_score_cases(CaseList& list);
void add_combined_cases(CaseList& list);

}  // namespace diffkv::verify
