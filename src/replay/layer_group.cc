#include "replay/layer_group.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <limits>

#include "verify/codec.h"
#include "verify/compare.h"
#include "verify/reference.h"

namespace diffkv::replay {
namespace {

using Clock = std::chrono::steady_clock;

// Keys times this fit e4m3's range of 448 with room to spare.
constexpr float kFp8Scale = 1.0F / 64.0F;
// Between the layers' input slices.
constexpr std::int64_t kLayerStride = 97;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

void set_nan(DType dtype, void* data, std::int64_t count) {
  // All bits set is a NaN of every floating-point type here.
  std::memset(data, 0xff, static_cast<std::size_t>(count * size_of(dtype)));
}

}  // namespace

PlanKey LayerGroup::make_key(const LayerGroupConfig& config) {
  return {.num_heads = config.kind.num_heads,
          .num_kv_heads = config.kind.num_kv_heads,
          .head_size_qk = config.model.head_size_qk,
          .head_size_v = config.model.head_size_v,
          .query_dtype = config.dtype,
          .key_dtype = config.cache_dtype,
          .value_dtype = config.cache_dtype,
          .mask = {.window = static_cast<std::int32_t>(config.kind.window)}};
}

AttentionParams LayerGroup::make_params() {
  std::normal_distribution<float> normal;
  for (float& sink : sinks_) sink = normal(random_);
  AttentionParams params;
  params.scale = config_.model.scale;
  if (config_.kind.sinks) {
    params.sinks = view_of(sinks_.data(), {static_cast<std::int64_t>(sinks_.size())});
  }
  return params;
}

LayerGroup::LayerGroup(const DiffKVBackend& backend, const LayerGroupConfig& config)
    : config_(config),
      key_(make_key(config)),
      random_(config.seed),
      inputs_(config.model, config.kind, config.dtype, config.max_tokens, config.seed + 1),
      sinks_(static_cast<std::size_t>(config.kind.num_heads)),
      kv_scale_(is_fp8(config.cache_dtype) ? kFp8Scale : 1.0F),
      params_(make_params()),
      attention_(backend, key_, params_, config.dtype),
      builder_(backend, key_,
               {.max_tokens = config.max_tokens,
                .max_seqs = config.max_seqs,
                .max_seq_len = config.max_seq_len}),
      spec_{.block_size = config.block_size,
            .num_kv_heads = config.kind.num_kv_heads,
            .head_size_qk = config.model.head_size_qk,
            .head_size_v = config.model.head_size_v,
            .dtype = config.cache_dtype},
      max_blocks_((config.max_seq_len + config.block_size - 1) / config.block_size) {
  const std::int64_t bytes = DiffKVBackend::get_kv_cache_bytes(spec_, config_.num_blocks);
  for (std::int64_t layer = 0; layer < config_.kind.num_layers; ++layer) {
    memory_.emplace_back(backend.compute().allocate(bytes, Device{}), Free{&backend.compute()});
    set_nan(DType::kU8, memory_.back().get(), bytes);
    caches_.push_back(spec_.view(memory_.back().get(), config_.num_blocks));
    if (is_fp8(config_.cache_dtype)) {
      caches_.back().k_scale = view_of(&kv_scale_, {1});
      caches_.back().v_scale = view_of(&kv_scale_, {1});
    }
  }
  const auto seqs = static_cast<std::size_t>(config_.max_seqs);
  const auto tokens = static_cast<std::size_t>(config_.max_tokens);
  const auto heads = static_cast<std::size_t>(config_.kind.num_heads);
  query_start_loc_.resize(seqs + 1);
  seq_lens_.resize(seqs);
  block_table_.resize(seqs * static_cast<std::size_t>(max_blocks_));
  slot_mapping_.resize(tokens);
  output_.resize(tokens * heads * static_cast<std::size_t>(config_.model.head_size_v));
  lse_.resize(tokens * heads);
}

std::int64_t LayerGroup::cache_bytes() const {
  return DiffKVBackend::get_kv_cache_bytes(spec_, config_.num_blocks) * config_.kind.num_layers;
}

std::int64_t LayerGroup::offset_of(std::int64_t layer, std::int64_t step_offset) const {
  return (step_offset + layer * kLayerStride) % InputPool::num_offsets();
}

void LayerGroup::prepare(const Step& step) {
  step_offset_ =
      static_cast<std::int64_t>(random_() % static_cast<std::uint64_t>(InputPool::num_offsets()));
  const auto num_seqs = static_cast<std::int64_t>(step.seqs.size());
  std::fill_n(block_table_.begin(), num_seqs * max_blocks_,
              static_cast<std::int32_t>(config_.num_blocks));
  std::int64_t token = 0;
  query_start_loc_[0] = 0;
  for (std::size_t s = 0; s < step.seqs.size(); ++s) {
    const ScheduledSeq& seq = step.seqs[s];
    const auto& blocks =
        config_.kind.window > 0 ? seq.sequence->window_blocks : seq.sequence->full_blocks;
    std::copy(blocks.begin(), blocks.end(),
              block_table_.begin() + static_cast<std::ptrdiff_t>(s) * max_blocks_);
    std::vector<Source>& sources = sources_[seq.sequence->id];
    sources.resize(static_cast<std::size_t>(seq.context_len));
    for (std::int64_t i = 0; i < seq.query_len; ++i, ++token) {
      const std::int64_t position = seq.context_len + i;
      const std::int64_t block = blocks[static_cast<std::size_t>(position / config_.block_size)];
      slot_mapping_[static_cast<std::size_t>(token)] =
          block * config_.block_size + position % config_.block_size;
      sources.push_back(
          {static_cast<std::int32_t>(step_offset_), static_cast<std::int32_t>(token)});
    }
    query_start_loc_[s + 1] = static_cast<std::int32_t>(token);
    seq_lens_[s] = static_cast<std::int32_t>(seq.context_len + seq.query_len);
  }
  batch_ = {};
  batch_.num_seqs = num_seqs;
  batch_.num_actual_tokens = token;
  batch_.query_start_loc = view_of(query_start_loc_.data(), {num_seqs + 1});
  batch_.seq_lens = view_of(seq_lens_.data(), {num_seqs});
  batch_.block_table = view_of(block_table_.data(), {num_seqs, max_blocks_});
}

AttendArgs LayerGroup::args(std::int64_t layer) const {
  const std::int64_t tokens = batch_.num_actual_tokens;
  AttendArgs out;
  out.query = inputs_.query(offset_of(layer, step_offset_), tokens);
  out.cache = caches_[static_cast<std::size_t>(layer)];
  out.batch = batch_;
  // The views are of this object's own buffers, which only run writes through them.
  out.output = TensorView(const_cast<float*>(output_.data()), config_.dtype,
                          {tokens, config_.kind.num_heads, config_.model.head_size_v});
  out.lse = view_of(const_cast<float*>(lse_.data()), {config_.kind.num_heads, tokens});
  return out;
}

void LayerGroup::run(const Step& step, const std::vector<RowToVerify>& rows, StepRecord& record,
                     VerifyResult& verify, const std::function<bool()>& go_on) {
  bool verifying = true;
  prepare(step);
  auto start = Clock::now();
  const DiffKVMetadata metadata = builder_.build(batch_);
  record.plan_s += seconds_since(start);
  const std::int64_t tokens = batch_.num_actual_tokens;
  const ConstTensorView slots =
      view_of(static_cast<const std::int64_t*>(slot_mapping_.data()), {tokens});
  for (std::int64_t layer = 0; layer < config_.kind.num_layers; ++layer) {
    const std::int64_t offset = offset_of(layer, step_offset_);
    const AttendArgs layer_args = args(layer);
    for (const RowToVerify& row : rows) {
      if (row.layer == layer) poison_row(row);
    }
    start = Clock::now();
    attention_.do_kv_cache_update(inputs_.key(offset, tokens), inputs_.value(offset, tokens),
                                  layer_args.cache, slots);
    record.update_s += seconds_since(start);
    start = Clock::now();
    attention_.forward({.query = layer_args.query,
                        .key = {},
                        .value = {},
                        .cache = &layer_args.cache,
                        .metadata = &metadata,
                        .output = layer_args.output,
                        .lse = layer_args.lse,
                        .qq_bias = {}});
    record.attend_s += seconds_since(start);
    for (const RowToVerify& row : rows) {
      if (row.layer != layer || !verifying) continue;
      verify_row(step, row, verify);
      verifying = go_on();
    }
  }
}

void LayerGroup::poison_row(const RowToVerify& row) {
  const AttendArgs layer_args = args(row.layer);
  const std::int64_t at =
      row.token * layer_args.output.strides[0] + row.head * layer_args.output.strides[1];
  set_nan(config_.dtype,
          static_cast<std::byte*>(layer_args.output.data) + at * size_of(config_.dtype),
          config_.model.head_size_v);
}

void LayerGroup::verify_row(const Step& step, const RowToVerify& row, VerifyResult& verify) const {
  const AttendArgs layer_args = args(row.layer);
  const verify::Tolerance tolerance = verify::tolerance(key_, config_.dtype);
  const verify::RowRef reference =
      verify::reference_row(key_, params_, layer_args, row.token, row.head);
  const verify::RowCheck check =
      verify::check_row(reference, layer_args, row.token, row.head, tolerance);
  (config_.kind.window > 0 ? verify.rows_window : verify.rows_full) += 1;
  verify.worst_error = std::max(verify.worst_error, check.error);
  verify.worst_lse_error = std::max(verify.worst_lse_error, check.lse_error);
  verify.tolerance = std::max(verify.tolerance, tolerance.output);
  verify.lse_tolerance = std::max(verify.lse_tolerance, tolerance.lse);
  std::string wrong = check_stored(step, row);
  if (!check.ok) wrong = wrong.empty() ? check.what : check.what + "; " + wrong;
  if (wrong.empty()) return;
  ++verify.rows_wrong;
  if (verify.first_wrong.empty()) {
    verify.first_wrong = fmt::format(
        "{} layer {}: {}", config_.kind.window > 0 ? "window" : "full-attention", row.layer, wrong);
  }
}

std::string LayerGroup::check_stored(const Step& step, const RowToVerify& row) const {
  const verify::RowPlace place = verify::place_row(batch_, row.token);
  const Sequence& sequence = *step.seqs[static_cast<std::size_t>(place.seq)].sequence;
  const std::vector<Source>& sources = sources_.at(sequence.id);
  const KvCacheView& cache = caches_[static_cast<std::size_t>(row.layer)];
  const std::int64_t head = row.head / key_.group();
  const std::int64_t bytes = size_of(config_.cache_dtype);
  for (std::int64_t j = 0; j <= place.position; ++j) {
    if (!verify::sees(key_.mask, batch_, place, j)) continue;
    const verify::KeyPlace stored = verify::place_key(cache, batch_, place.seq, j);
    const Source source = sources[static_cast<std::size_t>(j)];
    const std::int64_t input = offset_of(row.layer, source.offset) + source.index;
    const auto differs = [&](const KvPlane& plane, const ConstTensorView& from, std::int64_t size) {
      const std::int64_t at = stored.block * plane.stride_block +
                              stored.token * plane.stride_token + head * plane.stride_head;
      const std::byte* have = static_cast<const std::byte*>(plane.data) + at * bytes;
      const std::byte* given =
          static_cast<const std::byte*>(from.data) + head * size * size_of(config_.dtype);
      for (std::int64_t d = 0; d < size; ++d) {
        const double value = verify::load(given, config_.dtype, d);
        const std::uint32_t expected = verify::cache_bits(config_.cache_dtype, value, kv_scale_);
        const std::uint32_t bits = verify::load_bits(have, config_.cache_dtype, d);
        if (bits != expected) return true;
      }
      return false;
    };
    const bool key_differs = differs(cache.key, inputs_.key(input, 1), key_.head_size_qk);
    if (key_differs || differs(cache.value, inputs_.value(input, 1), key_.head_size_v)) {
      return fmt::format("the {} of token {} of request {} is not in the cache as it was written",
                         key_differs ? "key" : "value", j, sequence.id);
    }
  }
  return {};
}

double LayerGroup::kv_bytes(const Step& step) const {
  double tokens = 0.0;
  for (const ScheduledSeq& seq : step.seqs) {
    const std::int64_t first =
        config_.kind.window > 0
            ? std::max<std::int64_t>(seq.context_len - config_.kind.window + 1, 0)
            : 0;
    tokens += static_cast<double>(seq.context_len + seq.query_len - first);
  }
  const std::int64_t row = config_.kind.num_kv_heads *
                           (config_.model.head_size_qk + config_.model.head_size_v) *
                           size_of(config_.cache_dtype);
  return tokens * static_cast<double>(row * config_.kind.num_layers);
}

double LayerGroup::flops(const Step& step) const {
  const std::int64_t window =
      config_.kind.window > 0 ? config_.kind.window : std::numeric_limits<std::int64_t>::max();
  double pairs = 0.0;
  for (const ScheduledSeq& seq : step.seqs) {
    // Rows below the window's width see one key more than the row before, the rest see `window`.
    const std::int64_t end = seq.context_len + seq.query_len;
    const std::int64_t growing_end = std::clamp(window, seq.context_len, end);
    const auto growing = static_cast<double>(growing_end - seq.context_len);
    pairs += growing * static_cast<double>(seq.context_len + 1 + growing_end) / 2.0;
    if (end > growing_end) {
      pairs += static_cast<double>(end - growing_end) * static_cast<double>(window);
    }
  }
  const std::int64_t per_pair = 2 * (config_.model.head_size_qk + config_.model.head_size_v);
  return pairs * static_cast<double>(per_pair * config_.kind.num_heads * config_.kind.num_layers);
}

}  // namespace diffkv::replay
