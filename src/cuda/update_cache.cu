// New keys and values into their slots. All legal rows consist of whole chunks of 8 elements. A
// thread has one chunk of a token, always the same one, and several tokens at a time: what depends
// on the chunk is found once, and enough bytes are under way.
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda/dependent_launch.cuh"
#include "cuda/device.h"
#include "cuda/kv_codec.cuh"
#include "cuda/launch.h"
#include "cuda/quotient.h"
#include "cuda/row_io.cuh"
#include "cuda/stages.h"
#include "plan/schedule.h"

namespace diffkv::cuda {
namespace {

constexpr int kMostThreads = 256;
// Tokens of a thread at a time: 64 bytes of 16-bit elements or longer ones.
constexpr int tokens_of(DType from) { return from == DType::kF32 ? 2 : 4; }
// Resident; so that enough threads wait for memory.
constexpr int kBlocksPerSm = 4;

// K or V of this step and of the cache. Strides are in bytes.
struct Plane {
  const std::byte* from;  // [num_tokens, num_kv_heads, head size]
  std::int64_t from_token;
  std::int64_t from_head;
  std::byte* to;  // [num_blocks, block_size, num_kv_heads, head size]
  std::int64_t to_block;
  std::int64_t to_token;
  std::int64_t to_head;
  VectorParams scale;
  DType from_dtype;
  DType to_dtype;
  std::int32_t chunks_per_head;
};

struct UpdateParams {
  Plane planes[2];                   // K, V
  const std::int64_t* slot_mapping;  // [num_slots]
  std::int64_t num_slots;
  std::int64_t capacity;  // slots of the cache
  std::int64_t block_size;
  std::int32_t block_shift;       // log2(block_size), or -1
  std::int32_t chunks_per_token;  // of K and V
  std::int32_t chunks_of_keys;    // of a token
};

// A thread's chunk of a token: where it is in token 0 and in slot 0.
struct Column {
  const Plane* plane;
  const std::byte* from;
  std::byte* to;
  std::int32_t head;

  template <DType kFrom, DType kTo>
  __device__ static Column at(const UpdateParams& p, std::int32_t chunk) {
    const bool is_value = chunk >= p.chunks_of_keys;
    if (is_value) chunk -= p.chunks_of_keys;
    Column column;
    column.plane = &p.planes[is_value ? 1 : 0];
    const Plane& plane = *column.plane;
    column.head = plan::divide(chunk, plane.chunks_per_head);
    const std::int32_t element = (chunk - column.head * plane.chunks_per_head) * kChunk;
    column.from = plane.from + column.head * plane.from_head + element * size_of(kFrom);
    column.to = plane.to + column.head * plane.to_head + element * size_of(kTo);
    return column;
  }

  __device__ std::byte* in_slot(const UpdateParams& p, std::int64_t slot) const {
    std::uint32_t block = 0;
    std::uint32_t token = 0;
    if (p.block_shift >= 0) {
      block = static_cast<std::uint32_t>(slot >> p.block_shift);
      token = static_cast<std::uint32_t>(slot) & static_cast<std::uint32_t>(p.block_size - 1);
    } else {
      block = static_cast<std::uint32_t>(slot / p.block_size);
      token = static_cast<std::uint32_t>(slot - block * p.block_size);
    }
    return to + block * plane->to_block + token * plane->to_token;
  }
};

// What divide_usual leaves alone: rare, and apart from the rest, for which there are then
// registers.
template <DType kFrom, DType kTo>
__device__ __noinline__ void store_unusual(Chunk<static_cast<int>(size_of(kFrom))> chunk,
                                           float scale, std::byte* to) {
  const Divider divide(scale);
  float x[kChunk];
  decode_chunk<kFrom>(chunk, x);
#pragma unroll
  for (float& each : x) each = divide(each);
  store_chunk(kTo, x, to, 0);
}

template <DType kFrom, DType kTo>
__device__ void store_scaled(const Chunk<static_cast<int>(size_of(kFrom))>& chunk, float scale,
                             const Divider& divide, std::byte* to) {
  float x[kChunk];
  decode_chunk<kFrom, /*kNumbers=*/true>(chunk, x);
  if (divide.divide_usual(x)) {
    store_fp8_numbers(kTo, x, to);
  } else {
    store_unusual<kFrom, kTo>(chunk, scale, to);
  }
}

// A thread has a chunk of some tokens, blockDim.y apart; long tokens are several blocks', in
// blockIdx.y. Where input and cache have one type, the bytes are copied.
template <DType kFrom, DType kTo>
__global__ void __launch_bounds__(kMostThreads, kBlocksPerSm)
    update_kernel(const __grid_constant__ UpdateParams p) {
  constexpr int kTokens = tokens_of(kFrom);
  let_next_kernel_start();
  const auto chunk = static_cast<std::int32_t>(blockIdx.y * blockDim.x + threadIdx.x);
  const std::int64_t first = std::int64_t{blockIdx.x} * (blockDim.y * kTokens) + threadIdx.y;
  wait_for_earlier_kernels();
  if (chunk >= p.chunks_per_token) return;
  const Column column = Column::at<kFrom, kTo>(p, chunk);
  const std::int64_t step = blockDim.y * column.plane->from_token;
  const std::byte* from = column.from + first * column.plane->from_token;
  // Whether a token is skipped is not known yet: its bytes are on their way with its slot.
  std::int64_t slots[kTokens];
  Chunk<static_cast<int>(size_of(kFrom))> chunks[kTokens];
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    const std::int64_t token = first + i * blockDim.y;
    slots[i] = -1;
    if (token < p.num_slots) {
      slots[i] = p.slot_mapping[token];
      chunks[i].load(from + i * step);
    }
  }
  const float scale = kFrom == kTo ? 1.0F : scale_at(column.plane->scale, column.head);
  const bool scaled = column.plane->scale.data != nullptr;
  const Divider divide(scale);
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    if (slots[i] < 0 || slots[i] >= p.capacity) continue;
    std::byte* to = column.in_slot(p, slots[i]);
    if constexpr (kFrom == kTo) {
      chunks[i].store(to);
    } else if (is_fp8(kTo) && scaled) {
      store_scaled<kFrom, kTo>(chunks[i], scale, divide, to);
    } else {
      float x[kChunk];
      decode_chunk<kFrom>(chunks[i], x);
      store_chunk(kTo, x, to, 0);
    }
  }
}

