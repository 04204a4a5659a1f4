// Rules about caches and what is written into them.
#include <algorithm>
#include <cstdint>
#include <string_view>

#include "core/rules.h"
#include "core/validate.h"

namespace diffkv::core {
namespace {

void check_count(std::string_view name, std::int64_t count, std::int64_t least) {
  if (count >= least && count <= kMaxInt32) return;
  refuse("the cache has {} {}, expected {} to {}", name, count, least, kMaxInt32);
}

void check_plane(std::string_view name, const KvCacheView& cache, const KvPlane& plane,
                 std::int64_t head_size) {
  const ConstTensorView tensor = plane_tensor(cache, plane, head_size);
  check_tensor(name, tensor, kKvDTypes,
               {any_extent("num_blocks"), any_extent("block_size"), any_extent("num_kv_heads"),
                any_extent("head_size")});
  check_rows(name, tensor);
}

void check_kv_scale(std::string_view name, const KvCacheView& cache, DType stored,
                    const ConstTensorView& scale) {
  if (!scale.given()) return;
  check_tensor(name, scale, DType::kF32, {any_extent("elements")});
  if (scale.shape[0] != 1 && scale.shape[0] != cache.num_kv_heads) {
    refuse("{} has {} elements, expected 1 or num_kv_heads {}", name, scale.shape[0],
           cache.num_kv_heads);
  }
  check_device(name, scale.device, "the cache", cache.device);
  if (!is_fp8(stored)) {
    refuse("{} is given and what it scales is stored as {}, expected it with fp8 only", name,
           to_string(stored));
  }
}

// New keys or values: any plain type is converted on the way, fp8 is copied.
void check_input(std::string_view name, std::string_view head_size_name,
                 const ConstTensorView& input, const KvCacheView& cache, const KvPlane& plane,
                 std::int64_t head_size, std::int64_t num_slots) {
  check_tensor(name, input, kInputDTypes,
               {at_least("num_tokens", num_slots, "slot_mapping has"),
                exactly("num_kv_heads", cache.num_kv_heads, "the cache has"),
                exactly(head_size_name, head_size, "the cache has")});
  if (is_fp8(input.dtype) && input.dtype != plane.dtype) {
    refuse("{} is {}, expected fp32, fp16, bf16 or the cache's own {}", name,
           to_string(input.dtype), to_string(plane.dtype));
  }
  check_rows(name, input);
  check_device(name, input.device, "the cache", cache.device);
}

void check_slots(const KvCacheView& cache, const ConstTensorView& slot_mapping) {
  const auto* slots = static_cast<const std::int64_t*>(slot_mapping.data);
  const std::int64_t num_slots = slot_mapping.shape[0];
  const std::int64_t capacity = cache.num_blocks * cache.block_size;
  for (std::int64_t i = 0; i < num_slots; ++i) {
    if (slots[i] < capacity) continue;
    refuse("slot_mapping[{}] is {}, expected below num_blocks {} x block_size {} = {}", i, slots[i],
           cache.num_blocks, cache.block_size, capacity);
  }
}

}  // namespace

void validate_cache(const KvCacheView& cache) {
  check_count("num_blocks", cache.num_blocks, 0);
  check_count("block_size", cache.block_size, cache.dense ? 0 : 1);
  check_count("num_kv_heads", cache.num_kv_heads, 1);
  if (cache.dense && cache.num_blocks != 1) {
    refuse("a dense cache has num_blocks {}, expected 1", cache.num_blocks);
  }
  check_head_size("the cache's head_size_qk", cache.head_size_qk);
  check_head_size("the cache's head_size_v", cache.head_size_v);
  check_plane("cache.key", cache, cache.key, cache.head_size_qk);
  check_plane("cache.value", cache, cache.value, cache.head_size_v);
  check_kv_scale("k_scale", cache, cache.key.dtype, cache.k_scale);
  check_kv_scale("v_scale", cache, cache.value.dtype, cache.v_scale);
}

void validate_update_cache(const ConstTensorView& key, const ConstTensorView& value,
                           const KvCacheView& cache, const ConstTensorView& slot_mapping) {
  validate_cache(cache);
  if (cache.read_only) refuse("the cache is read_only, expected one that may be written");
  check_no_overlap("cache.key", plane_tensor(cache, cache.key, cache.head_size_qk));
  check_no_overlap("cache.value", plane_tensor(cache, cache.value, cache.head_size_v));
  check_tensor("slot_mapping", slot_mapping, DType::kI64, {any_extent("num_slots")});
  check_last_contiguous("slot_mapping", slot_mapping);
  check_device("slot_mapping", slot_mapping.device, "the cache", cache.device);
  const std::int64_t num_slots = slot_mapping.shape[0];
  check_input("key", "head_size_qk", key, cache, cache.key, cache.head_size_qk, num_slots);
  check_input("value", "head_size_v", value, cache, cache.value, cache.head_size_v, num_slots);
  if (cache.key.data == cache.value.data && !is_empty(key) && !is_empty(value)) {
    refuse("cache.value starts where cache.key does, expected rows of its own");
  }
  if (cache.device.type == DeviceType::kCpu) check_slots(cache, slot_mapping);
}

}  // namespace diffkv::core
