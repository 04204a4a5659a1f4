#include "verify/generate.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "verify/codec.h"

namespace diffkv::verify {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
// Standard deviation of scores: the largest of a thousand has most of the weight.
constexpr double kPeak = 2.5;
constexpr double kQScale = 0.03;
constexpr double kOutputScale = 0.0125;
constexpr std::int64_t kMaxRanges = 3;

std::uint64_t mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15U;
  x = (x ^ (x >> 30U)) * 0xbf58476d1ce4e5b9U;
  x = (x ^ (x >> 27U)) * 0x94d049bb133111ebU;
  return x ^ (x >> 31U);
}

}  // namespace

std::vector<double> alibi_slopes(std::int64_t num_heads) {
  std::vector<double> slopes;
  for (std::int64_t i = 1; i <= num_heads; ++i) {
    slopes.push_back(std::exp2(-8.0 * static_cast<double>(i) / static_cast<double>(num_heads)));
  }
  return slopes;
}

std::uint64_t Random::next() { return state_ = mix(state_); }

double Random::uniform() { return std::ldexp(static_cast<double>(next() >> 11U), -53); }

// The sum of four uniform numbers of variance 1/12, scaled to variance 1.
double Random::normal() {
  const std::uint64_t bits = next();
  double sum = -2;
  for (unsigned shift = 0; shift < 64; shift += 16) {
    sum += std::ldexp(static_cast<double>((bits >> shift) & 0xffffU) + 0.5, -16);
  }
  return sum * std::sqrt(3.0);
}

std::int64_t Random::below(std::int64_t end) {
  return static_cast<std::int64_t>(next() % static_cast<std::uint64_t>(end));
}

GeneratedProblem::GeneratedProblem(Case c, std::uint64_t seed)
    : case_(std::move(c)), seed_(seed), random_(mix(seed)) {
  make_batch();
  make_mask_data();
  make_rows();
  make_outputs();
  make_params();
  if (case_.cache == CaseCache::kDense) {
    make_dense();
  } else {
    make_pools();
    make_block_table();
  }
  make_scales();
  poison_cache();
  write_context();
  if (case_.cache != CaseCache::kDense && case_.flow != CaseFlow::kSharing) make_slots();
  for (const auto& memory : buffers_) memory->freeze();
}

GuardedBuffer& GeneratedProblem::new_buffer(const std::string& name, std::int64_t bytes,
                                            DType dtype) {
  const std::int64_t misalign =
      case_.least_alignment ? std::min<std::int64_t>(16, 8 * size_of(dtype)) : 0;
  buffers_.push_back(std::make_unique<GuardedBuffer>(name, bytes, misalign));
  return *buffers_.back();
}

ConstTensorView GeneratedProblem::index_tensor(const std::string& name, const void* values,
                                               const std::vector<std::int64_t>& shape,
                                               DType dtype) {
  ConstTensorView view;
  view.dtype = dtype;
  view.rank = static_cast<int>(shape.size());
  std::int64_t numel = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    view.shape[i] = shape[static_cast<std::size_t>(i)];
    view.strides[i] = numel;
    numel *= view.shape[i];
  }
  GuardedBuffer& memory = new_buffer(name, numel * size_of(dtype), dtype);
  if (numel > 0) std::memcpy(memory.data(), values, static_cast<std::size_t>(memory.bytes()));
  view.data = memory.data();
  return with_odd_strides(view);
}

ConstTensorView GeneratedProblem::value_vector(const std::string& name, DType dtype,
                                               const std::vector<double>& values,
                                               std::int64_t stride) {
  const auto n = static_cast<std::int64_t>(values.size());
  GuardedBuffer& memory = new_buffer(name, n * stride * size_of(dtype), dtype);
  for (std::int64_t i = 0; i < n; ++i) {
    store_bits(memory.data(), dtype, i * stride,
               encode(dtype, values[static_cast<std::size_t>(i)], Overflow::kInfinity));
  }
  ConstTensorView view(memory.data(), dtype, {n});
  view.strides[0] = stride;
  return with_odd_strides(view);
}

