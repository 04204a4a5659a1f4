// A problem made from a case: all its memory, filled so that mistakes show.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "diffkv/attention.h"
#include "diffkv/plan.h"
#include "verify/buffer.h"
#include "verify/cases.h"

namespace diffkv::verify {

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
  std::array<std::vector<std::byte>, 2> pools;  // the second only where K and V are separate
  KvCacheView view;
};

// Host memory of one problem. V has a mean and scores are peaked, so that neither zeros nor a
// plain average pass. Every buffer lies between guard zones. Cache slots that no row may read hold
// NaN and Inf; block ids are permuted, block 0 is never used, and block-table entries past a
// sequence's last block are far out of range. The output starts as NaN.
class GeneratedProblem {
 public:
  GeneratedProblem(const Case& c, std::uint64_t seed);
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
  // "" or where the cache differs from the image. A NaN that the update wrote equals any NaN.
  std::string cache_difference(CacheImage expected) const;

  // Makes output and lse NaN again.
  void poison_outputs();

  // "" or the first overwritten guard zone, changed input, or touched output row that is not
  // covered. The cache counts as neither: see cache_difference.
  std::string damage() const;

 private:
  GuardedBuffer& buffer(std::string name, std::int64_t bytes, std::int64_t misalign = 0);
  TensorView index_tensor(std::string name, const std::vector<std::int64_t>& values,
                          std::initializer_list<std::int64_t> shape);
  TensorView value_tensor(std::string name, DType dtype, std::initializer_list<std::int64_t> shape,
                          const std::function<double(std::int64_t)>& value_at);
  void tidy_unit_strides(BasicTensorView<const void>& view) const;
  std::int64_t misalign(DType dtype) const;

  void make_batch();
  void make_mask_data();
  void make_rows();
  void make_params();
  void make_cache();
  void make_pool();
  void make_dense();
  void make_scales();
  void poison_cache();
  void write_context();
  void make_slots();
  void write_specials(std::int64_t first_token);
  void put(const KvPlane& plane, std::int64_t block, std::int64_t token, std::int64_t head,
           std::int64_t d, double value, double scale) const;
  double key_value(std::int64_t seq, std::int64_t j, std::int64_t head, std::int64_t d) const;
  double value_value(std::int64_t seq, std::int64_t j, std::int64_t head, std::int64_t d) const;

  Case case_;
  std::uint64_t seed_;
  Random random_;
  std::vector<std::unique_ptr<GuardedBuffer>> buffers_;
  AttentionParams params_;
  AttendArgs args_;
  PlanMaxima maxima_;
  ConstTensorView new_key_;
  ConstTensorView new_value_;
  ConstTensorView slot_mapping_;
};

}  // namespace diffkv::verify
