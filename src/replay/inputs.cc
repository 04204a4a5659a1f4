#include "replay/inputs.h"

#include <cmath>
#include <random>

#include "core/dtype.h"

namespace diffkv::replay {
namespace {

constexpr std::int64_t kAlignment = 64;

}  // namespace

InputPool::InputPool(const Model& model, const LayerKind& kind, DType dtype,
                     std::int64_t max_tokens, std::uint64_t seed)
    : num_heads_(kind.num_heads),
      num_kv_heads_(kind.num_kv_heads),
      head_size_qk_(model.head_size_qk),
      head_size_v_(model.head_size_v),
      row_(num_heads_ * head_size_qk_ + num_kv_heads_ * (head_size_qk_ + head_size_v_)),
      rows_(max_tokens + num_offsets() - 1),
      dtype_(dtype) {
  storage_.resize(static_cast<std::size_t>(bytes() + kAlignment) / sizeof(std::uint32_t) + 1);
  const auto address = reinterpret_cast<std::uintptr_t>(storage_.data());
  data_ = reinterpret_cast<std::byte*>(storage_.data()) + (kAlignment - address % kAlignment);

  // Normal numbers are drawn once and reused from random places: drawing each would take seconds.
  constexpr std::size_t kDrawn = 1 << 16;
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> drawn(kDrawn);
  for (float& x : drawn) x = normal(random);

  const std::int64_t key_column = num_heads_ * head_size_qk_;
  const std::int64_t value_column = key_column + num_kv_heads_ * head_size_qk_;
  std::vector<float> values(static_cast<std::size_t>(row_));
  for (std::int64_t r = 0; r < rows_; ++r) {
    std::size_t at = 0;
    for (std::int64_t c = 0; c < row_; ++c) {
      // One number of the generator serves 64 columns; no two rows are alike.
      if (c % 64 == 0) at = random() % (kDrawn - 64);
      const float x = drawn[at + static_cast<std::size_t>(c % 64)];
      const bool is_query = c < key_column;
      const bool is_value = c >= value_column;
      values[static_cast<std::size_t>(c)] = is_query ? 3.0F * x : (is_value ? 0.5F + x : x);
    }
    core::store_row(dtype_, values.data(), row_, data_ + r * row_bytes());
  }
}

ConstTensorView InputPool::slice(std::int64_t offset, std::int64_t num_tokens, std::int64_t column,
                                 std::int64_t heads, std::int64_t size) const {
  ConstTensorView view(data_ + (offset * row_ + column) * size_of(dtype_), dtype_,
                       {num_tokens, heads, size});
  view.strides[0] = row_;
  return view;
}

ConstTensorView InputPool::query(std::int64_t offset, std::int64_t num_tokens) const {
  return slice(offset, num_tokens, 0, num_heads_, head_size_qk_);
}

ConstTensorView InputPool::key(std::int64_t offset, std::int64_t num_tokens) const {
  return slice(offset, num_tokens, num_heads_ * head_size_qk_, num_kv_heads_, head_size_qk_);
}

ConstTensorView InputPool::value(std::int64_t offset, std::int64_t num_tokens) const {
  return slice(offset, num_tokens, (num_heads_ + num_kv_heads_) * head_size_qk_, num_kv_heads_,
               head_size_v_);
}

}  // namespace diffkv::replay
