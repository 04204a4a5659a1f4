// Marks functions that both host and CUDA device code call.
#pragma once

#ifdef __CUDACC__
#define DIFFKV_HD __host__ __device__
#else
#define DIFFKV_HD
#endif
