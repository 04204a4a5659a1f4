// Attention in two parts, as engines do with a shared prefix: the keys below a cut, which every row
// sees, and the rest, by merge_attn_states.
#include <cstdint>
#include <iterator>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "verify/codec.h"
#include "verify/run_flow.h"

namespace diffkv::verify {
namespace {

// A part of the whole, in the backend's memory: its batch, with tensors of its own where it
// differs, and its own output and lse; in place of them the whole's where in_place is set.
class Part {
 public:
  // `whole` is in the backend's memory; an empty table means the whole's.
  Part(const Backend& backend, const AttendArgs& whole, std::vector<std::int32_t> seq_lens,
       std::vector<std::int32_t> table, bool in_place)
      : backend_(&backend),
        seq_lens_(std::move(seq_lens)),
        table_(std::move(table)),
        index_(backend, whole.output.device),
        output_(backend, "part output", whole.output.numel() * size_of(whole.output.dtype),
                whole.output.device),
        lse_(backend, "part lse", whole.lse.numel() * size_of(DType::kF32), whole.lse.device),
        args_(whole) {
    const std::int64_t num_seqs = whole.batch.num_seqs;
    const auto place = [&](std::vector<std::int32_t>& values) {
      if (!values.empty()) index_.add(values.data(), std::ssize(values) * 4);
    };
    place(seq_lens_);
    place(table_);
    index_.upload();
    args_.batch.seq_lens = index_.on_device(view_of(seq_lens_.data(), {num_seqs}));
    if (!table_.empty()) {
      args_.batch.block_table =
          index_.on_device(view_of(table_.data(), {num_seqs, std::ssize(table_) / num_seqs}));
    }
    if (in_place) return;
    args_.output = TensorView(output_.data(), whole.output.dtype,
                              {whole.output.shape[0], whole.output.shape[1], whole.output.shape[2]},
                              whole.output.device);
    args_.lse = TensorView(lse_.data(), DType::kF32, {whole.lse.shape[0], whole.lse.shape[1]},
                           whole.lse.device);
  }

  const AttendArgs& args() const { return args_; }

  // "" or which guard zone was overwritten.
  std::string attend(const PlacedProblem& problem, const PlanKey& key) const {
    AttentionParams params = problem.params();
    params.sink_mode = SinkMode::kOut;
    const PlanMaxima& maxima = problem.host().maxima();
    const PlanMemory memory(*backend_, key, maxima, problem.device());
    const Plan plan = make_plan(*backend_, key, maxima, args_.batch, memory.view());
    diffkv::attend(*backend_, params, args_, plan);
    for (std::string what : {memory.guard_damage(), output_.guard_damage(), lse_.guard_damage()}) {
      if (!what.empty()) return what;
    }
    return "";
  }

 private:
  const Backend* backend_;
  std::vector<std::int32_t> seq_lens_;
  std::vector<std::int32_t> table_;  // empty: the whole's
  device::Mirror index_;
  GuardedMemory output_;
  GuardedMemory lse_;
  AttendArgs args_;
};

// Some kernels mark an empty part by +inf, which must be read as -inf: every other covered token's
// empty lse becomes so.
void mark_empty_rows(const Backend& backend, const TensorView& lse, std::int64_t covered) {
  const std::int64_t elements =
      (lse.shape[0] - 1) * lse.strides[0] + (lse.shape[1] - 1) * lse.strides[1] + 1;
  std::vector<float> values(static_cast<std::size_t>(elements));
  const std::int64_t bytes = elements * size_of(DType::kF32);
  backend.copy_to_host(values.data(), lse.data, bytes, lse.device, {});
  backend.synchronize(lse.device, {});
  for (std::int64_t head = 0; head < lse.shape[0]; ++head) {
    for (std::int64_t token = 0; token < covered; token += 2) {
      float& value =
          values[static_cast<std::size_t>(head * lse.strides[0] + token * lse.strides[1])];
      if (value == -std::numeric_limits<float>::infinity()) value = -value;
    }
  }
  backend.copy_to_device(lse.data, values.data(), bytes, lse.device, {});
  backend.synchronize(lse.device, {});
}

}  // namespace

std::string attend_by_merge(const PlacedProblem& problem) {
  const AttendArgs& whole = problem.args();
  const Batch& batch = problem.host().args().batch;
  const std::int64_t block_size = whole.cache.block_size;
  const std::int64_t width = batch.block_table.shape[1];

  // The cut: half of each sequence's context, in whole pages; none for a short context.
  std::vector<std::int32_t> below(static_cast<std::size_t>(batch.num_seqs));
  std::vector<std::int32_t> above(below.size());
  std::vector<std::int32_t> table(below.size() * static_cast<std::size_t>(width), 0x3fffffff);
  for (std::size_t s = 0; s < below.size(); ++s) {
    const auto seq = static_cast<std::int64_t>(s);
    const std::int64_t len = index_at(batch.seq_lens, seq);
    const std::int64_t context =
        len - index_at(batch.query_start_loc, seq + 1) + index_at(batch.query_start_loc, seq);
    const std::int64_t pages = context > 0 ? (context / 2 + block_size - 1) / block_size : 0;
    const std::int64_t cut = pages * block_size > context ? 0 : pages;
    below[s] = static_cast<std::int32_t>(cut * block_size);
    above[s] = static_cast<std::int32_t>(len) - below[s];
    for (std::int64_t b = cut; b < width; ++b) {
      table[s * static_cast<std::size_t>(width) + static_cast<std::size_t>(b - cut)] =
          static_cast<std::int32_t>(index_at(batch.block_table, seq, b));
    }
  }

  const Backend& backend = problem.backend();
  const Part first(backend, whole, std::move(below), {}, problem.host().source().merge_in_place);
  const Part second(backend, whole, std::move(above), std::move(table), false);
  PlanKey first_key = problem.host().key();
  first_key.mask.causal = false;
  std::string what = first.attend(problem, first_key);
  if (what.empty()) what = second.attend(problem, problem.host().key());
  if (!what.empty()) return what;

  const std::int64_t covered = problem.host().covered_tokens();
  mark_empty_rows(backend, first.args().lse, covered);
  // Only covered rows were written, so only they can be merged.
  const auto rows = [&](TensorView view, int token_dim) {
    view.shape[static_cast<std::size_t>(token_dim)] = covered;
    return view;
  };
  merge_attn_states(backend, {rows(first.args().output, 0), rows(first.args().lse, 1)},
                    {rows(second.args().output, 0), rows(second.args().lse, 1)},
                    problem.params().sinks, rows(whole.output, 0), rows(whole.lse, 1));
  backend.synchronize(problem.device(), {});  // before the parts' memory goes
  return "";
}

}  // namespace diffkv::verify
