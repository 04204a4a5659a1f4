// All layers of one kind: their caches, the step's batch, and the calls an engine makes.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "device/mirror.h"
#include "device/session.h"
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
  bool graphs = false;  // record a step of each padded shape once and launch that
};

// The least size of a batch's dimension that is recorded and holds n, at most `most`: 1, 2, 4, 8,
// multiples of 8 up to 256, then multiples of 256.
std::int64_t padded_size(std::int64_t n, std::int64_t most);

// A query row to compare with the reference.
struct RowToVerify {
  std::int64_t token = 0;  // of the step
  std::int64_t layer = 0;
  std::int64_t head = 0;
};

// Caches start full of NaN, the null block stays so, and table entries past a sequence's blocks are
// ids outside the pool: a key read from a place that is not the sequence's shows. Caches, inputs
// and outputs live in the backend's memory; a step's metadata is made on the host and copied into
// buffers that stay where they are, and so can be part of a recorded step.
class LayerGroup {
 public:
  // Allocates everything. `session` must outlive it. Throws Error if the backend cannot run such
  // layers, memory is lacking, or the session cannot record and graphs are asked for.
  LayerGroup(const device::Session& session, const LayerGroupConfig& config);
  LayerGroup(const LayerGroup&) = delete;
  LayerGroup& operator=(const LayerGroup&) = delete;

  // Runs the step through every layer, adds the times taken to `record` (and nothing else), and
  // compares `rows` after their layer has run, untimed (of a recorded step, after all layers).
  // `go_on` is asked after each row; once it says no, the layers still run but no more rows are
  // compared. Throws Error.
  void run(const Step& step, const std::vector<RowToVerify>& rows, StepRecord& record,
           VerifyResult& verify, const std::function<bool()>& go_on);

  // Forgets a finished request.
  void forget(std::int64_t sequence_id) { sources_.erase(sequence_id); }

  // Bytes of the keys and values that some row of the step sees, all layers.
  double kv_bytes(const Step& step) const;
  // Multiplications and additions of the visible (row, key) pairs, all heads and layers.
  double flops(const Step& step) const;
  std::int64_t cache_bytes() const;
  // How many shapes have been recorded.
  std::int64_t num_recorded() const { return std::ssize(recorded_); }

 private:
  // Which row of the inputs a token in the cache was written from, in layer 0.
  struct Source {
    std::int32_t offset = 0;
    std::int32_t index = 0;
  };
  // What a step's layers are given, in the backend's memory.
  struct Tensors {
    Batch batch;
    ConstTensorView slots;
    std::vector<ConstTensorView> query, key, value;  // a layer each
  };

  static PlanKey make_key(const LayerGroupConfig& config);
  AttentionParams make_params();
  device::Mirror place_constants();
  void make_caches();
  void make_buffers();
  void prepare(const Step& step);
  void upload_batch() const;
  Tensors tensors() const;
  // The layer's query, key and value in the backend's memory.
  ConstTensorView placed(ConstTensorView input, std::int64_t layer) const;
  std::int64_t offset_of(std::int64_t layer, std::int64_t step_offset) const;
  void run_layer(std::int64_t layer, const Tensors& tensors, const DiffKVMetadata& metadata) const;
  // The whole step as it is recorded for its padded shape.
  void run_recorded();
  void add_times(StepRecord& record) const;
  void poison_row(const RowToVerify& row) const;
  void verify_row(const Step& step, const RowToVerify& row, VerifyResult& verify) const;
  // Whether every key and value the row may see is in the cache as it was written; else says which
  // is not. `args` is the row's layer on the host.
  std::string check_stored(const Step& step, const RowToVerify& row, const AttendArgs& args) const;
  // Of the layer, in the backend's memory, and with query, batch and scales on the host.
  AttendArgs device_args(std::int64_t layer, const Tensors& tensors) const;
  AttendArgs host_args(std::int64_t layer) const;

  const device::Session* session_;
  LayerGroupConfig config_;
  PlanKey key_;
  std::mt19937_64 random_;
  InputPool inputs_;
  std::vector<float> sinks_;  // [num_heads]
  float kv_scale_ = 1.0F;     // of fp8 caches
  AttentionParams params_;    // on the host
  device::Mirror constants_;  // of inputs, sinks and scale
  DiffKVBackend backend_;
  DiffKVAttention attention_;
  DiffKVMetadataBuilder builder_;
  KvCacheSpec spec_;
  std::vector<device::Memory> memory_;  // of the caches, a layer each
  std::vector<KvCacheView> caches_;
  std::unique_ptr<device::Marks> marks_;

  std::int64_t max_blocks_ = 0;
  std::vector<std::int32_t> query_start_loc_;  // [max_seqs + 1]
  std::vector<std::int32_t> seq_lens_;         // [max_seqs]
  std::vector<std::int32_t> block_table_;      // [max_seqs, max_blocks]
  std::vector<std::int64_t> slot_mapping_;     // [max_tokens]
  device::Mirror index_;                       // of these four
  // Each [max_tokens, num_heads, head_size_v] of dtype and [num_heads, max_tokens]: one for all
  // layers in turn, or of recorded steps one a layer.
  std::vector<device::Memory> output_;
  std::vector<device::Memory> lse_;
  std::vector<device::Memory> step_inputs_;  // of recorded steps: where a layer's rows always are
  Batch batch_;                              // on the host
  ConstTensorView slots_;
  std::int64_t step_offset_ = 0;
  std::unordered_map<std::int64_t, std::vector<Source>> sources_;  // by sequence id
  // By padded numbers of sequences and tokens, and max_query_len.
  std::map<std::array<std::int64_t, 3>, std::unique_ptr<device::Recording>> recorded_;
};

}  // namespace diffkv::replay
