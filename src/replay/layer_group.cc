#include "replay/layer_group.h"

#include <algorithm>
#include <limits>

#include "diffkv/error.h"

namespace diffkv::replay {
namespace {

// Keys times this fit e4m3's range of 448 with room to spare.
constexpr float kFp8Scale = 1.0F / 64.0F;
// A NaN of every floating-point type here.
constexpr std::uint8_t kNanByte = 0xff;
// Between the layers' input slices.
constexpr std::int64_t kLayerStride = 97;

// Marks of a step: round the plan, then of each layer before the update, between, behind attend.
constexpr std::size_t kPlanBegin = 0;
constexpr std::size_t kPlanEnd = 1;
constexpr std::size_t mark_of(std::int64_t layer) {
  return 2 + 3 * static_cast<std::size_t>(layer);
}

}  // namespace

std::int64_t padded_size(std::int64_t n, std::int64_t most) {
  constexpr std::int64_t kFine = 8;
  constexpr std::int64_t kCoarse = 256;
  std::int64_t size = 1;
  while (size < n && size < kFine) size *= 2;
  const std::int64_t step = n <= kCoarse ? kFine : kCoarse;
  if (n > kFine) size = (n + step - 1) / step * step;
  return std::min(size, most);
}

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

device::Mirror LayerGroup::place_constants() {
  device::Mirror mirror(session_->backend());
  mirror.add(inputs_.data(), inputs_.bytes());
  mirror.add(sinks_.data(), std::ssize(sinks_) * size_of(DType::kF32));
  mirror.add(&kv_scale_, sizeof(kv_scale_));
  mirror.upload();
  return mirror;
}

LayerGroup::LayerGroup(const device::Session& session, const LayerGroupConfig& config)
    : session_(&session),
      config_(config),
      key_(make_key(config)),
      random_(config.seed),
      inputs_(config.model, config.kind, config.dtype, config.max_tokens, config.seed + 1),
      sinks_(static_cast<std::size_t>(config.kind.num_heads)),
      kv_scale_(is_fp8(config.cache_dtype) ? kFp8Scale : 1.0F),
      params_(make_params()),
      constants_(place_constants()),
      backend_(session.backend()),
      attention_(backend_, key_, constants_.on_device(params_), config.dtype),
      builder_(backend_, key_,
               {.max_tokens = config.max_tokens,
                .max_seqs = config.max_seqs,
                .max_seq_len = config.max_seq_len},
               session.device()),
      spec_{.block_size = config.block_size,
            .num_kv_heads = config.kind.num_kv_heads,
            .head_size_qk = config.model.head_size_qk,
            .head_size_v = config.model.head_size_v,
            .dtype = config.cache_dtype},
      marks_(session.make_marks(mark_of(config.kind.num_layers))),
      max_blocks_((config.max_seq_len + config.block_size - 1) / config.block_size),
      index_(session.backend()) {
  if (config_.graphs && !session.cannot_record().empty()) {
    throw Error(ErrorCode::kUnsupported, session.cannot_record());
  }
  make_caches();
  make_buffers();
  // What was copied on the default stream is there before the session's begins.
  session.backend().synchronize(session.device(), {});
}

void LayerGroup::make_caches() {
  const std::int64_t bytes = DiffKVBackend::get_kv_cache_bytes(spec_, config_.num_blocks);
  for (std::int64_t layer = 0; layer < config_.kind.num_layers; ++layer) {
    memory_.emplace_back(session_->backend(), bytes);
    memory_.back().fill(kNanByte);
    caches_.push_back(spec_.view(memory_.back().data(), config_.num_blocks, session_->device()));
    if (is_fp8(config_.cache_dtype)) {
      caches_.back().k_scale = constants_.on_device(view_of(&kv_scale_, {1}));
      caches_.back().v_scale = constants_.on_device(view_of(&kv_scale_, {1}));
    }
  }
}

void LayerGroup::make_buffers() {
  const auto seqs = static_cast<std::size_t>(config_.max_seqs);
  query_start_loc_.resize(seqs + 1);
  seq_lens_.resize(seqs);
  block_table_.resize(seqs * static_cast<std::size_t>(max_blocks_));
  slot_mapping_.resize(static_cast<std::size_t>(config_.max_tokens));
  index_.add(query_start_loc_.data(), std::ssize(query_start_loc_) * size_of(DType::kI32));
  index_.add(seq_lens_.data(), std::ssize(seq_lens_) * size_of(DType::kI32));
  index_.add(block_table_.data(), std::ssize(block_table_) * size_of(DType::kI32));
  index_.add(slot_mapping_.data(), std::ssize(slot_mapping_) * size_of(DType::kI64));
  const std::int64_t rows = config_.max_tokens * config_.kind.num_heads;
  for (std::int64_t i = 0; i < (config_.graphs ? config_.kind.num_layers : 1); ++i) {
    output_.emplace_back(session_->backend(),
                         rows * config_.model.head_size_v * size_of(config_.dtype));
    lse_.emplace_back(session_->backend(), rows * size_of(DType::kF32));
    if (!config_.graphs) continue;
    step_inputs_.emplace_back(session_->backend(), config_.max_tokens * inputs_.row_bytes());
    step_inputs_.back().fill(kNanByte);
  }
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
  auto num_seqs = static_cast<std::int64_t>(step.seqs.size());
  if (config_.graphs) num_seqs = padded_size(num_seqs, config_.max_seqs);
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
  std::int64_t num_tokens = token;
  std::int64_t max_query_len = 0;
  for (const ScheduledSeq& seq : step.seqs) max_query_len = std::max(max_query_len, seq.query_len);
  if (config_.graphs) {
    // Steps of single queries are recorded by themselves, all others for any queries.
    if (max_query_len > 1) max_query_len = 0;
    // Sequences without rows or keys, and tokens that are written nowhere.
    num_tokens = padded_size(token, config_.max_tokens);
    std::fill(query_start_loc_.begin() + std::ssize(step.seqs) + 1,
              query_start_loc_.begin() + num_seqs + 1, static_cast<std::int32_t>(token));
    std::fill(seq_lens_.begin() + std::ssize(step.seqs), seq_lens_.begin() + num_seqs, 0);
    std::fill(slot_mapping_.begin() + token, slot_mapping_.begin() + num_tokens, -1);
  }
  batch_ = {};
  batch_.num_seqs = num_seqs;
  batch_.num_actual_tokens = num_tokens;
  batch_.max_query_len = max_query_len;
  batch_.query_start_loc = view_of(query_start_loc_.data(), {num_seqs + 1});
  batch_.seq_lens = view_of(seq_lens_.data(), {num_seqs});
  batch_.block_table = view_of(block_table_.data(), {num_seqs, max_blocks_});
  slots_ = view_of(slot_mapping_.data(), {num_tokens});
}

void LayerGroup::upload_batch() const {
  for (const ConstTensorView& view :
       {batch_.query_start_loc, batch_.seq_lens, batch_.block_table, slots_}) {
    index_.upload(view.data, view.numel() * size_of(view.dtype), session_->stream());
  }
}

ConstTensorView LayerGroup::placed(ConstTensorView input, std::int64_t layer) const {
  if (!config_.graphs) return constants_.on_device(input);
  // From the slice's place in the pool to the one that the layer's rows are copied to.
  const std::int64_t slice = offset_of(layer, step_offset_) * inputs_.row_bytes();
  const std::int64_t at = static_cast<const std::byte*>(input.data) - inputs_.data() - slice;
  input.data = step_inputs_[static_cast<std::size_t>(layer)].data() + at;
  input.device = session_->device();
  return input;
}

LayerGroup::Tensors LayerGroup::tensors() const {
  Tensors out;
  out.batch = index_.on_device(batch_);
  out.slots = index_.on_device(slots_);
  const std::int64_t tokens = batch_.num_actual_tokens;
  for (std::int64_t layer = 0; layer < config_.kind.num_layers; ++layer) {
    const std::int64_t offset = offset_of(layer, step_offset_);
    out.query.push_back(placed(inputs_.query(offset, tokens), layer));
    out.key.push_back(placed(inputs_.key(offset, tokens), layer));
    out.value.push_back(placed(inputs_.value(offset, tokens), layer));
  }
  return out;
}

AttendArgs LayerGroup::device_args(std::int64_t layer, const Tensors& tensors) const {
  const auto at = static_cast<std::size_t>(layer);
  const std::size_t buffer = config_.graphs ? at : 0;
  const std::int64_t tokens = tensors.batch.num_actual_tokens;
  AttendArgs out;
  out.query = tensors.query[at];
  out.cache = caches_[at];
  out.batch = tensors.batch;
  out.output =
      TensorView(output_[buffer].data(), config_.dtype,
                 {tokens, config_.kind.num_heads, config_.model.head_size_v}, session_->device());
  out.lse = TensorView(lse_[buffer].data(), DType::kF32, {config_.kind.num_heads, tokens},
                       session_->device());
  return out;
}

AttendArgs LayerGroup::host_args(std::int64_t layer) const {
  AttendArgs out;
  out.query = inputs_.query(offset_of(layer, step_offset_), batch_.num_actual_tokens);
  out.batch = batch_;
  if (is_fp8(config_.cache_dtype)) {
    out.cache.k_scale = view_of(&kv_scale_, {1});
    out.cache.v_scale = view_of(&kv_scale_, {1});
  }
  return out;
}

void LayerGroup::run_layer(std::int64_t layer, const Tensors& tensors,
                           const DiffKVMetadata& metadata) const {
  const auto at = static_cast<std::size_t>(layer);
  const AttendArgs args = device_args(layer, tensors);
  const Stream stream = session_->stream();
  marks_->set(mark_of(layer));
  attention_.do_kv_cache_update(tensors.key[at], tensors.value[at], args.cache, tensors.slots,
                                stream);
  marks_->set(mark_of(layer) + 1);
  attention_.forward({.query = args.query,
                      .key = {},
                      .value = {},
                      .cache = &args.cache,
                      .metadata = &metadata,
                      .output = args.output,
                      .lse = args.lse,
                      .qq_bias = {}},
                     stream);
  marks_->set(mark_of(layer) + 2);
}

void LayerGroup::run_recorded() {
  for (std::int64_t layer = 0; layer < config_.kind.num_layers; ++layer) {
    const std::int64_t offset = offset_of(layer, step_offset_);
    const ConstTensorView rows = inputs_.query(offset, 1);
    session_->copy(step_inputs_[static_cast<std::size_t>(layer)].data(),
                   constants_.on_device(rows).data, batch_.num_actual_tokens * inputs_.row_bytes());
  }
  std::unique_ptr<device::Recording>& recording =
      recorded_[{batch_.num_seqs, batch_.num_actual_tokens, batch_.max_query_len}];
  if (!recording) {
    recording = session_->record([this, tensors = tensors()] {
      marks_->set(kPlanBegin);
      const DiffKVMetadata metadata =
          builder_.build_for_cudagraph_capture(tensors.batch, session_->stream());
      marks_->set(kPlanEnd);
      for (std::int64_t layer = 0; layer < config_.kind.num_layers; ++layer) {
        run_layer(layer, tensors, metadata);
      }
    });
  }
  recording->launch();
}

void LayerGroup::run(const Step& step, const std::vector<RowToVerify>& rows, StepRecord& record,
                     VerifyResult& verify, const std::function<bool()>& go_on) {
  bool verifying = true;
  const auto verify_rows = [&](std::int64_t layer) {
    for (const RowToVerify& row : rows) {
      if (row.layer != layer || !verifying) continue;
      session_->synchronize();
      verify_row(step, row, verify);
      verifying = go_on();
    }
  };
  prepare(step);
  upload_batch();
  if (config_.graphs) {
    for (const RowToVerify& row : rows) poison_row(row);
    run_recorded();
    for (std::int64_t layer = 0; layer < config_.kind.num_layers; ++layer) verify_rows(layer);
  } else {
    const Tensors now = tensors();
    marks_->set(kPlanBegin);
    const DiffKVMetadata metadata = builder_.build(now.batch, session_->stream());
    marks_->set(kPlanEnd);
    for (std::int64_t layer = 0; layer < config_.kind.num_layers; ++layer) {
      for (const RowToVerify& row : rows) {
        if (row.layer == layer) poison_row(row);
      }
      run_layer(layer, now, metadata);
      verify_rows(layer);
    }
  }
  session_->synchronize();  // the next step changes what was uploaded
  add_times(record);
}

void LayerGroup::add_times(StepRecord& record) const {
  record.plan_s += marks_->seconds(kPlanBegin, kPlanEnd);
  for (std::int64_t layer = 0; layer < config_.kind.num_layers; ++layer) {
    record.update_s += marks_->seconds(mark_of(layer), mark_of(layer) + 1);
    record.attend_s += marks_->seconds(mark_of(layer) + 1, mark_of(layer) + 2);
  }
}

void LayerGroup::poison_row(const RowToVerify& row) const {
  const TensorView output = device_args(row.layer, tensors()).output;
  const std::int64_t at = row.token * output.strides[0] + row.head * output.strides[1];
  session_->backend().fill_bytes(static_cast<std::byte*>(output.data) + at * size_of(config_.dtype),
                                 kNanByte, config_.model.head_size_v * size_of(config_.dtype),
                                 session_->device(), session_->stream());
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