using Kernel = void (*)(UpdateParams);

template <DType kFrom>
Kernel kernel_from(DType to) {
  switch (to) {
    case DType::kF32:
      return update_kernel<kFrom, DType::kF32>;
    case DType::kF16:
      return update_kernel<kFrom, DType::kF16>;
    case DType::kBF16:
      return update_kernel<kFrom, DType::kBF16>;
    case DType::kE5M2:
      return update_kernel<kFrom, DType::kE5M2>;
    default:
      return update_kernel<kFrom, DType::kE4M3>;
  }
}

Kernel kernel_of(DType from, DType to) {
  switch (from) {
    case DType::kF32:
      return kernel_from<DType::kF32>(to);
    case DType::kF16:
      return kernel_from<DType::kF16>(to);
    case DType::kBF16:
      return kernel_from<DType::kBF16>(to);
    default:
      // fp8 goes into its own type only, byte by byte.
      return update_kernel<DType::kE4M3, DType::kE4M3>;
  }
}

Plane plane_of(const ConstTensorView& from, const KvPlane& to, const ConstTensorView& scale) {
  Plane plane{};
  const std::int64_t from_bytes = size_of(from.dtype);
  const std::int64_t to_bytes = size_of(to.dtype);
  plane.from = static_cast<const std::byte*>(from.data);
  plane.from_token = from.strides[0] * from_bytes;
  plane.from_head = from.strides[1] * from_bytes;
  plane.to = static_cast<std::byte*>(to.data);
  plane.to_block = to.stride_block * to_bytes;
  plane.to_token = to.stride_token * to_bytes;
  plane.to_head = to.stride_head * to_bytes;
  plane.scale = vector_params(scale);
  plane.from_dtype = from.dtype;
  plane.to_dtype = to.dtype;
  plane.chunks_per_head = static_cast<std::int32_t>(from.shape[2] / kChunk);
  return plane;
}

void launch(UpdateParams p, bool keys, bool values, std::int64_t num_heads, const Gpu& gpu,
            cudaStream_t stream) {
  const std::int64_t of_keys = keys ? num_heads * p.planes[0].chunks_per_head : 0;
  const std::int64_t of_values = values ? num_heads * p.planes[1].chunks_per_head : 0;
  p.chunks_of_keys = static_cast<std::int32_t>(of_keys);
  p.chunks_per_token = static_cast<std::int32_t>(of_keys + of_values);
  // Short tokens share a block, long ones are several blocks'.
  const std::int64_t across = (p.chunks_per_token + kMostThreads - 1) / kMostThreads;
  const std::int64_t per_token = (p.chunks_per_token + across - 1) / across;
  const std::int64_t tokens = std::max<std::int64_t>(kMostThreads / per_token, 1);
  const Plane& plane = p.planes[keys ? 0 : 1];
  const std::int64_t per_block = tokens * tokens_of(plane.from_dtype);
  const dim3 grid(static_cast<unsigned>((p.num_slots + per_block - 1) / per_block),
                  static_cast<unsigned>(across));
  const dim3 block(static_cast<unsigned>(per_token), static_cast<unsigned>(tokens));
  launch_early(gpu, "update_cache", kernel_of(plane.from_dtype, plane.to_dtype), {grid, block},
               stream, p);
}

}  // namespace

void update_cache(const ConstTensorView& key, const ConstTensorView& value,
                  const KvCacheView& cache, const ConstTensorView& slot_mapping, const Gpu& gpu,
                  cudaStream_t stream) {
  if (slot_mapping.shape[0] == 0) return;
  UpdateParams p{};
  p.num_slots = slot_mapping.shape[0];
  p.planes[0] = plane_of(key, cache.key, cache.k_scale);
  p.planes[1] = plane_of(value, cache.value, cache.v_scale);
  p.slot_mapping = static_cast<const std::int64_t*>(slot_mapping.data);
  p.capacity = cache.num_blocks * cache.block_size;
  p.block_size = cache.block_size;
  p.block_shift = block_shift(cache.block_size);
  const bool together = key.dtype == value.dtype && cache.key.dtype == cache.value.dtype;
  if (together) {
    launch(p, true, true, cache.num_kv_heads, gpu, stream);
  } else {
    launch(p, true, false, cache.num_kv_heads, gpu, stream);
    launch(p, false, true, cache.num_kv_heads, gpu, stream);
  }
}

}  // namespace diffkv::cuda
