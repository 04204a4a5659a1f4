#include "cuda/tensor_maps.h"

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/device.h"
#include "diffkv/tensor.h"

namespace diffkv::cuda {
namespace {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                 const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                 const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// From the driver, which the library is not linked with; null where it has none.
EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                                12000, cudaEnableDefault, &result);
#else
    const cudaError_t status =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    if (status != cudaSuccess || result != cudaDriverEntryPointSuccess) found = nullptr;
    return reinterpret_cast<EncodeTiled>(found);
  }();
  return function;
}

constexpr std::int64_t kMostStride = (std::int64_t{1} << 40) - 1;

// Strides of dimensions of size 1 mean nothing and may be odd.
bool set_stride(cuuint64_t& to, std::int64_t size, std::int64_t stride, std::int64_t element) {
  const std::int64_t bytes = size == 1 ? 16 : stride * element;
  to = static_cast<cuuint64_t>(bytes);
  return bytes >= 0 && bytes <= kMostStride && bytes % 16 == 0;
}

bool encode(PlaneMap& plane, const AttendKernelParams& params, const PlaneParams& from,
            std::int32_t head_size, std::int32_t slabs, std::int32_t box_keys,
            const BoxShape& shape) {
  const auto element = static_cast<std::int64_t>(size_of(from.dtype));
  const std::int64_t slab_bytes = shape.slab_columns * element;
  const bool whole_slabs = head_size % shape.slab_columns == 0;
  const std::int32_t heads = params.schedule.num_kv_heads;
  const bool one_copy = whole_slabs && box_keys == shape.group_keys;
  plane.copies = one_copy ? 1 : slabs;
  plane.heads_apart = one_copy ? 1 : shape.heads;
  plane.column_step = whole_slabs ? 0 : shape.slab_columns;
  plane.slab_step = whole_slabs ? 1 : 0;
  const cuuint64_t dims[5] = {
      static_cast<cuuint64_t>(whole_slabs ? shape.slab_columns : head_size),
      static_cast<cuuint64_t>(params.block_size),
      static_cast<cuuint64_t>(whole_slabs ? head_size / shape.slab_columns : 1),
      static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(params.num_blocks)};
  cuuint64_t strides[4];
  const bool legal = set_stride(strides[0], params.block_size, from.stride_token, element) &&
                     set_stride(strides[1], 2, shape.slab_columns, element) &&
                     set_stride(strides[2], heads, from.stride_head, element) &&
                     set_stride(strides[3], params.num_blocks, from.stride_block, element);
  if (!legal || reinterpret_cast<std::uintptr_t>(from.data) % 16 != 0) return false;
  const cuuint32_t box[5] = {static_cast<cuuint32_t>(shape.slab_columns),
                             static_cast<cuuint32_t>(box_keys),
                             static_cast<cuuint32_t>(one_copy ? slabs : 1),
                             static_cast<cuuint32_t>(one_copy ? shape.heads : 1), 1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  CUtensorMapDataType type = CU_TENSOR_MAP_DATA_TYPE_UINT8;
  if (from.dtype == DType::kBF16) type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  if (from.dtype == DType::kF16) type = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUtensorMapSwizzle swizzle =
      slab_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  return encode_tiled()(&plane.map, type, 5, const_cast<std::byte*>(from.data), dims, strides, box,
                        steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace

KvMaps kv_maps(const AttendKernelParams& params, const BoxShape& shape) {
  KvMaps maps{};
  const auto in_pages = [&](std::int32_t keys) {
    return params.block_table == nullptr || params.block_size % keys == 0;
  };
  maps.box_keys = shape.group_keys;
  while (maps.box_keys > shape.least_keys && !in_pages(maps.box_keys)) maps.box_keys /= 2;
  maps.usable = encode_tiled() != nullptr && in_pages(maps.box_keys) &&
                encode(maps.key, params, params.key, params.head_size_qk, shape.key_slabs,
                       maps.box_keys, shape) &&
                encode(maps.value, params, params.value, params.head_size_v, shape.value_slabs,
                       maps.box_keys, shape);
  return maps;
}

}  // namespace diffkv::cuda
