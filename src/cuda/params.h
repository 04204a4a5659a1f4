// What crosses from host to device for attention: plain pointers, strides and numbers, made once a
// call from (AttentionParams, AttendArgs, Plan) and passed by value as a kernel's
// `const __grid_constant__` argument. Strides are in elements. Every pointer is device memory.
//
// The plan's tables (schedule.tables) hold lengths made safe by the device planner: query_start_loc
// never falls and stays within max_tokens, seq_lens within max_seq_len. All other device data is
// untrusted and may change between replays of a graph, so kernels
//  - neither read nor write rows of tokens at or past schedule.tables.num_tokens,
//  - clamp logical blocks to max_blocks - 1 and page ids to num_blocks - 1,
//  - clamp dense key tokens to block_size - 1.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "diffkv/attention.h"
#include "diffkv/plan.h"
#include "diffkv/tensor.h"
#include "plan/schedule.h"

namespace diffkv::cuda {

// Rows [num_tokens, num_heads, head size]; elements of a row are neighbours, rows start at
// multiples of min(16, 8 x element bytes) bytes.
struct RowsParams {
  std::byte* data;
  std::int64_t stride_token;
  std::int64_t stride_head;
  DType dtype;
};

// K or V of the cache: [num_blocks, block_size, num_kv_heads, head size], rows as above.
struct PlaneParams {
  const std::byte* data;
  std::int64_t stride_block;
  std::int64_t stride_token;
  std::int64_t stride_head;
  DType dtype;
};

// A vector of `dtype`, or null where the tensor is not given.
struct VectorParams {
  const void* data;
  std::int64_t stride;  // 0: one element for all
  DType dtype;
};

struct AttendKernelParams {
  plan::ScheduleView schedule;

  RowsParams query;   // [num_tokens, num_heads, head_size_qk], only read
  RowsParams output;  // [num_tokens, num_heads, head_size_v]
  float* lse;         // [num_heads, num_tokens] or null
  std::int64_t lse_stride_head;
  std::int64_t lse_stride_token;

  PlaneParams key;
  PlaneParams value;
  std::int32_t head_size_qk;
  std::int32_t head_size_v;
  std::int32_t num_blocks;          // pages of the pool
  std::int32_t block_size;          // tokens of a page; of a dense cache: all tokens
  std::int32_t block_shift;         // log2(block_size), or -1
  std::int32_t max_blocks;          // width of the block table
  const std::int32_t* block_table;  // [num_seqs, max_blocks], rows contiguous; null: dense
  std::int64_t block_table_stride;  // from one sequence to the next
  const std::int32_t* kv_start;     // dense: [num_seqs], the sequence's first key's token
  std::int64_t kv_start_stride;

  // Whether the attention kernel merges cut tiles itself, instead of combine.
  bool merges_tiles;
  // Kernels of several tile classes of one attend work on different tiles, and so may run side by
  // side: one after a sibling waits for it only at its end, by one of its blocks.
  bool after_sibling;

  float scale;
  float soft_cap;  // 0: none
  bool alibi_sqrt;
  VectorParams alibi_slopes;  // fp32 [num_heads]
  VectorParams sinks;         // fp32, fp16 or bf16 [num_heads]; null also where sinks are left out
  VectorParams q_scale;       // fp32 [1]
  VectorParams k_scale;       // fp32 [num_kv_heads] or one
  VectorParams v_scale;       // likewise
  VectorParams output_scale;  // fp32 [1]
  const void* qq_bias;        // fp32 or bf16 [qq_bias_size, qq_bias_size] or null
  std::int64_t qq_bias_stride_row;
  std::int64_t qq_bias_stride_column;
  std::int32_t qq_bias_size;
  DType qq_bias_dtype;
};

static_assert(std::is_trivially_copyable_v<AttendKernelParams>);
static_assert(sizeof(AttendKernelParams) <= 2048, "kernel parameters have 4 KB in all");

RowsParams rows_params(const ConstTensorView& view);      // of [num_tokens, num_heads, head size]
VectorParams vector_params(const ConstTensorView& view);  // of a vector, given or not
std::int32_t block_shift(std::int64_t block_size);        // log2, or -1 if it is no power of two

AttendKernelParams attend_kernel_params(const AttentionParams& params, const AttendArgs& args,
                                        const Plan& plan);

}  // namespace diffkv::cuda