void GeneratedProblem::make_batch() {
  Batch& batch = args_.batch;
  batch.num_seqs = static_cast<std::int64_t>(case_.seqs.size());
  std::vector<std::int32_t> starts{0};
  std::vector<std::int32_t> lens;
  for (const SeqShape& seq : case_.seqs) {
    starts.push_back(starts.back() + static_cast<std::int32_t>(seq.query_len));
    lens.push_back(static_cast<std::int32_t>(seq.seq_len));
    maxima_.max_seq_len = std::max(maxima_.max_seq_len, seq.seq_len);
    // Padded batches are of engines that do not know it.
    if (case_.actual_delta == 0) {
      batch.max_query_len = std::max(batch.max_query_len, seq.query_len);
    }
  }
  query_start_.assign(starts.begin(), starts.end());
  num_rows_ = query_start_.back() + case_.extra_rows;
  batch.num_actual_tokens = query_start_.back() + case_.actual_delta;
  batch.query_start_loc =
      index_tensor("query_start_loc", starts.data(), {batch.num_seqs + 1}, DType::kI32);
  batch.seq_lens = index_tensor("seq_lens", lens.data(), {batch.num_seqs}, DType::kI32);
  maxima_.max_tokens = num_rows_;
  maxima_.max_seqs = batch.num_seqs;
  maxima_.max_mm_ranges = case_.key.mm_ranges ? kMaxRanges : 0;
}

void GeneratedProblem::make_mask_data() {
  Batch& batch = args_.batch;
  const std::int64_t n = batch.num_seqs;
  std::vector<std::uint8_t> causal;
  std::vector<std::int32_t> prefixes;
  std::vector<std::int32_t> ranges;
  for (std::int64_t s = 0; s < n; ++s) {
    const auto len = static_cast<std::int32_t>(case_.seqs[static_cast<std::size_t>(s)].seq_len);
    causal.push_back(s % 2 == 0 ? 1 : 0);
    // None, past the sequence's end, and somewhere inside.
    prefixes.push_back(s % 3 == 2 ? 0 : s % 3 == 1 ? len + 5 : len / 3);
    // Inside the sequence, empty (in several ways), and past its end.
    const std::array<std::int32_t, 2> empty =
        s % 2 == 0 ? std::array<std::int32_t, 2>{7, 3} : std::array<std::int32_t, 2>{-1, -1};
    for (std::int32_t at : {len / 4, len / 4 + len / 5, empty[0], empty[1], len * 2 / 3,
                            s % 2 == 0 ? len + len / 2 : len - 2}) {
      ranges.push_back(at);
    }
  }
  if (case_.key.causal_per_seq) {
    batch.causal_per_seq = index_tensor("causal_per_seq", causal.data(), {n}, DType::kBool);
  }
  if (case_.key.mask.prefix_window > 0) {
    batch.prefix_lens = index_tensor("prefix_lens", prefixes.data(), {n}, DType::kI32);
  }
  if (case_.key.mm_ranges) {
    batch.mm_ranges = index_tensor("mm_ranges", ranges.data(), {n, kMaxRanges, 2}, DType::kI32);
  }
}

// Query, and this step's key and value rows: one buffer, or three.
void GeneratedProblem::make_rows() {
  const PlanKey& key = case_.key;
  const std::int64_t special_rows = case_.special_values ? 20 : 0;
  const std::array<std::int64_t, 3> heads{key.num_heads, key.num_kv_heads, key.num_kv_heads};
  const std::array<std::int64_t, 3> sizes{key.head_size_qk, key.head_size_qk, key.head_size_v};
  std::array<ConstTensorView*, 3> views{&args_.query, &new_key_, &new_value_};
  const char* const names[] = {"query", "key", "value"};
  std::int64_t fused_row = 0;
  for (std::size_t i = 0; i < 3; ++i) fused_row += heads[i] * sizes[i];
  std::byte* fused = nullptr;
  if (case_.fused_qkv) {
    fused =
        new_buffer("qkv", num_rows_ * fused_row * size_of(key.query_dtype), key.query_dtype).data();
  }
  std::int64_t column = 0;
  for (std::size_t i = 0; i < 3; ++i) {
    const DType dtype = i == 0 || case_.fused_qkv ? key.query_dtype : case_.new_dtype;
    const std::int64_t rows = num_rows_ + (i == 0 ? 0 : special_rows);
    const std::int64_t bytes = rows * heads[i] * sizes[i] * size_of(dtype);
    std::byte* data = fused != nullptr ? fused + column * size_of(dtype)
                                       : new_buffer(names[i], bytes, dtype).data();
    *views[i] = ConstTensorView(data, dtype, {rows, heads[i], sizes[i]});
    if (fused != nullptr) views[i]->strides[0] = fused_row;
    column += heads[i] * sizes[i];
    *views[i] = with_odd_strides(*views[i]);
  }
  const double q_scale = is_fp8(key.query_dtype) ? kQScale : 1.0;
  for (std::int64_t token = 0; token < query_start_.back(); ++token) {
    const RowPlace place = place_row(args_.batch, token);
    for (std::int64_t h = 0; h < key.num_heads; ++h) {
      put_new(args_.query, token, h, row(Use::kQuery, place.seq, place.query, h), q_scale);
    }
  }
}

