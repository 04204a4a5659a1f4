// What is computed: mask, scores, outputs; and the stages that compute it.
#pragma once

#include <cstdint>
#include <string>

#include "diffkv/batch.h"
#include "diffkv/cache.h"
#include "diffkv/tensor.h"

namespace diffkv {

class Backend;
class Plan;

// Which keys j a query at position p sees, always within 0 <= j < seq_len. Base: j <= p where
// causal, else all. AND one of chunk, prefix window, sliding window; OR the multimodal ranges.
// A width <= 0 is off. Chunk and prefix window replace the sliding window and exclude each other.
struct Mask {
  bool causal = true;
  // p - j < window, and where not causal also j - p < window.
  std::int32_t window = 0;
  // floor(p / chunk_size) - floor(j / chunk_size) <= chunk_lookback.
  std::int32_t chunk_size = 0;
  std::int32_t chunk_lookback = 0;
  // j < prefix_lens[seq] or p - j < prefix_window.
  std::int32_t prefix_window = 0;
  // Inside a multimodal range, also p - j < window (where window > 0).
  bool clamp_mm_ranges = false;

  friend bool operator==(const Mask&, const Mask&) = default;
};

// How the keys of a tile may be cut among workers.
enum class SchedulePolicy : std::uint8_t {
  kBalanced,  // equal shares of cost; bit for bit the same for the same batch and worker count
  kBatchInvariant,  // a sequence's output is bit for bit the same whatever else is in the batch
};

// Whether the sinks take part. `lse` and `output` always use the same denominator, so kOut leaves
// them out of both: a part that merge_attn_states completes.
enum class SinkMode : std::uint8_t { kIn, kOut };

// What a plan is made for. A call whose layer has another key is refused.
struct PlanKey {
  std::int64_t num_heads = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t head_size_qk = 0;  // 8 to 576, a multiple of 8
  std::int64_t head_size_v = 0;   // likewise
  DType query_dtype = DType::kBF16;
  DType key_dtype = DType::kBF16;    // as stored in the cache
  DType value_dtype = DType::kBF16;  // as stored in the cache
  Mask mask;
  bool causal_per_seq = false;  // the batch carries Batch::causal_per_seq
  bool mm_ranges = false;       // the batch carries Batch::mm_ranges
  SchedulePolicy policy = SchedulePolicy::kBalanced;

  // Query heads that share one KV head.
  std::int64_t group() const { return num_heads / num_kv_heads; }

  friend bool operator==(const PlanKey&, const PlanKey&) = default;
};

std::string to_string(const PlanKey& key);

// Everything about a problem that decides whether and how a backend runs it.
struct Problem {
  PlanKey key;
  DType output_dtype = DType::kBF16;  // fp32, fp16, bf16; e4m3 with output_scale
  KvCacheLayout layout = KvCacheLayout::kNHD;
  bool packed = true;  // K and V in one row
  bool dense = false;  // no block table
  std::int64_t block_size = 16;
  // Bytes that every row of query, cache and output starts at a multiple of: 16, or 8 (which the
  // contract allows fp8 rows).
  std::int64_t row_alignment = 16;
  bool soft_cap = false;
  bool alibi = false;
  bool alibi_sqrt = false;
  bool qq_bias = false;
  bool sinks = false;
  bool lse = false;
  bool output_scale = false;
  bool output_block_scale = false;
  bool kv_scale_per_head = false;
};

// A layer's constants. Tensors are read when the kernels run and must outlive the call.
struct AttentionParams {
  float scale = 1.0F;     // scores are scale * q_scale * k_scale * (q . k)
  float soft_cap = 0.0F;  // cap * tanh(s / cap), before mask and biases; <= 0: none
  // fp32 [num_heads]: + slope * (j - context_len), or with alibi_sqrt - slope * sqrt(p - j) for
  // j <= p and 0 beyond.
  ConstTensorView alibi_slopes;
  bool alibi_sqrt = false;
  // fp32 or bf16 [n, n], shared by heads and sequences: added at [i, j - context_len], 0 outside;
  // -inf masks.
  ConstTensorView qq_bias;
  // fp32, fp16 or bf16 [num_heads]: a raw logit whose exp joins the denominator; -inf = none.
  ConstTensorView sinks;
  ConstTensorView q_scale;       // fp32 [1]; only with e4m3 queries
  ConstTensorView output_scale;  // fp32 [1]; output is then e4m3: sat_e4m3(o / output_scale)
  // Per-block output scales (fp4, mxfp8) are refused for now; giving one is an error.
  ConstTensorView output_block_scale;
  SinkMode sink_mode = SinkMode::kIn;
};

// The tensors of one call of attend.
struct AttendArgs {
  ConstTensorView query;  // [num_tokens, num_heads, head_size_qk], last dim contiguous
  KvCacheView cache;
  Batch batch;
  TensorView output;  // [num_tokens, num_heads, head_size_v], last dim contiguous
  TensorView lse;     // optional fp32 [num_heads, num_tokens], natural log
};

// Writes key [n, num_kv_heads, head_size_qk] and value [n, num_kv_heads, head_size_v] of the first
// slot_mapping.shape[0] tokens into the cache. slot_mapping: int64, page * block_size + offset;
// negative slots are skipped. Nothing else in the cache changes. fp8 caches get
// e4m3(x / scale), computed in fp32, rounded to nearest even and saturated; NaN stays NaN; inputs
// already in the cache's fp8 type are copied. If a slot occurs twice the later token wins on the
// CPU; on a GPU, whose threads write in no order, each 8 elements are one of the tokens'. There
// slots past the pool are skipped, too. Throws Error before anything is written.
void update_cache(const Backend& backend, const ConstTensorView& key, const ConstTensorView& value,
                  const KvCacheView& cache, const ConstTensorView& slot_mapping,
                  Stream stream = {});

// Attention of args.query over the cache by the plan. `lse` and `output` share one denominator.
// A row that sees no key, or only -inf, gives zeros (and lse = its sink, or -inf).
// Throws Error before anything is written.
void attend(const Backend& backend, const AttentionParams& params, const AttendArgs& args,
            const Plan& plan, Stream stream = {});

// One part of a split attention: output [num_tokens, num_heads, head_size_v] and its lse
// [num_heads, num_tokens] fp32.
struct AttnState {
  ConstTensorView output;
  ConstTensorView lse;
};

// Merges two parts over disjoint keys into output (and lse if given; both may alias a part's).
// Parts are without sinks; a sink, if given, is added once. An lse of +inf is read as -inf; two
// empty parts give zeros and -inf (or the sink's). Throws Error before anything is written.
//   out = (a.out exp(a.lse - m) + b.out exp(b.lse - m)) / (exp(a.lse - m) + exp(b.lse - m))
void merge_attn_states(const Backend& backend, const AttnState& a, const AttnState& b,
                       const ConstTensorView& sinks, const TensorView& output,
                       const TensorView& lse = {}, Stream stream = {});

// Fills the output with zeros: what a profiling run without metadata gets.
void fill_zero(const Backend& backend, const TensorView& output, Stream stream = {});

}  // namespace diffkv
