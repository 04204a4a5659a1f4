// Queries, keys and values that cost nothing to make: slices of one random pool.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "diffkv/tensor.h"
#include "replay/model.h"

namespace diffkv::replay {

// A fused buffer [rows, num_heads * qk + num_kv_heads * (qk + v)] of random rows, Q then K then V
// as a model's fused projection leaves them. A step takes a slice at a random row, so its tensors
// are strided views and nothing is copied. Queries are three times standard normal (scores then
// have a standard deviation of 3: a few keys take most of the weight), keys standard normal, values
// have mean 0.5 and standard deviation 1 (so an output that was never written, or averages the
// wrong keys, is far off).
class InputPool {
 public:
  // `max_tokens` is the longest slice.
  InputPool(const Model& model, const LayerKind& kind, DType dtype, std::int64_t max_tokens,
            std::uint64_t seed);

  // First rows of slices are 0 to num_offsets() - 1.
  static constexpr std::int64_t num_offsets() { return 1021; }

  ConstTensorView query(std::int64_t offset, std::int64_t num_tokens) const;  // [n, heads, qk]
  ConstTensorView key(std::int64_t offset, std::int64_t num_tokens) const;    // [n, kv_heads, qk]
  ConstTensorView value(std::int64_t offset, std::int64_t num_tokens) const;  // [n, kv_heads, v]

  // All rows; a slice's tensors lie in its rows alone.
  std::byte* data() const { return data_; }
  std::int64_t bytes() const { return rows_ * row_bytes(); }
  std::int64_t row_bytes() const { return row_ * size_of(dtype_); }

 private:
  ConstTensorView slice(std::int64_t offset, std::int64_t num_tokens, std::int64_t column,
                        std::int64_t heads, std::int64_t size) const;

  std::int64_t num_heads_;
  std::int64_t num_kv_heads_;
  std::int64_t head_size_qk_;
  std::int64_t head_size_v_;
  std::int64_t row_;   // elements
  std::int64_t rows_;  // of the pool
  DType dtype_;
  std::vector<std::uint32_t> storage_;  // of words, so that rows are aligned
  std::byte* data_ = nullptr;
};

}  // namespace diffkv::replay