void GeneratedProblem::make_outputs() {
  const PlanKey& key = case_.key;
  const std::int64_t gap = case_.strided_output ? 8 : 0;
  const std::int64_t head_stride = key.head_size_v + gap;
  const std::int64_t token_stride = key.num_heads * head_stride + 2 * gap;
  output_memory_ = &new_buffer("output", num_rows_ * token_stride * size_of(case_.output_dtype),
                               case_.output_dtype);
  TensorView output(output_memory_->data(), case_.output_dtype,
                    {num_rows_, key.num_heads, key.head_size_v});
  output.strides = {token_stride, head_stride, 1, 0};
  args_.output = with_odd_strides(output);
  if (!case_.lse) return;
  const std::int64_t lse_stride = num_rows_ + gap;
  lse_memory_ = &new_buffer("lse", key.num_heads * lse_stride * 4, DType::kF32);
  TensorView lse(lse_memory_->data(), DType::kF32, {key.num_heads, num_rows_});
  lse.strides[0] = lse_stride;
  args_.lse = with_odd_strides(lse);
}

void GeneratedProblem::make_params() {
  const PlanKey& key = case_.key;
  const auto heads = static_cast<std::size_t>(key.num_heads);
  params_.scale = case_.scale != 0
                      ? case_.scale
                      : static_cast<float>(1 / std::sqrt(static_cast<double>(key.head_size_qk)));
  params_.soft_cap = case_.soft_cap;
  params_.alibi_sqrt = case_.alibi_sqrt;
  params_.sink_mode = case_.sink_mode;
  std::vector<double> sinks(heads);
  for (std::size_t h = 0; h < heads; ++h) {
    sinks[h] = case_.sinks_none && h % 2 == 0 ? -kInf : 2 * random_.normal() + 1;
  }
  if (case_.alibi) {
    params_.alibi_slopes =
        value_vector("alibi_slopes", DType::kF32, verify::alibi_slopes(key.num_heads));
  }
  if (case_.sinks) params_.sinks = value_vector("sinks", *case_.sinks, sinks);
  if (case_.qq_bias > 0) {
    const std::int64_t n = case_.qq_bias;
    std::vector<double> bias(static_cast<std::size_t>(n * n));
    for (std::int64_t i = 0; i < n * n; ++i) {
      // Row 1 masks every key of this step, the other rows some.
      const bool masked = case_.qq_bias_masks && (i / n == 1 || random_.below(4) == 0);
      bias[static_cast<std::size_t>(i)] = masked ? -kInf : 1.5 * random_.normal();
    }
    params_.qq_bias = value_vector("qq_bias", case_.qq_bias_dtype, bias);
    params_.qq_bias.rank = 2;
    params_.qq_bias.shape = {n, n, 0, 0};
    params_.qq_bias.strides = {n, 1, 0, 0};
  }
  if (is_fp8(key.query_dtype)) params_.q_scale = value_vector("q_scale", DType::kF32, {kQScale});
  if (case_.output_scale) {
    params_.output_scale = value_vector("output_scale", DType::kF32, {kOutputScale});
  }
}

std::vector<double> GeneratedProblem::row(Use use, std::int64_t seq, std::int64_t j,
                                          std::int64_t head) const {
  Random noise(
      mix(seed_ ^ mix(static_cast<std::uint64_t>(use) +
                      8 * mix(static_cast<std::uint64_t>((seq << 40) + (j << 10) + head)))));
  const PlanKey& key = case_.key;
  std::vector<double> values(
      static_cast<std::size_t>(use == Use::kValue ? key.head_size_v : key.head_size_qk));
  for (std::size_t d = 0; d < values.size(); ++d) {
    if (use == Use::kValue) {
      // A mean of alternating sign, different in every head.
      const double mean =
          0.5 + 0.25 * static_cast<double>((7 * d + 3 * static_cast<std::size_t>(head)) % 4);
      values[d] = case_.value_gain * ((d % 3 == 0 ? -mean : mean) + 0.5 * noise.normal());
    } else {
      values[d] = (use == Use::kQuery ? kPeak : 1.0) * noise.normal();
    }
  }
  const std::int64_t len = case_.seqs[static_cast<std::size_t>(seq)].seq_len;
  if (case_.nan_keys && head == 0 && use != Use::kQuery && len >= 3) {
    if (use == Use::kKey && j == len / 3) values[values.size() / 2] = kNan;
    if (use == Use::kValue && j == 2 * len / 3) std::fill(values.begin(), values.end(), kNan);
  }
  return values;
}

