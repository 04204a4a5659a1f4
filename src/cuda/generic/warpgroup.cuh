// Products by wgmma: four warps multiply 64 rows of registers with keys or values that stay in
// shared memory, which is read once for all rows. Only sm_90a has it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/generic/ptx.cuh"
#include "cuda/generic/tile.h"

namespace diffkv::cuda::mma {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define DIFFKV_WGMMA(...) asm volatile(__VA_ARGS__)
#else
#define DIFFKV_WGMMA(...)
#endif

// Between the last change of registers or shared memory and the first product.
__device__ inline void begin_products() { DIFFKV_WGMMA("wgmma.fence.sync.aligned;" ::: "memory"); }

// Waits for all products since begin_products().
__device__ inline void end_products() {
  DIFFKV_WGMMA("wgmma.commit_group.sync.aligned;" ::: "memory");
  DIFFKV_WGMMA("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// A matrix in shared memory whose rows of 128 bytes are permuted as tensor copies permute them, in
// groups of 8 rows 1024 bytes apart: `address` is that of its first row, or so many bytes into it.
__device__ inline std::uint64_t matrix_at(std::uint32_t address) {
  constexpr std::uint64_t kSwizzle128 = std::uint64_t{1} << 62;
  constexpr std::uint64_t kGroups = std::uint64_t{1024 / 16} << 32;
  constexpr std::uint64_t kUnused = std::uint64_t{1} << 16;
  return kSwizzle128 | kGroups | kUnused | ((address & 0x3ffffU) >> 4);
}

// d (+)= a x b for 16 keys: b has a key a row, 16 columns of them.
template <class Element>
__device__ inline void multiply_16_keys(float (&d0)[4], float (&d1)[4], const std::uint32_t (&a)[4],
                                        std::uint64_t b, bool adds) {
#define DIFFKV_KEYS(type)                                                                          \
  DIFFKV_WGMMA(                                                                                    \
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %13, 0;\n\t"                                           \
      "wgmma.mma_async.sync.aligned.m64n16k16.f32." type "." type                                  \
      " {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, p, 1, 1, 0;\n\t}"               \
      : "+f"(d0[0]), "+f"(d0[1]), "+f"(d0[2]), "+f"(d0[3]), "+f"(d1[0]), "+f"(d1[1]), "+f"(d1[2]), \
        "+f"(d1[3])                                                                                \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds ? 1 : 0))
  if constexpr (std::is_same_v<Element, __half>) {
    DIFFKV_KEYS("f16");
  } else {
    DIFFKV_KEYS("bf16");
  }
#undef DIFFKV_KEYS
}

// d += a x b for 64 columns of 16 keys' values: b has a key a row, too.
template <class Element>
__device__ inline void add_64_columns(float (*d)[4], const std::uint32_t (&a)[4], std::uint64_t b) {
#define DIFFKV_VALUES(type)                                                                  \
  DIFFKV_WGMMA("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                   \
               " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"     \
               " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30," \
               " %31}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"                               \
               : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]),  \
                 "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]),  \
                 "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]),  \
                 "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]),  \
                 "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), "+f"(d[6][0]),  \
                 "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]),  \
                 "+f"(d[7][2]), "+f"(d[7][3])                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
  if constexpr (std::is_same_v<Element, __half>) {
    DIFFKV_VALUES("f16");
  } else {
    DIFFKV_VALUES("bf16");
  }
#undef DIFFKV_VALUES
}

#undef DIFFKV_WGMMA

}  // namespace diffkv::cuda::mma
