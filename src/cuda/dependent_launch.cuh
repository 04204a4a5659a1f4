// What a kernel that launch_early (launch.h) starts must do. No-ops below sm_90, where every kernel
// starts when the one before it has ended.
#pragma once

namespace diffkv::cuda {

// Returns when all kernels that the stream got before this one have ended, and what they wrote can
// be read. Every thread calls it before it reads or writes anything that an earlier kernel may
// write or read, and some thread of each kernel before it ends: whoever waits for this kernel waits
// so for those before it, too. Where each block of a kernel waits before it lets the next one
// start, the next one's start means that all before that kernel have ended: it may read what those
// wrote before it waits. If it has nothing to do with that kernel, nor with others of its kind
// between them, one of its blocks alone may call this, at its end.
__device__ inline void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel start once every block has called this or ended. It will wait for this
// kernel's end all the same, so the earlier the better.
__device__ inline void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace diffkv::cuda
