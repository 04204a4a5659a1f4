// New keys and values into their slots. A thread moves whole chunks of 8 elements, which every
// legal row consists of; several at once, so that enough bytes are under way.
#include <cstddef>
#include <cstdint>

#include "cuda/device.h"
#include "cuda/kv_codec.cuh"
#include "cuda/quotient.h"
#include "cuda/row_io.cuh"
#include "cuda/stages.h"

namespace diffkv::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // chunks a thread has under way

// K or V of this step and of the cache.
struct Plane {
  RowsParams from;  // [num_tokens, num_kv_heads, head size]
  std::byte* to;    // [num_blocks, block_size, num_kv_heads, head size]
  std::int64_t stride_block;
  std::int64_t stride_token;
  std::int64_t stride_head;
  VectorParams scale;
  DType to_dtype;
  std::uint32_t chunks_per_head;
};

struct UpdateParams {
  Plane planes[2];                   // K, V
  const std::int64_t* slot_mapping;  // [num_slots]
  std::int64_t slot_stride;
  std::int64_t num_chunks;  // of all tokens
  std::int64_t capacity;    // slots of the cache
  std::int64_t block_size;
  std::int32_t block_shift;        // log2(block_size), or -1
  std::uint32_t chunks_per_token;  // of K and V
  std::uint32_t chunks_of_keys;    // of a token
};

// A chunk's place in the input and in the cache; `to` is null where it is skipped.
struct Chunk {
  const std::byte* from = nullptr;
  std::byte* to = nullptr;
  const Plane* plane = nullptr;
  std::uint32_t head = 0;
  std::uint32_t index = 0;  // within the row
};

__device__ Chunk locate(const UpdateParams& p, std::int64_t number) {
  Chunk chunk;
  if (number >= p.num_chunks) return chunk;
  // Most calls have fewer than 2^32 chunks, which divide in a few instructions.
  const std::int64_t token = p.num_chunks <= 0xffffffffLL
                                 ? static_cast<std::uint32_t>(number) / p.chunks_per_token
                                 : number / p.chunks_per_token;
  auto rest = static_cast<std::uint32_t>(number - token * p.chunks_per_token);
  const std::int64_t slot = p.slot_mapping[token * p.slot_stride];
  if (slot < 0 || slot >= p.capacity) return chunk;
  const std::int64_t block = p.block_shift >= 0 ? slot >> p.block_shift : slot / p.block_size;
  const std::int64_t offset = slot - block * p.block_size;
  const bool is_value = rest >= p.chunks_of_keys;
  if (is_value) rest -= p.chunks_of_keys;
  const Plane& plane = p.planes[is_value ? 1 : 0];
  chunk.plane = &plane;
  chunk.head = rest / plane.chunks_per_head;
  chunk.index = rest - chunk.head * plane.chunks_per_head;
  chunk.from = row_at(plane.from, token, chunk.head);
  chunk.to = plane.to + (block * plane.stride_block + offset * plane.stride_token +
                         chunk.head * plane.stride_head) *
                            size_of(plane.to_dtype);
  return chunk;
}

// kBytes: of an element, where input and cache have the same type.
template <int kBytes>
__global__ void __launch_bounds__(kThreads) copy_kernel(const __grid_constant__ UpdateParams p) {
  const std::int64_t first = std::int64_t{blockIdx.x} * (kThreads * kUnroll) + threadIdx.x;
  Chunk chunks[kUnroll];
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) chunks[i] = locate(p, first + i * kThreads);
  uint4 words[kUnroll][(kBytes + 1) / 2];
  constexpr int kPerChunk = kBytes == 4 ? 2 : 1;
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    if (chunks[i].to == nullptr) continue;
    if constexpr (kBytes == 1) {
      const uint2 half = __ldcs(reinterpret_cast<const uint2*>(chunks[i].from) + chunks[i].index);
      words[i][0].x = half.x, words[i][0].y = half.y;
    } else {
#pragma unroll
      for (int j = 0; j < kPerChunk; ++j) {
        words[i][j] = __ldcs(reinterpret_cast<const uint4*>(chunks[i].from) +
                             kPerChunk * chunks[i].index + j);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    if (chunks[i].to == nullptr) continue;
    if constexpr (kBytes == 1) {
      reinterpret_cast<uint2*>(chunks[i].to)[chunks[i].index] =
          make_uint2(words[i][0].x, words[i][0].y);
    } else {
#pragma unroll
      for (int j = 0; j < kPerChunk; ++j) {
        reinterpret_cast<uint4*>(chunks[i].to)[kPerChunk * chunks[i].index + j] = words[i][j];
      }
    }
  }
}

