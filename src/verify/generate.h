// A problem made from a case: all its memory, filled so that mistakes show.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "diffkv/attention.h"
#include "diffkv/plan.h"
#include "verify/buffer.h"
#include "verify/cases.h"
#include "verify/reference.h"

namespace diffkv::verify {

// The ALiBi paper's slopes of a layer's heads: 2^(-8 i / num_heads) for i from 1 to num_heads.
std::vector<double> alibi_slopes(std::int64_t num_heads);

// Reproducible random numbers, the same on every platform.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  std::uint64_t next();
  double uniform();                      // [0, 1)
  double normal();                       // about N(0, 1)
  std::int64_t below(std::int64_t end);  // [0, end), end > 0

 private:
  std::uint64_t state_;
};

// A copy of a cache's bytes and the cache's view of that copy.
struct CacheImage {
  CacheImage() = default;
  CacheImage(CacheImage&&) = default;  // moving keeps the bytes where the view points
  CacheImage(const CacheImage&) = delete;

  std::array<std::vector<std::byte>, 2> pools;  // the second only where K and V are separate
  KvCacheView view;
};

// Host memory of one problem. V has a mean and scores are peaked, so that neither zeros nor a
// plain average pass. Every buffer lies between guard zones. Cache slots that no row may read hold
// NaN and Inf; block ids are permuted, block 0 is never used, and block-table entries past a
// sequence's last block are far out of range. The output starts as NaN.
class GeneratedProblem {
 public:
  GeneratedProblem(Case c, std::uint64_t seed);
  GeneratedProblem(const GeneratedProblem&) = delete;
  GeneratedProblem& operator=(const GeneratedProblem&) = delete;

  const Case& source() const { return case_; }
  const PlanKey& key() const { return case_.key; }
  const AttentionParams& params() const { return params_; }
  const AttendArgs& args() const { return args_; }
  const PlanMaxima& maxima() const { return maxima_; }
  Problem problem() const;

  // This step's keys and values [n, num_kv_heads, head_size_*] and where they go; of a dense case
  // its keys and values, and no slots.
  const ConstTensorView& new_key() const { return new_key_; }
  const ConstTensorView& new_value() const { return new_value_; }
  const ConstTensorView& slot_mapping() const { return slot_mapping_; }
  bool has_update() const { return slot_mapping_.given(); }

  // Tokens that attend writes.
  std::int64_t covered_tokens() const;

  CacheImage cache_image() const;
  // "" or where the cache differs from the image. Where the image has a NaN in a slot of this step,
  // any NaN is right; the image then takes the cache's.
  std::string cache_difference(CacheImage& expected) const;

  // Makes output and lse NaN again.
  void poison_outputs();

  // Every buffer there is.
  const std::vector<std::unique_ptr<GuardedBuffer>>& buffers() const { return buffers_; }

  // "" or the first overwritten guard zone, changed input, or touched output row that is not
  // covered. The cache counts as neither: see cache_difference.
  std::string damage() const;

 private:
  // Rows of noise that depend only on the seed and on what they are for.
  enum class Use : std::uint8_t { kQuery, kKey, kValue };

  GuardedBuffer& new_buffer(const std::string& name, std::int64_t bytes, DType dtype);
  // Copies shape's numel elements from `values`.
  ConstTensorView index_tensor(const std::string& name, const void* values,
                               const std::vector<std::int64_t>& shape, DType dtype);
  ConstTensorView value_vector(const std::string& name, DType dtype,
                               const std::vector<double>& values, std::int64_t stride = 1);
  // A stride of a dimension of size 1 is never used, so it may be anything.
  template <class View>
  View with_odd_strides(View view) const {
    for (int i = 0; case_.odd_unit_strides && i < view.rank; ++i) {
      if (view.shape[i] == 1) view.strides[i] = 3 + 2 * i;
    }
    return view;
  }

  void make_batch();
  void make_mask_data();
  void make_rows();
  void make_outputs();
  void make_params();
  void make_pools();
  void make_block_table();
  void make_dense();
  void make_scales();
  void poison_cache() const;
  void write_context();
  void make_slots();
  void write_special_rows();

  std::vector<double> row(Use use, std::int64_t seq, std::int64_t j, std::int64_t head) const;
  void put_row(const KvPlane& plane, const KeyPlace& place, std::int64_t head,
               const std::vector<double>& values, double scale) const;
  // Writes key or value row `token` of this step.
  void put_new(const ConstTensorView& to, std::int64_t token, std::int64_t head,
               const std::vector<double>& values, double scale) const;
  // Whether the update writes query i of the sequence.
  bool is_new(const RowPlace& place) const;
  std::int64_t slot_of(std::int64_t seq, std::int64_t j) const;
  std::string touched_rows(const GuardedBuffer& memory, const TensorView& view, int token_dim,
                           int row_dims) const;

  Case case_;
  std::uint64_t seed_;
  Random random_;
  std::vector<std::unique_ptr<GuardedBuffer>> buffers_;
  std::vector<GuardedBuffer*> pools_;  // of the cache: one, or K's and V's
  GuardedBuffer* output_memory_ = nullptr;
  GuardedBuffer* lse_memory_ = nullptr;
  std::vector<std::int64_t> query_start_;    // [num_seqs + 1]
  std::vector<std::int32_t> page_order_;     // page ids in the order they are handed out
  std::vector<std::int64_t> special_slots_;  // of an unread page
  std::int64_t num_rows_ = 0;                // of query and output
  AttentionParams params_;
  AttendArgs args_;
  PlanMaxima maxima_;
  ConstTensorView new_key_;
  ConstTensorView new_value_;
  ConstTensorView slot_mapping_;
};

}  // namespace diffkv::verify
