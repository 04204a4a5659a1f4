// The paged KV cache: the arithmetic of its pages and the view that kernels read and write it by.
// Sole owner of the offsets of pages, slots, heads and of K and V within a row.
#pragma once

#include <array>
#include <cstdint>

#include "diffkv/tensor.h"

namespace diffkv {

// Order of the token and head dimensions inside a page.
enum class KvCacheLayout : std::uint8_t {
  kNHD,  // [num_blocks, block_size, num_kv_heads, head_size_qk + head_size_v], as written
  kHND,  // the same logical shape; in memory the heads come before the tokens
};

std::string_view to_string(KvCacheLayout layout);

// One of K and V in the cache: element (block, token, head, d) is at
//   data + (block * stride_block + token * stride_token + head * stride_head + d) elements.
struct KvPlane {
  void* data = nullptr;
  DType dtype = DType::kBF16;
  std::int64_t stride_block = 0;
  std::int64_t stride_token = 0;
  std::int64_t stride_head = 0;
};

// How kernels see a cache. K and V each have a pointer, a dtype and three strides, so packed NHD
// and HND, padded pages, separate K and V pools and dense K and V are the same code.
struct KvCacheView {
  KvPlane key;    // rows of head_size_qk elements
  KvPlane value;  // rows of head_size_v elements
  std::int64_t num_blocks = 0;
  std::int64_t block_size = 0;  // tokens in a page; of a dense view: all tokens
  std::int64_t num_kv_heads = 0;
  std::int64_t head_size_qk = 0;
  std::int64_t head_size_v = 0;
  Device device;
  bool dense = false;      // no pages: sequence s starts at token Batch::kv_start[s]
  bool read_only = false;  // update_cache refuses it
  // fp32, 1 or num_kv_heads elements, any stride; not given = 1. A stored value x stands for
  // x * scale. Read when the kernels run, never on the host.
  ConstTensorView k_scale;
  ConstTensorView v_scale;

  // Views a packed cache [num_blocks, block_size, num_kv_heads, head_size_qk + head_size_v] with
  // any strides whose last is 1: K first in a row, V after it. `stored` names what kU8 bytes hold
  // (kE4M3 or kE5M2); for any other dtype it must be the tensor's own. Throws Error.
  static KvCacheView packed(const TensorView& cache, std::int64_t head_size_qk, DType stored);
  static KvCacheView packed(const TensorView& cache, std::int64_t head_size_qk);

  // Views separate pools [num_blocks, block_size, num_kv_heads, head_size_qk] and
  // [..., head_size_v]; their dtypes and strides may differ. Throws Error.
  static KvCacheView separate(const TensorView& key, const TensorView& value);

  // Views dense K [num_kv_tokens, num_kv_heads, head_size_qk] and V [num_kv_tokens, num_kv_heads,
  // head_size_v] (cacheless encoder and cross attention). Read-only. Throws Error.
  static KvCacheView dense_tokens(const ConstTensorView& key, const ConstTensorView& value);
};

// What an engine allocates for one layer: a packed cache of one dtype.
struct KvCacheSpec {
  std::int64_t block_size = 16;
  std::int64_t num_kv_heads = 1;
  std::int64_t head_size_qk = 0;
  std::int64_t head_size_v = 0;
  DType dtype = DType::kBF16;  // fp32, fp16, bf16, fp8 e4m3 or e5m2
  KvCacheLayout layout = KvCacheLayout::kNHD;
  std::int64_t page_size_padded = 0;  // bytes from one page to the next; 0 = page_size_bytes()

  // Throws Error if a field is out of the contract (sizes, dtype, padding).
  void check() const;

  // Bytes of the content of one page.
  std::int64_t page_size_bytes() const;

  // Bytes from one page to the next: page_size_padded, or the content's.
  std::int64_t page_stride_bytes() const;

  // [num_blocks, block_size, num_kv_heads, head_size_qk + head_size_v], for either layout.
  std::array<std::int64_t, 4> shape(std::int64_t num_blocks) const;

  // Strides in elements of that logical shape.
  std::array<std::int64_t, 4> strides() const;

  // The memory of num_blocks pages at `data` as a kernel's view. Calls check(). Throws Error.
  KvCacheView view(void* data, std::int64_t num_blocks, Device device = {}) const;
};

}  // namespace diffkv
