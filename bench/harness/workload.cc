#include "bench/harness/workload.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>

#include "diffkv/cache.h"
#include "diffkv/error.h"
#include "verify/codec.h"
#include "verify/compare.h"
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

Workload::Workload(const Backend& backend, const Scenario& scenario)
    : backend_(backend),
      scenario_(scenario),
      key_(scenario.key()),
      maxima_{.max_tokens = scenario.num_tokens(),
              .max_seqs = static_cast<std::int64_t>(scenario.seqs.size()),
              .max_seq_len = scenario.max_seq_len()},
      inputs_(make_inputs(scenario)),
      kv_scale_(is_fp8(scenario.kv_dtype) ? kFp8Scale : 1.0F) {
  make_cache();
  make_batch();
  std::mt19937_64 random(kSeed);
  std::normal_distribution<float> normal;
  sinks_.resize(static_cast<std::size_t>(scenario.num_heads));
  for (float& sink : sinks_) sink = normal(random);
  params_.scale = 1.0F / std::sqrt(static_cast<float>(scenario.head_size_qk));
  if (scenario.sinks) params_.sinks = view_of(sinks_.data(), {scenario.num_heads});

  const std::int64_t tokens = scenario.num_tokens();
  const std::int64_t output_elements = tokens * scenario.num_heads * scenario.head_size_v;
  output_memory_ = allocate(output_elements * size_of(scenario.dtype));
  args_.output = TensorView(output_memory_.get(), scenario.dtype,
                            {tokens, scenario.num_heads, scenario.head_size_v});
  args_.query = inputs_.query(kStepOffset, tokens);
  const std::int64_t bytes = workspace_bytes(backend_, key_, maxima_);
  workspace_memory_ = allocate(bytes);
  workspace_ = TensorView(workspace_memory_.get(), DType::kU8, {bytes});
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
  return problem;
}

Workload::Memory Workload::allocate(std::int64_t bytes) const {
  Memory memory(backend_.allocate(std::max<std::int64_t>(bytes, 1), Device{}), Free{&backend_});
  std::memset(memory.get(), 0xff, static_cast<std::size_t>(bytes));
  return memory;
}

void Workload::make_cache() {
  const bool dense = scenario_.block_size == 0;
  const std::int64_t page = dense ? 1 : scenario_.block_size;
  for (const Seq& seq : scenario_.seqs) {
    first_token_.push_back(capacity_);
    capacity_ += (seq.seq_len + page - 1) / page * page;
  }
  // Of contiguous keys, one page that holds all of them.
  const KvCacheSpec spec{.block_size = dense ? capacity_ : page,
                         .num_kv_heads = scenario_.num_kv_heads,
                         .head_size_qk = scenario_.head_size_qk,
                         .head_size_v = scenario_.head_size_v,
                         .dtype = scenario_.kv_dtype};
  const std::int64_t pages = dense ? 1 : capacity_ / page;
  cache_memory_ = allocate(spec.page_stride_bytes() * pages);
  written_ = spec.view(cache_memory_.get(), pages);
  page_order_.resize(static_cast<std::size_t>(pages));
  std::iota(page_order_.begin(), page_order_.end(), 0);
  std::mt19937_64 random(kSeed);
  std::shuffle(page_order_.begin(), page_order_.end(), random);
  if (is_fp8(scenario_.kv_dtype)) {
    written_.k_scale = view_of(&kv_scale_, {1});
    written_.v_scale = view_of(&kv_scale_, {1});
  }
  args_.cache = written_;
  if (!dense) return;
  const auto rows_of = [&](const KvPlane& plane, std::int64_t size) {
    ConstTensorView view(plane.data, plane.dtype, {capacity_, scenario_.num_kv_heads, size});
    view.strides[0] = plane.stride_token;
    view.strides[1] = plane.stride_head;
    return view;
  };
  args_.cache = KvCacheView::dense_tokens(rows_of(written_.key, scenario_.head_size_qk),
                                          rows_of(written_.value, scenario_.head_size_v));
  args_.cache.k_scale = written_.k_scale;
  args_.cache.v_scale = written_.v_scale;
}

std::int64_t Workload::slot_of(std::int64_t seq, std::int64_t position) const {
  const std::int64_t token = first_token_[static_cast<std::size_t>(seq)] + position;
  const std::int64_t page = written_.block_size;
  return page_order_[static_cast<std::size_t>(token / page)] * page + token % page;
}

void Workload::make_batch() {
  const auto num_seqs = static_cast<std::int64_t>(scenario_.seqs.size());
  const std::int64_t page = written_.block_size;
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
  Batch& batch = args_.batch;
  batch.num_seqs = num_seqs;
  batch.num_actual_tokens = scenario_.num_tokens();
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
    const auto seq = static_cast<std::int64_t>(s);
    for (std::int64_t j = 0; j < context; j += kChunk) {
      const std::int64_t n = std::min(kChunk, context - j);
      slots.clear();
      for (std::int64_t i = 0; i < n; ++i) slots.push_back(slot_of(seq, j + i));
      const std::int64_t offset = input_offset(seq, j);
      diffkv::update_cache(backend_, inputs_.key(offset, n), inputs_.value(offset, n), written_,
                           view_of(slots.data(), {n}));
    }
  }
}

void Workload::update_cache() {
  const std::int64_t tokens = scenario_.num_tokens();
  diffkv::update_cache(backend_, inputs_.key(kStepOffset, tokens),
                       inputs_.value(kStepOffset, tokens), written_,
                       view_of(slot_mapping_.data(), {tokens}));
}

void Workload::make_plan() {
  plan_ = diffkv::make_plan(backend_, key_, maxima_, args_.batch, workspace_);
}

void Workload::attend() { diffkv::attend(backend_, params_, args_, plan_); }

std::string Workload::check_stored() const {
  const std::int64_t tokens = scenario_.num_tokens();
  const ConstTensorView key = inputs_.key(kStepOffset, tokens);
  const ConstTensorView value = inputs_.value(kStepOffset, tokens);
  const auto differs = [&](const KvPlane& plane, const ConstTensorView& from, std::int64_t token,
                           std::int64_t head) {
    const std::int64_t slot = slot_mapping_[static_cast<std::size_t>(token)];
    const std::int64_t at = slot / written_.block_size * plane.stride_block +
                            slot % written_.block_size * plane.stride_token +
                            head * plane.stride_head;
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
      const bool key_differs = differs(written_.key, key, token, head);
      if (key_differs || differs(written_.value, value, token, head)) {
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
  } catch (const Error& error) {
    result.what = error.what();
    return result;
  }
  const verify::RowsCheck rows =
      verify::check_rows(key_, params_, args_, tolerance, kVerifyWork, kSeed);
  result.rows = rows.rows;
  result.wrong = rows.wrong;
  result.worst_error = rows.worst_error;
  result.what = rows.wrong > 0 ? rows.what : check_stored();
  return result;
}

}  // namespace diffkv::bench
