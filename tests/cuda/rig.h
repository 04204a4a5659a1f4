// A step of a paged layer in the GPU's memory, as an engine would hold it: buffers of fixed maxima
// whose contents change from step to step.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "cuda/backend.h"
#include "device/memory.h"
#include "diffkv/layer.h"

namespace diffkv::cuda {

// Skips a test, saying why, where the CUDA backend cannot run.
#define DIFFKV_NEED_GPU()                                                       \
  if (!::diffkv::cuda::backend().available()) {                                 \
    GTEST_SKIP() << "no GPU: " << ::diffkv::cuda::backend().available().reason; \
  }                                                                             \
  static_assert(true)

// A stream of its own, destroyed at the end.
class OwnStream {
 public:
  OwnStream();
  ~OwnStream();
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;

  Stream get() const { return Stream{handle_}; }
  cudaStream_t handle() const { return handle_; }

 private:
  cudaStream_t handle_ = nullptr;
};

struct RigSizes {
  std::int64_t max_seqs = 8;
  std::int64_t max_tokens = 64;
  std::int64_t max_blocks = 40;  // of a sequence
  std::int64_t block_size = 16;
  std::int64_t max_query_len = 0;  // 0: any
  // What the batch says of it.
  std::int64_t announced_query_len = 0;
  std::int32_t sharing = 1;  // rigs in one cache
};

class Rig {
 public:
  // bf16 queries; the cache is of key.key_dtype. The workspace and all buffers are allocated here.
  Rig(const PlanKey& key, const RigSizes& sizes);
  // Everything of its own but the cache, in which it has other pages than the rigs before it, of
  // which this is the last; the first one's fill is the cache's.
  explicit Rig(const Rig& before);

  // Uploads new lengths, pages, slots, queries, keys and values, drawn from the seed; the cache is
  // filled anew with the first call.
  void fill(unsigned seed, Stream stream);
  // Takes another rig's inputs of the same sizes, or its outputs and lse, in the order of the
  // stream.
  void copy_inputs(const Rig& from, const OwnStream& stream);
  void copy_outputs(const Rig& from, const OwnStream& stream);
  // Overwrites every index tensor with random bits.
  void spoil_indices(unsigned seed, Stream stream);
  // update_cache, plan, attend, combine on the stream: a kernel each, of attend one a tile class
  // that can have sequences.
  void enqueue(Stream stream);

  // Bytes of the rows of the last fill's tokens, of their lse, and of the whole cache, once the
  // stream is done.
  std::vector<std::byte> results(Stream stream) const;
  // Of the last fill's tokens, once the stream is done.
  std::vector<float> outputs(Stream stream) const;

  DiffKVMetadataBuilder& builder() { return *builder_; }

 private:
  Rig(const PlanKey& key, const RigSizes& sizes, std::shared_ptr<const device::Memory> cache);

  Batch batch() const;

  const Backend& backend_;
  PlanKey key_;
  RigSizes sizes_;
  DiffKVBackend face_;
  std::unique_ptr<DiffKVMetadataBuilder> builder_;
  std::unique_ptr<DiffKVAttention> layer_;
  KvCacheSpec spec_;
  std::int64_t num_blocks_;
  std::int32_t first_page_ = 0;  // the rig's are every sizes.sharing-th from here on
  bool cache_filled_ = false;
  std::int32_t num_tokens_ = 0;  // of the last fill
  std::shared_ptr<const device::Memory> cache_;
  device::Memory query_, new_key_, new_value_, output_, lse_;
  device::Memory query_start_loc_, seq_lens_, block_table_, slot_mapping_, scales_;
};

}  // namespace diffkv::cuda
