// Marks functions that both host and CUDA device code call.
#pragma once

#ifdef __CUDACC__
#define DIFFKV_HD __host__ __device__
// Not copied to where they are called: a kernel that runs once, in one block, waits for most of its
// instructions to come from memory.
#define DIFFKV_HD_APART __host__ __device__ __noinline__
#else
#define DIFFKV_HD
#define DIFFKV_HD_APART
#endif
