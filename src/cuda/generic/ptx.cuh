// The instructions that CUDA C++ has no name for. One function an instruction; sm_80 and later.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>

namespace diffkv::cuda::ptx {

// The target's compute capability is kMajor.x.
#if defined(__CUDA_ARCH__)
inline constexpr int kMajor = __CUDA_ARCH__ / 100;
#else
inline constexpr int kMajor = 0;
#endif

// Whether the target has copies of boxes of tensors that complete on barriers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
inline constexpr bool kTensorCopies = true;
#else
inline constexpr bool kTensorCopies = false;
#endif

__device__ inline std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

// A value that the compiler knows nothing of, so that it makes one copy of what depends on it.
__device__ inline bool opaque(bool x) {
  std::uint32_t value = x ? 1 : 0;
  asm volatile("" : "+r"(value));
  return value != 0;
}

// --- barriers in shared memory -------------------------------------------------------------------

using Barrier = std::uint64_t;

__device__ inline void init(Barrier* barrier, std::uint32_t arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
}

__device__ inline void arrive(Barrier* barrier) {
  [[maybe_unused]] std::uint64_t state;
  asm volatile("mbarrier.arrive.shared.b64 %0, [%1];"
               : "=l"(state)
               : "r"(shared_address(barrier))
               : "memory");
}

// Arrives, and lets the phase wait for that many bytes of tensor copies too.
__device__ inline void arrive_expecting(Barrier* barrier, std::uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
#endif
}

// Arrives once this thread's copies of copy_async have landed.
__device__ inline void arrive_after_copies(Barrier* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Whether the phase of that parity has ended.
__device__ inline bool has_ended(Barrier* barrier, std::uint32_t parity) {
  std::uint32_t done;
  asm volatile(
      "{\n\t.reg .pred p;\n\t"
      "mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n\t"
      "selp.u32 %0, 1, 0, p;\n\t}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

// Waits for the end of the phase of that parity.
__device__ inline void wait(Barrier* barrier, std::uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  const std::uint32_t address = shared_address(barrier);
  std::uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(address), "r"(parity)
        : "memory");
  }
#else
  while (!has_ended(barrier, parity)) {
  }
#endif
}

// Makes the barriers' initialisation visible to the copy engine.
__device__ inline void fence_barrier_init() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Orders this thread's plain writes to shared memory before later tensor copies over them.
__device__ inline void fence_before_tensor_copies() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Sets the registers that each thread of this warp and its three neighbours may use; all of them
// call it. Only where a GPU has it: elsewhere every thread keeps what the kernel started with.
template <int kRegisters>
__device__ inline void take_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ inline void leave_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// A barrier of `threads` threads of the block; `id` 1 to 15.
__device__ inline void sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The same; returns whether `x` was true of any thread.
__device__ inline bool any(int id, int threads, bool x) {
  std::uint32_t result;
  asm volatile(
      "{\n\t.reg .pred p, q;\n\t"
      "setp.ne.u32 p, %3, 0;\n\t"
      "bar.red.or.pred q, %1, %2, p;\n\t"
      "selp.u32 %0, 1, 0, q;\n\t}"
      : "=r"(result)
      : "r"(id), "r"(threads), "r"(x ? 1 : 0)
      : "memory");
  return result != 0;
}

// Counts the warp in without waiting for the others.
__device__ inline void arrive_at(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// --- copies to shared memory ---------------------------------------------------------------------

// What the second-level cache is told of lines that are read: to evict them first, or not to change
// their turn, which is nearly as good as no hint where one instruction has to say either. ("As
// usual", evict_normal, is not: such lines are of a class of their own, and read slower.)
template <bool kEvictFirst>
__device__ inline std::uint64_t read_policy() {
  std::uint64_t policy = 0;
#if __CUDA_ARCH__ >= 900
  if constexpr (kEvictFirst) {
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  } else {
    asm("createpolicy.fractional.L2::evict_unchanged.b64 %0, 1.0;" : "=l"(policy));
  }
#endif
  return policy;
}

// A box of the tensor that `map` (a CUtensorMap) describes, at column `c`, token `t`, slab `s`,
// head `h` and page `p`. What is outside the tensor is filled with zeros and counts as bytes, too.
__device__ inline void copy_box(std::uint32_t to, const void* map, std::int32_t c, std::int32_t t,
                                std::int32_t s, std::int32_t h, std::int32_t p, Barrier* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5, %6}], [%7];" ::"r"(to),
      "l"(map), "r"(c), "r"(t), "r"(s), "r"(h), "r"(p), "r"(shared_address(barrier))
      : "memory");
#endif
}

