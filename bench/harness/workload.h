// A scenario in memory: cache, tensors, plan; and the stages run on it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "bench/harness/run.h"
#include "bench/harness/scenario.h"
#include "diffkv/attention.h"
#include "diffkv/backend.h"
#include "diffkv/plan.h"
#include "replay/inputs.h"

namespace diffkv::bench {

// Inputs are random with peaked scores and values that have a mean. Pages are handed out in random
// order, as in a cache that has been in use. The context of earlier steps is in the cache; slots of
// this step's tokens and the output are NaN until the stages write them.
class Workload {
 public:
  // Throws Error if memory is lacking or the library refuses the layer.
  Workload(const Backend& backend, const Scenario& scenario);
  Workload(const Workload&) = delete;
  Workload& operator=(const Workload&) = delete;

  // For Backend::supports.
  static Problem problem_of(const Scenario& scenario);

  // The stages, in order. Of contiguous keys, the cache update writes them in place.
  void update_cache();
  void make_plan();
  void attend();

  // Runs the stages and compares this step's keys and values in the cache, and a sample of output
  // rows, with the reference. An Error of the library is a wrong result.
  Verification verify();

 private:
  struct Free {
    const Backend* backend;
    void operator()(void* data) const { backend->deallocate(data, Device{}); }
  };
  using Memory = std::unique_ptr<void, Free>;

  // `bytes` of the backend's memory, all of them 0xff: NaN in every floating-point type.
  Memory allocate(std::int64_t bytes) const;
  void make_cache();
  void make_batch();
  void write_context();
  std::int64_t slot_of(std::int64_t seq, std::int64_t position) const;
  // "" or the first token of this step that is not in the cache as the reference would write it.
  std::string check_stored() const;

  const Backend& backend_;
  Scenario scenario_;
  PlanKey key_;
  PlanMaxima maxima_;
  replay::InputPool inputs_;
  std::vector<std::int64_t> first_token_;  // [num_seqs]: of the sequence's pages, or of its keys
  std::int64_t capacity_ = 0;              // tokens that the cache holds
  Memory cache_memory_;
  Memory output_memory_;
  Memory workspace_memory_;
  KvCacheView written_;  // what update_cache sees
  float kv_scale_ = 1.0F;
  std::vector<float> sinks_;                   // [num_heads]
  std::vector<std::int32_t> page_order_;       // page of each page handed out
  std::vector<std::int32_t> query_start_loc_;  // [num_seqs + 1]
  std::vector<std::int32_t> seq_lens_;         // [num_seqs]
  std::vector<std::int32_t> block_table_;      // [num_seqs, max_blocks]
  std::vector<std::int32_t> kv_start_;         // [num_seqs]
  std::vector<std::int64_t> slot_mapping_;     // [num_tokens]
  AttentionParams params_;
  AttendArgs args_;
  TensorView workspace_;
  Plan plan_;
};

}  // namespace diffkv::bench
