#include "diffkv/cache.h"

#include <cstddef>
#include <string_view>

#include "core/rules.h"
#include "core/validate.h"

namespace diffkv {
namespace {

constexpr std::array kPackedDTypes = {DType::kF32,  DType::kF16,  DType::kBF16,
                                      DType::kE4M3, DType::kE5M2, DType::kU8};

// The address `elements` past data; null stays null.
void* advance(void* data, std::int64_t elements, DType dtype) {
  if (data == nullptr) return nullptr;
  return static_cast<std::byte*>(data) + elements * size_of(dtype);
}

// A plane over dimensions block, token, head of a tensor. The stride of a dimension of one element
// means nothing and may be anything: it becomes 0.
KvPlane plane_of(const TensorView& tensor, DType stored) {
  const auto stride = [&](int dim) { return tensor.shape[dim] <= 1 ? 0 : tensor.strides[dim]; };
  return {tensor.data, stored, stride(0), stride(1), stride(2)};
}

}  // namespace

std::string_view to_string(KvCacheLayout layout) {
  return layout == KvCacheLayout::kNHD ? "NHD" : "HND";
}

KvCacheView KvCacheView::packed(const TensorView& cache, std::int64_t head_size_qk, DType stored) {
  core::check_head_size("head_size_qk", head_size_qk);
  core::check_tensor("kv_cache", cache, kPackedDTypes,
                     {core::any_extent("num_blocks"), core::any_extent("block_size"),
                      core::any_extent("num_kv_heads"),
                      core::at_least("head_size_qk + head_size_v", head_size_qk + 8,
                                     "head_size_qk and the least head_size_v are")});
  core::check_last_contiguous("kv_cache", cache);
  if (cache.dtype == DType::kU8) {
    if (!is_fp8(stored)) {
      core::refuse("kv_cache is uint8 and `stored` is {}, expected fp8_e4m3 or fp8_e5m2",
                   to_string(stored));
    }
  } else if (stored != cache.dtype) {
    core::refuse("kv_cache is {} and `stored` is {}, expected the same", to_string(cache.dtype),
                 to_string(stored));
  }
  KvCacheView view;
  view.key = plane_of(cache, stored);
  view.value = view.key;
  view.value.data = advance(cache.data, head_size_qk, stored);
  view.num_blocks = cache.shape[0];
  view.block_size = cache.shape[1];
  view.num_kv_heads = cache.shape[2];
  view.head_size_qk = head_size_qk;
  view.head_size_v = cache.shape[3] - head_size_qk;
  view.device = cache.device;
  core::validate_cache(view);
  return view;
}

KvCacheView KvCacheView::packed(const TensorView& cache, std::int64_t head_size_qk) {
  return packed(cache, head_size_qk, cache.dtype);
}

KvCacheView KvCacheView::separate(const TensorView& key, const TensorView& value) {
  core::check_tensor("key cache", key, core::kKvDTypes,
                     {core::any_extent("num_blocks"), core::any_extent("block_size"),
                      core::any_extent("num_kv_heads"), core::any_extent("head_size_qk")});
  core::check_tensor("value cache", value, core::kKvDTypes,
                     {core::exactly("num_blocks", key.shape[0], "the key cache has"),
                      core::exactly("block_size", key.shape[1], "the key cache has"),
                      core::exactly("num_kv_heads", key.shape[2], "the key cache has"),
                      core::any_extent("head_size_v")});
  core::check_device("value cache", value.device, "the key cache", key.device);
  core::check_last_contiguous("key cache", key);
  core::check_last_contiguous("value cache", value);
  KvCacheView view;
  view.key = plane_of(key, key.dtype);
  view.value = plane_of(value, value.dtype);
  view.num_blocks = key.shape[0];
  view.block_size = key.shape[1];
  view.num_kv_heads = key.shape[2];
  view.head_size_qk = key.shape[3];
  view.head_size_v = value.shape[3];
  view.device = key.device;
  core::validate_cache(view);
  return view;
}

KvCacheView KvCacheView::dense_tokens(const ConstTensorView& key, const ConstTensorView& value) {
  core::check_tensor("key", key, core::kKvDTypes,
                     {core::any_extent("num_kv_tokens"), core::any_extent("num_kv_heads"),
                      core::any_extent("head_size_qk")});
  core::check_tensor(
      "value", value, core::kKvDTypes,
      {core::exactly("num_kv_tokens", key.shape[0], "key has"),
       core::exactly("num_kv_heads", key.shape[1], "key has"), core::any_extent("head_size_v")});
  core::check_device("value", value.device, "key", key.device);
  core::check_last_contiguous("key", key);
  core::check_last_contiguous("value", value);
  // One page that holds every token.
  const auto paged = [](const ConstTensorView& tensor) {
    TensorView view;
    view.data = const_cast<void*>(tensor.data);  // read_only below keeps it from being written
    view.dtype = tensor.dtype;
    view.device = tensor.device;
    view.rank = 4;
    view.shape = {1, tensor.shape[0], tensor.shape[1], tensor.shape[2]};
    view.strides = {0, tensor.strides[0], tensor.strides[1], tensor.strides[2]};
    return view;
  };
  KvCacheView view;
  view.key = plane_of(paged(key), key.dtype);
  view.value = plane_of(paged(value), value.dtype);
  view.num_blocks = 1;
  view.block_size = key.shape[0];
  view.num_kv_heads = key.shape[1];
  view.head_size_qk = key.shape[2];
  view.head_size_v = value.shape[2];
  view.device = key.device;
  view.dense = true;
  view.read_only = true;
  core::validate_cache(view);
  return view;
}

void KvCacheSpec::check() const {
  if (block_size < 1 || block_size > core::kMaxInt32) {
    core::refuse("block_size is {}, expected 1 or more (int32)", block_size);
  }
  if (num_kv_heads < 1 || num_kv_heads > core::kMaxInt32) {
    core::refuse("num_kv_heads is {}, expected 1 or more (int32)", num_kv_heads);
  }
  core::check_head_size("head_size_qk", head_size_qk);
  core::check_head_size("head_size_v", head_size_v);
  core::check_dtype("the cache's dtype", dtype, core::kKvDTypes);
  if (layout != KvCacheLayout::kNHD && layout != KvCacheLayout::kHND) {
    core::refuse("layout is {}, expected NHD or HND", static_cast<int>(layout));
  }
  std::int64_t bytes = 0;
  if (__builtin_mul_overflow(block_size * num_kv_heads,
                             (head_size_qk + head_size_v) * size_of(dtype), &bytes)) {
    core::refuse("a page of {} tokens of {} KV heads overflows int64", block_size, num_kv_heads);
  }
  if (page_size_padded == 0) return;
  const std::int64_t alignment = core::row_alignment(dtype);
  if (page_size_padded < bytes || page_size_padded % alignment != 0) {
    core::refuse("page_size_padded is {} bytes, expected 0 or a multiple of {} from {} on",
                 page_size_padded, alignment, bytes);
  }
}

std::int64_t KvCacheSpec::page_size_bytes() const {
  return block_size * num_kv_heads * (head_size_qk + head_size_v) * size_of(dtype);
}

std::int64_t KvCacheSpec::page_stride_bytes() const {
  return page_size_padded > 0 ? page_size_padded : page_size_bytes();
}

std::array<std::int64_t, 4> KvCacheSpec::shape(std::int64_t num_blocks) const {
  return {num_blocks, block_size, num_kv_heads, head_size_qk + head_size_v};
}

std::array<std::int64_t, 4> KvCacheSpec::strides() const {
  const std::int64_t row = head_size_qk + head_size_v;
  const std::int64_t page = page_stride_bytes() / size_of(dtype);
  if (layout == KvCacheLayout::kNHD) return {page, num_kv_heads * row, row, 1};
  return {page, row, block_size * row, 1};
}

KvCacheView KvCacheSpec::view(void* data, std::int64_t num_blocks, Device device) const {
  check();
  TensorView cache;
  cache.data = data;
  cache.dtype = dtype;
  cache.device = device;
  cache.rank = 4;
  cache.shape = shape(num_blocks);
  cache.strides = strides();
  return KvCacheView::packed(cache, head_size_qk, dtype);
}

}  // namespace diffkv
