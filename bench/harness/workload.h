// A scenario in a backend's memory: cache, tensors, plan; and the stages run on it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "bench/harness/run.h"
#include "bench/harness/scenario.h"
#include "device/memory.h"
#include "device/mirror.h"
#include "device/session.h"
#include "diffkv/attention.h"
#include "diffkv/cache.h"
#include "diffkv/plan.h"
#include "replay/inputs.h"

namespace diffkv::bench {

// Inputs are random with peaked scores and values that have a mean. Pages are handed out in random
// order, as in a cache that has been in use. The context of earlier steps is in the cache; slots of
// this step's tokens and the output are NaN until the stages write them.
class Workload {
 public:
  // `session` must outlive it. Throws Error if memory is lacking or the library refuses the layer.
  Workload(const device::Session& session, const Scenario& scenario);
  Workload(const Workload&) = delete;
  Workload& operator=(const Workload&) = delete;

  // For Backend::supports.
  static Problem problem_of(const Scenario& scenario);

  // The stages, in order, on the session's stream. Of contiguous keys, the cache update writes them
  // in place.
  void update_cache();
  void make_plan();
  void attend();

  // Runs the stages and compares this step's keys and values in the cache, and a sample of output
  // rows, with the reference. An Error of the library is a wrong result.
  Verification verify();

 private:
  // `bytes` of the backend's memory, all of them 0xff: NaN in every floating-point type.
  device::Memory allocate(std::int64_t bytes) const;
  void make_params();
  // Puts what was made on the host into the backend's memory.
  void place();
  void make_cache();
  void make_batch();
  void make_outputs();
  void write_context();
  std::int64_t slot_of(std::int64_t seq, std::int64_t position) const;
  // The call with everything on the host, cache and output in these buffers.
  AttendArgs host_image(std::vector<std::byte>& cache, std::vector<std::byte>& output) const;
  // `cache` as update_cache sees it, on the memory at `data`.
  KvCacheView written_view(void* data, Device device) const;
  // The cache as attend sees it.
  KvCacheView read_view(const KvCacheView& written) const;
  // "" or the first token of this step that is not in the cache, whose copy on the host this is, as
  // the reference would write it.
  std::string check_stored(const KvCacheView& cache) const;

  const device::Session& session_;
  Scenario scenario_;
  PlanKey key_;
  PlanMaxima maxima_;
  replay::InputPool inputs_;
  std::vector<std::int64_t> first_token_;  // [num_seqs]: of the sequence's pages, or of its keys
  std::int64_t capacity_ = 0;              // tokens that the cache holds
  KvCacheSpec spec_;
  std::int64_t num_pages_ = 0;
  device::Memory cache_memory_;
  device::Memory output_memory_;
  device::Memory workspace_memory_;
  device::Mirror mirror_;  // of all that is made on the host
  KvCacheView written_;    // what update_cache sees
  float kv_scale_ = 1.0F;
  std::vector<float> sinks_;                   // [num_heads]
  std::vector<float> alibi_slopes_;            // [num_heads] or empty
  std::vector<std::int32_t> page_order_;       // page of each page handed out
  std::vector<std::int32_t> query_start_loc_;  // [num_seqs + 1]
  std::vector<std::int32_t> seq_lens_;         // [num_seqs]
  std::vector<std::int32_t> block_table_;      // [num_seqs, max_blocks]
  std::vector<std::int32_t> kv_start_;         // [num_seqs]
  std::vector<std::int64_t> slot_mapping_;     // [num_tokens]
  AttentionParams host_params_;
  AttentionParams params_;
  AttendArgs host_args_;  // query and batch
  AttendArgs args_;
  ConstTensorView new_key_;  // of this step, in the backend's memory like what follows
  ConstTensorView new_value_;
  ConstTensorView slots_;
  TensorView workspace_;
  Plan plan_;
};

}  // namespace diffkv::bench