// The same with a read_policy().
__device__ inline void copy_box(std::uint32_t to, const void* map, std::int32_t c, std::int32_t t,
                                std::int32_t s, std::int32_t h, std::int32_t p, Barrier* barrier,
                                std::uint64_t policy) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%2, %3, %4, %5, %6}], [%7], %8;" ::"r"(to),
      "l"(map), "r"(c), "r"(t), "r"(s), "r"(h), "r"(p), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
#endif
}

__device__ inline void prefetch_map(const void* map) {
#if __CUDA_ARCH__ >= 900
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

// 16 bytes, not by way of L1.
__device__ inline void copy_async(std::uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to),
               "l"(__cvta_generic_to_global(from))
               : "memory");
}

// --- words that blocks meet at -------------------------------------------------------------------

// Adds to a word of global memory; what this thread, and those it met at a barrier, wrote before is
// seen by who looks at the sum, and by those that meet it at a barrier then; and what those wrote
// who added before by this thread.
__device__ inline unsigned long long add_and_meet(unsigned long long* word, unsigned long long x) {
  unsigned long long before;
  asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], %2;"
               : "=l"(before)
               : "l"(__cvta_generic_to_global(word)), "l"(x)
               : "memory");
  return before;
}

__device__ inline unsigned long long look_at(const unsigned long long* word) {
  unsigned long long x;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];"
               : "=l"(x)
               : "l"(__cvta_generic_to_global(word))
               : "memory");
  return x;
}

// For some 200 ns.
__device__ inline void pause() { asm volatile("nanosleep.u32 200;" ::: "memory"); }

// --- stores to global memory ---------------------------------------------------------------------

// 4, 8 or 16 bytes.
template <std::size_t kWords>
__device__ inline void store(void* to, const std::uint32_t (&words)[kWords]) {
  if constexpr (kWords == 1) *static_cast<std::uint32_t*>(to) = words[0];
  if constexpr (kWords == 2) *static_cast<uint2*>(to) = make_uint2(words[0], words[1]);
  if constexpr (kWords == 4) {
    *static_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// --- matrices of 8 x 8 16-bit elements -----------------------------------------------------------

// Four matrices: lane i gives the address of row i % 8 of matrix i / 8 and gets, of each matrix,
// the elements 2 (i % 4), 2 (i % 4) + 1 of row i / 4.
__device__ inline void load_matrices(std::uint32_t (&m)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}

// The same of the transposed matrices.
__device__ inline void load_matrices_transposed(std::uint32_t (&m)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8], of T = __half or __nv_bfloat16, fp32 sums. Lane i holds rows
// i / 4 and i / 4 + 8 of a and c and column i / 4 of b.
template <class T>
__device__ inline void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                    std::uint32_t b1);

template <>
__device__ inline void multiply_add<__half>(float (&c)[4], const std::uint32_t (&a)[4],
                                            std::uint32_t b0, std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ inline void multiply_add<__nv_bfloat16>(float (&c)[4], const std::uint32_t (&a)[4],
                                                   std::uint32_t b0, std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// --- numbers -------------------------------------------------------------------------------------

__device__ inline float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The highest bit that is set.
__device__ inline std::int32_t log2(std::int32_t x) {
  std::int32_t y;
  asm("bfind.u32 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

__device__ inline float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats as T in one register, `low` in the lower half.
template <class T>
__device__ inline std::uint32_t pack(float low, float high);

template <>
__device__ inline std::uint32_t pack<__half>(float low, float high) {
  std::uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <>
__device__ inline std::uint32_t pack<__nv_bfloat16>(float low, float high) {
  std::uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

}  // namespace diffkv::cuda::ptx