// Any types; bytes of fp8 are copied where the input has them.
template <DType kFrom, DType kTo>
__device__ void convert_chunks(const Chunk (&chunks)[kUnroll]) {
  float x[kUnroll][kChunk];
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    if (chunks[i].to != nullptr) {
      load_chunk(kFrom, chunks[i].from, std::int64_t{chunks[i].index} * kChunk, x[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    if (chunks[i].to == nullptr) continue;
    if (chunks[i].plane->scale.data != nullptr) {
      const Divider divide(scale_at(chunks[i].plane->scale, chunks[i].head));
#pragma unroll
      for (int j = 0; j < kChunk; ++j) x[i][j] = divide(x[i][j]);
    }
    store_chunk(kTo, x[i], chunks[i].to, std::int64_t{chunks[i].index} * kChunk);
  }
}

template <DType kFrom, DType kTo>
__global__ void __launch_bounds__(kThreads) convert_kernel(const __grid_constant__ UpdateParams p) {
  const std::int64_t first = std::int64_t{blockIdx.x} * (kThreads * kUnroll) + threadIdx.x;
  Chunk chunks[kUnroll];
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) chunks[i] = locate(p, first + i * kThreads);
  convert_chunks<kFrom, kTo>(chunks);
}

using Kernel = void (*)(UpdateParams);

template <DType kFrom>
Kernel convert_from(DType to) {
  switch (to) {
    case DType::kF32:
      return convert_kernel<kFrom, DType::kF32>;
    case DType::kF16:
      return convert_kernel<kFrom, DType::kF16>;
    case DType::kBF16:
      return convert_kernel<kFrom, DType::kBF16>;
    case DType::kE5M2:
      return convert_kernel<kFrom, DType::kE5M2>;
    default:
      return convert_kernel<kFrom, DType::kE4M3>;
  }
}

Kernel kernel_of(DType from, DType to) {
  if (from == to) {
    return size_of(from) == 4   ? copy_kernel<4>
           : size_of(from) == 2 ? copy_kernel<2>
                                : copy_kernel<1>;
  }
  switch (from) {
    case DType::kF32:
      return convert_from<DType::kF32>(to);
    case DType::kF16:
      return convert_from<DType::kF16>(to);
    default:
      return convert_from<DType::kBF16>(to);  // fp8 goes into its own type only
  }
}

Plane plane_of(const ConstTensorView& from, const KvPlane& to, const ConstTensorView& scale) {
  Plane plane{};
  plane.from = rows_params(from);
  plane.to = static_cast<std::byte*>(to.data);
  plane.stride_block = to.stride_block;
  plane.stride_token = to.stride_token;
  plane.stride_head = to.stride_head;
  plane.scale = vector_params(scale);
  plane.to_dtype = to.dtype;
  plane.chunks_per_head = static_cast<std::uint32_t>(from.shape[2] / kChunk);
  return plane;
}

void launch(UpdateParams p, bool keys, bool values, std::int64_t num_slots, std::int64_t num_heads,
            cudaStream_t stream) {
  const std::int64_t of_keys = keys ? num_heads * p.planes[0].chunks_per_head : 0;
  const std::int64_t of_values = values ? num_heads * p.planes[1].chunks_per_head : 0;
  p.chunks_of_keys = static_cast<std::uint32_t>(of_keys);
  p.chunks_per_token = static_cast<std::uint32_t>(of_keys + of_values);
  p.num_chunks = num_slots * (of_keys + of_values);
  const Plane& plane = p.planes[keys ? 0 : 1];
  constexpr std::int64_t kPerBlock = kThreads * kUnroll;
  const auto blocks = static_cast<unsigned>((p.num_chunks + kPerBlock - 1) / kPerBlock);
  kernel_of(plane.from.dtype, plane.to_dtype)<<<blocks, kThreads, 0, stream>>>(p);
  check(cudaGetLastError(), "update_cache");
}

}  // namespace

void update_cache(const ConstTensorView& key, const ConstTensorView& value,
                  const KvCacheView& cache, const ConstTensorView& slot_mapping,
                  cudaStream_t stream) {
  const std::int64_t num_slots = slot_mapping.shape[0];
  if (num_slots == 0) return;
  UpdateParams p{};
  p.planes[0] = plane_of(key, cache.key, cache.k_scale);
  p.planes[1] = plane_of(value, cache.value, cache.v_scale);
  p.slot_mapping = static_cast<const std::int64_t*>(slot_mapping.data);
  p.slot_stride = slot_mapping.strides[0];
  p.capacity = cache.num_blocks * cache.block_size;
  p.block_size = cache.block_size;
  p.block_shift = block_shift(cache.block_size);
  const bool together = key.dtype == value.dtype && cache.key.dtype == cache.value.dtype;
  if (together) {
    launch(p, true, true, num_slots, cache.num_kv_heads, stream);
  } else {
    launch(p, true, false, num_slots, cache.num_kv_heads, stream);
    launch(p, false, true, num_slots, cache.num_kv_heads, stream);
  }
}

}  // namespace diffkv::cuda