void GeneratedProblem::put_new(const ConstTensorView& to, std::int64_t token, std::int64_t head,
                               const std::vector<double>& values, double scale) const {
  // The view is const for its users; the memory is this problem's.
  auto* data = const_cast<void*>(to.data);
  for (std::size_t d = 0; d < values.size(); ++d) {
    const double stored = is_fp8(to.dtype) ? values[d] / scale : values[d];
    store_bits(data, to.dtype,
               token * to.strides[0] + head * to.strides[1] + static_cast<std::int64_t>(d),
               encode(to.dtype, stored, Overflow::kSaturate));
  }
}

Problem GeneratedProblem::problem() const {
  Problem problem;
  problem.key = case_.key;
  problem.output_dtype = case_.output_dtype;
  problem.layout = case_.cache == CaseCache::kPackedHND ? KvCacheLayout::kHND : KvCacheLayout::kNHD;
  problem.packed = case_.cache != CaseCache::kSeparate && case_.cache != CaseCache::kDense;
  problem.dense = case_.cache == CaseCache::kDense;
  problem.block_size = case_.block_size;
  problem.soft_cap = case_.soft_cap > 0;
  problem.alibi = case_.alibi;
  problem.alibi_sqrt = case_.alibi_sqrt;
  problem.qq_bias = case_.qq_bias > 0;
  problem.sinks = case_.sinks.has_value();
  problem.lse = case_.lse;
  problem.output_scale = case_.output_scale;
  problem.kv_scale_per_head =
      case_.scales == CaseScale::kPerHead || case_.scales == CaseScale::kPerHeadStrided;
  return problem;
}

std::int64_t GeneratedProblem::covered_tokens() const {
  return verify::covered_tokens(args_.batch);
}

void GeneratedProblem::poison_outputs() {
  output_memory_->poison();
  if (lse_memory_ != nullptr) lse_memory_->poison();
}

// The memory may differ from what it was only in the rows of covered tokens: those of the view, of
// row_dims dimensions past the token's and head's.
std::string GeneratedProblem::touched_rows(const GuardedBuffer& memory, const TensorView& view,
                                           int token_dim, int row_dims) const {
  std::vector<std::byte> allowed = memory.frozen();
  const std::int64_t size = size_of(view.dtype);
  const std::int64_t row_bytes = (row_dims > 0 ? view.shape[2] : 1) * size;
  const std::int64_t heads = view.shape[1 - token_dim];
  for (std::int64_t token = 0; token < covered_tokens(); ++token) {
    for (std::int64_t head = 0; head < heads; ++head) {
      const std::int64_t at =
          size * (token * view.strides[token_dim] + head * view.strides[1 - token_dim]);
      std::copy_n(memory.data() + at, row_bytes, allowed.begin() + at);
    }
  }
  const auto [now, then] =
      std::mismatch(memory.data(), memory.data() + memory.bytes(), allowed.begin(), allowed.end());
  if (now == memory.data() + memory.bytes()) return "";
  return fmt::format("{}: byte {} is outside the {} covered tokens' rows but was written",
                     memory.name(), now - memory.data(), covered_tokens());
}

std::string GeneratedProblem::damage() const {
  for (const auto& memory : buffers_) {
    std::string what = memory->guard_damage();
    const bool is_pool = std::find(pools_.begin(), pools_.end(), memory.get()) != pools_.end();
    if (what.empty() && memory.get() == output_memory_) {
      what = touched_rows(*memory, args_.output, 0, 1);
    } else if (what.empty() && memory.get() == lse_memory_) {
      what = touched_rows(*memory, args_.lse, 1, 0);
    } else if (what.empty() && !is_pool) {
      what = memory->changed();
    }
    if (!what.empty()) return what;
  }
  return "";
}

}  // namespace diffkv::verify
