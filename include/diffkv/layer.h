// The three classes an engine works with, a thin layer over the stages.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "diffkv/attention.h"
#include "diffkv/backend.h"
#include "diffkv/batch.h"
#include "diffkv/cache.h"
#include "diffkv/plan.h"

namespace diffkv {

// Cache shape, strides and page bytes; what is supported.
class DiffKVBackend {
 public:
  // `backend` as in find_backend. Throws Error(kUnavailable).
  explicit DiffKVBackend(std::string_view backend = "");
  // A backend of the caller's own, which must outlive everything that is made with this.
  explicit DiffKVBackend(const Backend& backend) : compute_(&backend) {}

  static constexpr std::string_view get_name() { return "DIFFKV"; }
  const Backend& compute() const { return *compute_; }

  // [num_blocks, block_size, num_kv_heads, head_size_qk + head_size_v]. Throws Error.
  static std::array<std::int64_t, 4> get_kv_cache_shape(const KvCacheSpec& spec,
                                                        std::int64_t num_blocks);
  // Strides of that shape in elements. Throws Error.
  static std::array<std::int64_t, 4> get_kv_cache_strides(const KvCacheSpec& spec);
  // Bytes to allocate for num_blocks pages. Throws Error.
  static std::int64_t get_kv_cache_bytes(const KvCacheSpec& spec, std::int64_t num_blocks);

  static const std::vector<DType>& supported_dtypes();           // of queries
  static const std::vector<DType>& supported_kv_cache_dtypes();  // of stored keys and values
  static constexpr bool supports_head_size(std::int64_t head_size) {
    return head_size >= 8 && head_size <= 576 && head_size % 8 == 0;
  }
  static constexpr bool supports_block_size(std::int64_t block_size) { return block_size >= 1; }
  Support supports(const Problem& problem) const { return compute_->supports(problem); }

 private:
  const Backend* compute_;
};

class DiffKVMetadataBuilder;

// One step's batch and plan, for all layers of one kind. Cheap to copy; good until its builder
// builds again (a forward with an older one is refused).
class DiffKVMetadata {
 public:
  const Batch& batch() const { return batch_; }
  const Plan& plan() const { return plan_; }

 private:
  friend class DiffKVMetadataBuilder;
  friend class DiffKVAttention;

  Batch batch_;
  Plan plan_;
  std::shared_ptr<const std::uint64_t> current_;  // the builder's count of builds
  std::uint64_t build_ = 0;
};

// Makes a step's metadata. All memory is allocated here, once, from the maxima; one builder serves
// one stream at a time.
class DiffKVMetadataBuilder {
 public:
  // Throws Error if the key is unsupported or the memory is not there.
  DiffKVMetadataBuilder(const DiffKVBackend& backend, const PlanKey& key, const PlanMaxima& maxima,
                        Device device = {});
  ~DiffKVMetadataBuilder();
  DiffKVMetadataBuilder(const DiffKVMetadataBuilder&) = delete;
  DiffKVMetadataBuilder& operator=(const DiffKVMetadataBuilder&) = delete;

  // The batch's tensors must stay alive and unchanged while the metadata is used. Throws Error if
  // the batch is malformed or exceeds the maxima.
  DiffKVMetadata build(const Batch& batch, Stream stream = {});

  // As build, for a batch of padded maxima, max_query_len among them, whose contents change between
  // replays of a captured graph. Where there are no graphs (CPU) it is build.
  DiffKVMetadata build_for_cudagraph_capture(const Batch& batch, Stream stream = {});

  // What it allocated.
  std::int64_t workspace_bytes() const { return workspace_.numel(); }

 private:
  const Backend* compute_;
  PlanKey key_;
  PlanMaxima maxima_;
  TensorView workspace_;
  std::shared_ptr<std::uint64_t> builds_;
};

// One attention layer.
class DiffKVAttention {
 public:
  // Throws Error if the backend can't run such a layer.
  DiffKVAttention(const DiffKVBackend& backend, const PlanKey& key, const AttentionParams& params,
                  DType output_dtype);

  // Writes this step's key and value; not called for layers that share another's cache.
  void do_kv_cache_update(const ConstTensorView& key, const ConstTensorView& value,
                          const KvCacheView& cache, const ConstTensorView& slot_mapping,
                          Stream stream = {}) const;

  struct ForwardArgs {
    ConstTensorView query;  // [num_tokens, num_heads, head_size_qk]
    // Read only where there is no cache (encoder attention); else ignored and may be absent.
    ConstTensorView key;    // [num_kv_tokens, num_kv_heads, head_size_qk]
    ConstTensorView value;  // [num_kv_tokens, num_kv_heads, head_size_v]
    // Null: cacheless. Sequence s then starts at Batch::kv_start[s], or where that is not given at
    // query_start_loc[s].
    const KvCacheView* cache = nullptr;
    // Null: a profiling run, output is filled with zeros.
    const DiffKVMetadata* metadata = nullptr;
    TensorView output;        // [num_tokens, num_heads, head_size_v]
    TensorView lse;           // optional fp32 [num_heads, num_tokens]
    ConstTensorView qq_bias;  // this step's, in place of the params'
  };

  // Never writes the cache. Throws Error before anything is written: metadata of another key,
  // stale metadata, malformed tensors.
  void forward(const ForwardArgs& args, Stream stream = {}) const;

 private:
  const Backend* compute_;
  PlanKey key_;
  AttentionParams params_;
  DType output_dtype_;
};

}  // namespace diffkv
