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
constexpr int kTokens = 4;  // of a thread at a time
// Resident; so that enough threads wait for memory.
constexpr int kBlocksPerSm = 3;

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
  std::int64_t slot_stride;
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
};

// The tokens of a thread, kTokens of them, blockDim.y apart.
class Tokens {
 public:
  __device__ explicit Tokens(const UpdateParams& p) : p_(p) {
    first_ = std::int64_t{blockIdx.x} * (blockDim.y * kTokens) + threadIdx.y;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const std::int64_t token = first_ + i * blockDim.y;
      const std::int64_t slot = token < p.num_slots ? p.slot_mapping[token * p.slot_stride] : -1;
      slots_[i] = slot < p.capacity ? slot : -1;
    }
  }

  __device__ bool skipped(int i) const { return slots_[i] < 0; }

  __device__ const std::byte* from(const Column& column, int i) const {
    return column.from + (first_ + i * blockDim.y) * column.plane->from_token;
  }

  __device__ std::byte* to(const Column& column, int i) const {
    const std::int64_t block =
        p_.block_shift >= 0 ? slots_[i] >> p_.block_shift : slots_[i] / p_.block_size;
    const std::int64_t offset = slots_[i] - block * p_.block_size;
    return column.to + block * column.plane->to_block + offset * column.plane->to_token;
  }

 private:
  const UpdateParams& p_;
  std::int64_t first_;
  std::int64_t slots_[kTokens];  // -1: skipped
};

// Where input and cache have one type, the bytes are copied.
template <DType kFrom, DType kTo>
__global__ void __launch_bounds__(kMostThreads, kBlocksPerSm)
    update_kernel(const __grid_constant__ UpdateParams p) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const Tokens tokens(p);
  // Long tokens are several blocks', in blockIdx.y.
  const auto step = static_cast<std::int32_t>(gridDim.y * blockDim.x);
  for (auto chunk = static_cast<std::int32_t>(blockIdx.y * blockDim.x + threadIdx.x);
       chunk < p.chunks_per_token; chunk += step) {
    const Column column = Column::at<kFrom, kTo>(p, chunk);
    Chunk<static_cast<int>(size_of(kFrom))> chunks[kTokens];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (!tokens.skipped(i)) chunks[i].load(tokens.from(column, i));
    }
    if constexpr (kFrom == kTo) {
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        if (!tokens.skipped(i)) chunks[i].store(tokens.to(column, i));
      }
    } else {
      const bool scaled = column.plane->scale.data != nullptr;
      const Divider divide(scale_at(column.plane->scale, column.head));
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        if (tokens.skipped(i)) continue;
        float x[kChunk];
        decode_chunk<kFrom>(chunks[i], x);
        if (scaled) divide.all(x);
        store_chunk(kTo, x, tokens.to(column, i), 0);
      }
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
  constexpr std::int64_t kMostAcross = 65535;
  const std::int64_t across = (p.chunks_per_token + kMostThreads - 1) / kMostThreads;
  const std::int64_t per_token = (p.chunks_per_token + across - 1) / across;
  const std::int64_t tokens = std::max<std::int64_t>(kMostThreads / per_token, 1);
  const std::int64_t per_block = tokens * kTokens;
  const dim3 grid(static_cast<unsigned>((p.num_slots + per_block - 1) / per_block),
                  static_cast<unsigned>(std::min(across, kMostAcross)));
  const dim3 block(static_cast<unsigned>(per_token), static_cast<unsigned>(tokens));
  const Plane& plane = p.planes[keys ? 0 : 1];
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
  p.slot_stride = slot_mapping.strides[0];
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
