// All layers of one kind: their caches, the step's batch, and the calls an engine makes.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <unordered_map>
#include <vector>

#include "diffkv/layer.h"
#include "replay/inputs.h"
#include "replay/model.h"
#include "replay/scheduler.h"
#include "replay/stats.h"

namespace diffkv::replay {

struct LayerGroupConfig {
  Model model;
  LayerKind kind;
  DType dtype = DType::kBF16;        // of query, key, value and output
  DType cache_dtype = DType::kBF16;  // of the cache
  std::int64_t block_size = 16;
  std::int64_t num_blocks = 0;
  std::int64_t max_tokens = 0;   // of a step
  std::int64_t max_seqs = 0;     // of a step
  std::int64_t max_seq_len = 0;  // of a request
  std::uint64_t seed = 0;
};

// A query row to compare with the reference.
struct RowToVerify {
  std::int64_t token = 0;  // of the step
  std::int64_t layer = 0;
  std::int64_t head = 0;
};

// Caches start full of NaN, the null block stays so, and table entries past a sequence's blocks are
// ids outside the pool: a key read from a place that is not the sequence's shows.
class LayerGroup {
 public:
  // Allocates everything. Throws Error if the backend cannot run such layers or memory is lacking.
  LayerGroup(const DiffKVBackend& backend, const LayerGroupConfig& config);

  // Runs the step through every layer, adds the times taken to `record` (and nothing else), and
  // compares `rows` after their layer has run, untimed. `go_on` is asked after each row; once it
  // says no, the layers still run but no more rows are compared. Throws Error.
  void run(const Step& step, const std::vector<RowToVerify>& rows, StepRecord& record,
           VerifyResult& verify, const std::function<bool()>& go_on);

  // Forgets a finished request.
  void forget(std::int64_t sequence_id) { sources_.erase(sequence_id); }

  // Bytes of the keys and values that some row of the step sees, all layers.
  double kv_bytes(const Step& step) const;
  // Multiplications and additions of the visible (row, key) pairs, all heads and layers.
  double flops(const Step& step) const;
  std::int64_t cache_bytes() const;

 private:
  struct Free {
    const Backend* backend;
    void operator()(void* data) const { backend->deallocate(data, Device{}); }
  };
  // Which row of the inputs a token in the cache was written from, in layer 0.
  struct Source {
    std::int32_t offset = 0;
    std::int32_t index = 0;
  };

  static PlanKey make_key(const LayerGroupConfig& config);
  AttentionParams make_params();
  void prepare(const Step& step);
  std::int64_t offset_of(std::int64_t layer, std::int64_t step_offset) const;
  void poison_row(const RowToVerify& row);
  void verify_row(const Step& step, const RowToVerify& row, VerifyResult& verify) const;
  // Whether every key and value the row may see is in the cache as it was written; else says which
  // is not.
  std::string check_stored(const Step& step, const RowToVerify& row) const;
  AttendArgs args(std::int64_t layer) const;

  LayerGroupConfig config_;
  PlanKey key_;
  std::mt19937_64 random_;
  InputPool inputs_;
  std::vector<float> sinks_;  // [num_heads]
  float kv_scale_ = 1.0F;     // of fp8 caches
  AttentionParams params_;
  DiffKVAttention attention_;
  DiffKVMetadataBuilder builder_;
  KvCacheSpec spec_;
  std::vector<std::unique_ptr<void, Free>> memory_;  // a layer each
  std::vector<KvCacheView> caches_;

  std::int64_t max_blocks_ = 0;
  std::vector<std::int32_t> query_start_loc_;  // [max_seqs + 1]
  std::vector<std::int32_t> seq_lens_;         // [max_seqs]
  std::vector<std::int32_t> block_table_;      // [max_seqs, max_blocks]
  std::vector<std::int64_t> slot_mapping_;     // [max_tokens]
  std::vector<float> output_;                  // [max_tokens, num_heads, head_size_v] of dtype
  std::vector<float> lse_;                     // [num_heads, max_tokens]
  Batch batch_;
  std::int64_t step_offset_ = 0;
  std::unordered_map<std::int64_t, std::vector<Source>> sources_;  // by sequence id
};

}  // namespace diffkv::replay
