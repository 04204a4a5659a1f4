// Products by wgmma: four warps multiply 64 rows of registers with keys or values that stay in
// shared memory, which is read once for all rows. Only sm_90a has it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/generic/ptx.cuh"
#include "cuda/generic/racecheck.h"
#include "cuda/generic/shared.cuh"
#include "cuda/generic/tile.h"

namespace diffkv::cuda::mma {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ / 100 == 9 && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "code for compute capability 9.0 has to be compiled for 90a"
#endif
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define DIFFKV_WGMMA(...) asm volatile(__VA_ARGS__)
#else
#define DIFFKV_WGMMA(...)
#endif

// Where the warps of a warpgroup meet.
class Together {
 public:
  __device__ explicit Together(RacecheckMemory* memory) : memory_(memory) {}
  static __device__ void make_ready(RacecheckMemory& memory) {
    for (ptx::Barrier& barrier : memory.together) ptx::init(&barrier, kThreads);
  }

  __device__ void sync(int warp) {
    if constexpr (kForRacecheck) {
      ptx::Barrier* barrier = memory_->together + warp / kWarps;
      ptx::arrive(barrier);
      ptx::wait(barrier, parity_);
      parity_ ^= 1U;
    } else {
      ptx::sync(kTogetherBarrier + warp / kWarps, kThreads);
    }
  }

  // The same; returns whether `x` was true of any thread.
  __device__ bool any(int warp, bool x) {
    if constexpr (kForRacecheck) {
      auto& found = memory_->found[warp / kWarps];
      const bool of_warp = __any_sync(0xffffffffU, x);
      if (threadIdx.x % kWarp == 0) found[warp % kWarps] = of_warp;
      sync(warp);
      const bool of_all = (found[0] | found[1] | found[2] | found[3]) != 0;
      sync(warp);
      return of_all;
    } else {
      return ptx::any(kTogetherBarrier + warp / kWarps, kThreads, x);
    }
  }

 private:
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarp;

  RacecheckMemory* memory_;
  std::uint32_t parity_ = 0;
};

// Between the last change of registers or shared memory and the first product.
__device__ inline void begin_products() { DIFFKV_WGMMA("wgmma.fence.sync.aligned;" ::: "memory"); }

// Waits for all products since begin_products().
__device__ inline void end_products() {
  DIFFKV_WGMMA("wgmma.commit_group.sync.aligned;" ::: "memory");
  DIFFKV_WGMMA("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// Keeps what is done with operands before begin_products(), and with results after end_products():
// products run while the program goes on, of which the compiler knows nothing.
template <int kTiles>
__device__ inline void hold(float (&d)[kTiles][4]) {
#pragma unroll
  for (auto& tile : d) {
#pragma unroll
    for (float& x : tile) DIFFKV_WGMMA("" : "+f"(x)::"memory");
  }
}
template <int kSteps>
__device__ inline void hold(std::uint32_t (&a)[kSteps][4]) {
#pragma unroll
  for (auto& step : a) {
#pragma unroll
    for (std::uint32_t& x : step) DIFFKV_WGMMA("" : "+r"(x)::"memory");
  }
}

// Matrices in shared memory whose rows of 128 bytes are permuted as tensor copies permute them, in
// groups of 8 rows. They are described in registers that a warp shares, from where products take
// them: each would wait for one that has to be brought there.
class Matrices {
 public:
  // Counted from `address`, the same for all lanes.
  __device__ explicit Matrices(std::uint32_t address)
      : first_(__shfl_sync(0xffffffffU, address >> 4 | kUnused, 0)) {}

  // The one whose first row, or so many bytes into it, is `bytes` behind; its groups are kApart
  // bytes apart.
  template <int kApart = 1024>
  __device__ std::uint64_t at(std::uint32_t bytes) const {
    static_assert(kApart % 1024 == 0 && kApart < 1 << 18);
    constexpr std::uint64_t kSwizzle128 = std::uint64_t{1} << 62;
    constexpr std::uint64_t kGroups = std::uint64_t{kApart / 16} << 32;
    return kSwizzle128 | kGroups | (first_ + (bytes >> 4));
  }

 private:
  static constexpr std::uint32_t kUnused = 1U << 16;

  std::uint32_t first_;
};

#define DIFFKV_EIGHT(d, i)                                                       \
  "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3]), "+f"(d[i + 1][0]), \
      "+f"(d[i + 1][1]), "+f"(d[i + 1][2]), "+f"(d[i + 1][3])
#define DIFFKV_PRODUCT(type, transposed)                                                  \
  DIFFKV_WGMMA(                                                                           \
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %37, 0;\n\t"                                  \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                         \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"           \
      " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}," \
      " {%32, %33, %34, %35}, %36, p, 1, 1, " transposed ";\n\t}"                         \
      : DIFFKV_EIGHT(d, 0), DIFFKV_EIGHT(d, 2), DIFFKV_EIGHT(d, 4), DIFFKV_EIGHT(d, 6)    \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds ? 1 : 0))

#define DIFFKV_FOUR(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define DIFFKV_PRODUCT_32(type)                                                    \
  DIFFKV_WGMMA(                                                                    \
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %21, 0;\n\t"                           \
      "wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type                  \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15},"   \
      " {%16, %17, %18, %19}, %20, p, 1, 1, 0;\n\t}"                               \
      : DIFFKV_FOUR(d, 0), DIFFKV_FOUR(d, 2), DIFFKV_FOUR(d, 4), DIFFKV_FOUR(d, 6) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds ? 1 : 0))

// d (+)= a x b in 64 columns of d; b has a key a row: 64 keys with 16 columns each or, if it is
// transposed, 16 keys with 64 columns of their values.
template <class Element, bool kTransposed>
__device__ inline void multiply_64(float (*d)[4], const std::uint32_t (&a)[4], std::uint64_t b,
                                   bool adds) {
  constexpr bool kHalf = std::is_same_v<Element, __half>;
  if constexpr (kHalf && kTransposed) {
    DIFFKV_PRODUCT("f16", "1");
  } else if constexpr (kHalf) {
    DIFFKV_PRODUCT("f16", "0");
  } else if constexpr (kTransposed) {
    DIFFKV_PRODUCT("bf16", "1");
  } else {
    DIFFKV_PRODUCT("bf16", "0");
  }
}

// d (+)= a x b in every second 8 of 64 columns of d: b has a key a row, every second 8 keys of 64.
template <class Element>
__device__ inline void multiply_every_second_8(float (*d)[4], const std::uint32_t (&a)[4],
                                               std::uint64_t b, bool adds) {
  if constexpr (std::is_same_v<Element, __half>) {
    DIFFKV_PRODUCT_32("f16");
  } else {
    DIFFKV_PRODUCT_32("bf16");
  }
}

#undef DIFFKV_PRODUCT_32
#undef DIFFKV_FOUR
#undef DIFFKV_PRODUCT
#undef DIFFKV_EIGHT
#undef DIFFKV_WGMMA

}  // namespace diffkv::cuda::mma
