#include "bench/harness/workload.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <numeric>
#include <random>
#include <utility>

#include "diffkv/error.h"
#include "verify/codec.h"
#include "verify/compare.h"
#include "verify/generate.h"
#include "verify/reference.h"
#include "verify/rows.h"

namespace diffkv::bench {
namespace {

// Keys and values times this fit e4m3's range of 448 with room to spare.
constexpr float kFp8Scale = 1.0F / 64.0F;
constexpr std::uint64_t kSeed = 20;
// Tokens of context that are written at a time.
constexpr std::int64_t kChunk = 256;
// Multiply-adds of the rows that are compared: about a tenth of a second.
constexpr std::int64_t kVerifyWork = 30'000'000;

replay::InputPool make_inputs(const Scenario& scenario) {
  const replay::LayerKind kind{.num_layers = 1,
                               .num_heads = scenario.num_heads,
                               .num_kv_heads = scenario.num_kv_heads,
                               .window = scenario.window,
                               .sinks = scenario.sinks};
  const replay::Model model{.name = scenario.name,
                            .head_size_qk = scenario.head_size_qk,
                            .head_size_v = scenario.head_size_v,
                            .full = kind,
                            .window = kind};
  return {model, kind, scenario.dtype, std::max(scenario.num_tokens(), kChunk), kSeed};
}

// The first row in the pool of a slice that stands for keys from `position` on.
std::int64_t input_offset(std::int64_t seq, std::int64_t position) {
  return (seq * 389 + position * 97) % replay::InputPool::num_offsets();
}

// Where this step's tokens are in the pool.
constexpr std::int64_t kStepOffset = 5;

}  // namespace

Workload::Workload(const device::Session& session, const Scenario& scenario)
    : session_(session),
      scenario_(scenario),
      key_(scenario.key()),
      maxima_{.max_tokens = scenario.num_tokens(),
              .max_seqs = static_cast<std::int64_t>(scenario.seqs.size()),
              .max_seq_len = scenario.max_seq_len()},
      inputs_(make_inputs(scenario)),
      mirror_(session.backend()),
      kv_scale_(is_fp8(scenario.kv_dtype) ? kFp8Scale : 1.0F) {
  make_cache();
  make_batch();
  make_params();
  place();
  make_outputs();
  write_context();
}

Problem Workload::problem_of(const Scenario& scenario) {
  Problem problem;
  problem.key = scenario.key();
  problem.output_dtype = scenario.dtype;
  problem.dense = scenario.block_size == 0;
  problem.packed = true;
  problem.block_size = problem.dense ? scenario.max_seq_len() : scenario.block_size;
  problem.sinks = scenario.sinks;
  problem.soft_cap = scenario.soft_cap > 0;
  problem.alibi = scenario.alibi;
  problem.layout = scenario.layout;
  return problem;
}

device::Memory Workload::allocate(std::int64_t bytes) const {
  device::Memory memory(session_.backend(), bytes);
  memory.fill(0xff, session_.stream());
  return memory;
}

void Workload::make_params() {
  std::mt19937_64 random(kSeed);
  std::normal_distribution<float> normal;
  sinks_.resize(static_cast<std::size_t>(scenario_.num_heads));
  for (float& sink : sinks_) sink = normal(random);
  host_params_.scale = 1.0F / std::sqrt(static_cast<float>(scenario_.head_size_qk));
  host_params_.soft_cap = scenario_.soft_cap;
  if (scenario_.sinks) host_params_.sinks = view_of(sinks_.data(), {scenario_.num_heads});
  if (!scenario_.alibi) return;
  for (const double slope : verify::alibi_slopes(scenario_.num_heads)) {
    alibi_slopes_.push_back(static_cast<float>(slope));
  }
  host_params_.alibi_slopes = view_of(alibi_slopes_.data(), {scenario_.num_heads});
}

void Workload::place() {
  const auto add = [&](auto& values) {
    if (!values.empty()) mirror_.add(values.data(), std::ssize(values) * sizeof(values[0]));
  };
  mirror_.add(inputs_.data(), inputs_.bytes());
  mirror_.add(&kv_scale_, sizeof(kv_scale_));
  add(sinks_);
  add(alibi_slopes_);
  add(query_start_loc_);
  add(seq_lens_);
  add(block_table_);
  add(kv_start_);
  add(slot_mapping_);
  mirror_.upload(session_.stream());
  const std::int64_t tokens = scenario_.num_tokens();
  host_args_.query = inputs_.query(kStepOffset, tokens);
  params_ = mirror_.on_device(host_params_);
  args_.query = mirror_.on_device(host_args_.query);
  args_.batch = mirror_.on_device(host_args_.batch);
  new_key_ = mirror_.on_device(inputs_.key(kStepOffset, tokens));
  new_value_ = mirror_.on_device(inputs_.value(kStepOffset, tokens));
  slots_ = mirror_.on_device(view_of(std::as_const(slot_mapping_).data(), {tokens}));
}

void Workload::make_cache() {
  const bool dense = scenario_.block_size == 0;
  const std::int64_t page = dense ? 1 : scenario_.block_size;
  for (const Seq& seq : scenario_.seqs) {
    first_token_.push_back(capacity_);
    capacity_ += (seq.seq_len + page - 1) / page * page;
  }
  // Of contiguous keys, one page that holds all of them.
  spec_ = {.block_size = dense ? capacity_ : page,
           .num_kv_heads = scenario_.num_kv_heads,
           .head_size_qk = scenario_.head_size_qk,
           .head_size_v = scenario_.head_size_v,
           .dtype = scenario_.kv_dtype,
           .layout = scenario_.layout};
  num_pages_ = dense ? 1 : capacity_ / page;
  page_order_.resize(static_cast<std::size_t>(num_pages_));
  std::iota(page_order_.begin(), page_order_.end(), 0);
  std::mt19937_64 random(kSeed);
  std::shuffle(page_order_.begin(), page_order_.end(), random);
}

KvCacheView Workload::written_view(void* data, Device device) const {
  KvCacheView view = spec_.view(data, num_pages_, device);
  if (!is_fp8(scenario_.kv_dtype)) return view;
  view.k_scale = view_of(&kv_scale_, {1});
  if (device.type != DeviceType::kCpu) view.k_scale = mirror_.on_device(view.k_scale);
  view.v_scale = view.k_scale;
  return view;
}

KvCacheView Workload::read_view(const KvCacheView& written) const {
  if (scenario_.block_size != 0) return written;
  const auto rows_of = [&](const KvPlane& plane, std::int64_t size) {
    ConstTensorView view(plane.data, plane.dtype, {capacity_, scenario_.num_kv_heads, size},
                         written.device);
    view.strides[0] = plane.stride_token;
    view.strides[1] = plane.stride_head;
    return view;
  };
  KvCacheView view = KvCacheView::dense_tokens(rows_of(written.key, scenario_.head_size_qk),
                                               rows_of(written.value, scenario_.head_size_v));
  view.k_scale = written.k_scale;
  view.v_scale = written.v_scale;
  return view;
}

void Workload::make_outputs() {
  const std::int64_t tokens = scenario_.num_tokens();
  cache_memory_ = allocate(spec_.page_stride_bytes() * num_pages_);
  written_ = written_view(cache_memory_.data(), session_.device());
  args_.cache = read_view(written_);
  output_memory_ = allocate(static_cast<std::int64_t>(scenario_.output_bytes()));
  args_.output =
      TensorView(output_memory_.data(), scenario_.dtype,
                 {tokens, scenario_.num_heads, scenario_.head_size_v}, session_.device());
  const std::int64_t bytes = workspace_bytes(session_.backend(), key_, maxima_);
  workspace_memory_ = allocate(bytes);
  workspace_ = TensorView(workspace_memory_.data(), DType::kU8, {bytes}, session_.device());
}

std::int64_t Workload::slot_of(std::int64_t seq, std::int64_t position) const {
  const std::int64_t token = first_token_[static_cast<std::size_t>(seq)] + position;
  const std::int64_t page = spec_.block_size;
  return page_order_[static_cast<std::size_t>(token / page)] * page + token % page;
}

void Workload::make_batch() {
  const auto num_seqs = static_cast<std::int64_t>(scenario_.seqs.size());
  const std::int64_t page = spec_.block_size;
  const std::int64_t max_blocks = (scenario_.max_seq_len() + page - 1) / page;
  query_start_loc_ = {0};
  // Entries past a sequence's last block are far out of range: reading one shows.
  block_table_.assign(static_cast<std::size_t>(num_seqs * max_blocks), 1 << 30);
  for (std::int64_t s = 0; s < num_seqs; ++s) {
    const Seq& seq = scenario_.seqs[static_cast<std::size_t>(s)];
    query_start_loc_.push_back(query_start_loc_.back() + static_cast<std::int32_t>(seq.query_len));
    seq_lens_.push_back(static_cast<std::int32_t>(seq.seq_len));
    kv_start_.push_back(static_cast<std::int32_t>(first_token_[static_cast<std::size_t>(s)]));
    for (std::int64_t j = seq.seq_len - seq.query_len; j < seq.seq_len; ++j) {
      slot_mapping_.push_back(slot_of(s, j));
    }
    for (std::int64_t j = 0; j < seq.seq_len; j += page) {
      block_table_[static_cast<std::size_t>(s * max_blocks + j / page)] =
          static_cast<std::int32_t>(slot_of(s, j) / page);
    }
  }
  Batch& batch = host_args_.batch;
  batch.num_seqs = num_seqs;
  batch.num_actual_tokens = scenario_.num_tokens();
  for (const Seq& seq : scenario_.seqs) {
    batch.max_query_len = std::max(batch.max_query_len, seq.query_len);
  }
  batch.query_start_loc = view_of(query_start_loc_.data(), {num_seqs + 1});
  batch.seq_lens = view_of(seq_lens_.data(), {num_seqs});
  if (scenario_.block_size == 0) {
    batch.kv_start = view_of(kv_start_.data(), {num_seqs});
  } else {
    batch.block_table = view_of(block_table_.data(), {num_seqs, max_blocks});
  }
}

void Workload::write_context() {
  std::vector<std::int64_t> slots;
  for (std::size_t s = 0; s < scenario_.seqs.size(); ++s) {
    const std::int64_t context = scenario_.seqs[s].seq_len - scenario_.seqs[s].query_len;
    for (std::int64_t j = 0; j < context; ++j) {
      slots.push_back(slot_of(static_cast<std::int64_t>(s), j));
    }
  }
  if (slots.empty()) return;
  device::Mirror mirror(session_.backend());
  mirror.add(slots.data(), std::ssize(slots) * size_of(DType::kI64));
  mirror.upload(session_.stream());
  const std::int64_t* next = slots.data();
  for (std::size_t s = 0; s < scenario_.seqs.size(); ++s) {
    const std::int64_t context = scenario_.seqs[s].seq_len - scenario_.seqs[s].query_len;
    for (std::int64_t j = 0; j < context; j += kChunk) {
      const std::int64_t n = std::min(kChunk, context - j);
      const std::int64_t offset = input_offset(static_cast<std::int64_t>(s), j);
      diffkv::update_cache(session_.backend(), mirror_.on_device(inputs_.key(offset, n)),
                           mirror_.on_device(inputs_.value(offset, n)), written_,
                           mirror.on_device(view_of(next, {n})), session_.stream());
      next += n;
    }
  }
  session_.synchronize();  // before the slots' memory goes
}

void Workload::update_cache() {
  diffkv::update_cache(session_.backend(), new_key_, new_value_, written_, slots_,
                       session_.stream());
}

void Workload::make_plan() {
  plan_ = diffkv::make_plan(session_.backend(), key_, maxima_, args_.batch, workspace_,
                            session_.stream());
}

void Workload::attend() {
  diffkv::attend(session_.backend(), params_, args_, plan_, session_.stream());
}

AttendArgs Workload::host_image(std::vector<std::byte>& cache,
                                std::vector<std::byte>& output) const {
  cache.resize(static_cast<std::size_t>(cache_memory_.bytes()));
  output.resize(static_cast<std::size_t>(output_memory_.bytes()));
  cache_memory_.download(cache.data(), cache_memory_.bytes(), 0, session_.stream());
  output_memory_.download(output.data(), output_memory_.bytes(), 0, session_.stream());
  session_.synchronize();
  AttendArgs image = host_args_;
  image.cache = read_view(written_view(cache.data(), {}));
  image.output = args_.output;
  image.output.data = output.data();
  image.output.device = {};
  return image;
}

std::string Workload::check_stored(const KvCacheView& cache) const {
  const std::int64_t tokens = scenario_.num_tokens();
  const ConstTensorView key = inputs_.key(kStepOffset, tokens);
  const ConstTensorView value = inputs_.value(kStepOffset, tokens);
  const auto differs = [&](const KvPlane& plane, const ConstTensorView& from, std::int64_t token,
                           std::int64_t head) {
    const std::int64_t slot = slot_mapping_[static_cast<std::size_t>(token)];
    const std::int64_t at = slot / cache.block_size * plane.stride_block +
                            slot % cache.block_size * plane.stride_token + head * plane.stride_head;
    const std::int64_t given = token * from.strides[0] + head * from.strides[1];
    for (std::int64_t d = 0; d < from.shape[2]; ++d) {
      const double x = verify::load(from.data, from.dtype, given + d);
      if (verify::load_bits(plane.data, plane.dtype, at + d) !=
          verify::cache_bits(plane.dtype, x, kv_scale_)) {
        return true;
      }
    }
    return false;
  };
  for (std::int64_t token = 0; token < tokens; ++token) {
    for (std::int64_t head = 0; head < scenario_.num_kv_heads; ++head) {
      const bool key_differs = differs(cache.key, key, token, head);
      if (key_differs || differs(cache.value, value, token, head)) {
        return fmt::format("the {} of token {}, KV head {}, is not in the cache as it was given",
                           key_differs ? "key" : "value", token, head);
      }
    }
  }
  return {};
}

Verification Workload::verify() {
  const verify::Tolerance tolerance = verify::tolerance(key_, scenario_.dtype);
  Verification result;
  result.tolerance = tolerance.output;
  try {
    update_cache();
    make_plan();
    attend();
    session_.synchronize();
  } catch (const Error& error) {
    result.what = error.what();
    return result;
  }
  std::vector<std::byte> cache;
  std::vector<std::byte> output;
  const verify::RowsCheck rows = verify::check_rows(key_, host_params_, host_image(cache, output),
                                                    tolerance, kVerifyWork, kSeed);
  result.rows = rows.rows;
  result.wrong = rows.wrong;
  result.worst_error = rows.worst_error;
  result.what = rows.wrong > 0 ? rows.what : check_stored(written_view(cache.data(), {}));
  return result;
}

}  // namespace diffkv::bench
