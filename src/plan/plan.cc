// Workspace layout, host planner, and the plan as a list.
#include "diffkv/plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "core/validate.h"
#include "diffkv/backend.h"
#include "diffkv/error.h"
#include "plan/host_plan.h"
#include "plan/schedule.h"

namespace diffkv {
namespace {

constexpr std::int64_t kAlignment = 64;

// Partial slots that any batch within the maxima can need.
std::int64_t slot_capacity(const PlanKey& key, const ScheduleLimits& limits,
                           const PlanMaxima& maxima) {
  if (key.policy == SchedulePolicy::kBalanced) {
    std::int64_t slots = 0;
    for (std::int32_t c = 0; c < limits.num_classes; ++c) slots += 2 * limits.classes[c].workers;
    return slots;
  }
  // A worker's share cuts tiles only at absolute key ranges: every tile of a cut sequence has at
  // most `pieces` of them.
  const std::int64_t pieces = std::min<std::int64_t>(
      limits.invariant_max_pieces,
      (maxima.max_seq_len + plan::kLeastInvariantKeys - 1) / plan::kLeastInvariantKeys);
  if (pieces <= 1) return 0;
  std::int64_t tiles = 0;
  std::int64_t least_rows = limits.classes[0].tile_rows;
  for (std::int32_t c = 0; c < limits.num_classes; ++c) {
    tiles = std::max<std::int64_t>(tiles, limits.classes[c].invariant_max_tiles);
    least_rows = std::min<std::int64_t>(least_rows, limits.classes[c].tile_rows);
  }
  const std::int64_t by_rows =
      maxima.max_tokens * key.group() / least_rows + std::min(maxima.max_seqs, maxima.max_tokens);
  return key.num_kv_heads * pieces * std::min(maxima.max_seqs * tiles, by_rows);
}

// Hands out aligned pieces of the workspace; with a null base it only counts.
class Layout {
 public:
  explicit Layout(void* base) : base_(static_cast<std::byte*>(base)) {}

  template <class T>
  T* take(std::int64_t count) {
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + bytes_);
    const std::int64_t bytes = count * static_cast<std::int64_t>(sizeof(T));
    bytes_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return piece;
  }

  std::int64_t bytes() const { return bytes_; }

 private:
  std::byte* base_;
  std::int64_t bytes_ = 0;
};

detail::PlanTables lay_out(const PlanKey& key, const ScheduleLimits& limits,
                           const PlanMaxima& maxima, Layout& layout) {
  detail::PlanTables tables;
  tables.query_start_loc = layout.take<std::int32_t>(maxima.max_seqs + 1);
  tables.seq_lens = layout.take<std::int32_t>(maxima.max_seqs);
  std::int32_t slot = 0;
  for (std::int32_t c = 0; c < limits.num_classes; ++c) {
    tables.cost_before[c] = layout.take<std::int64_t>(maxima.max_seqs + 1);
    tables.starts[c] = layout.take<detail::WorkStart>(limits.classes[c].workers + 1);
    tables.first_slot[c] = slot;
    slot += 2 * limits.classes[c].workers;
    tables.partial_rows = std::max(tables.partial_rows, limits.classes[c].tile_rows);
  }
  if (key.policy == SchedulePolicy::kBatchInvariant) {
    tables.slot_before = layout.take<std::int32_t>(maxima.max_seqs + 1);
  }
  const std::int64_t slots = slot_capacity(key, limits, maxima);
  if (slots > std::numeric_limits<std::int32_t>::max() / tables.partial_rows) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("max_tokens {}, max_seqs {} and max_seq_len {} need {} partials, more "
                            "than a batch-invariant plan can number",
                            maxima.max_tokens, maxima.max_seqs, maxima.max_seq_len, slots));
  }
  tables.num_slots = static_cast<std::int32_t>(slots);
  tables.partial_stride =
      static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(key.head_size_v)));
  const std::int64_t rows = std::int64_t{tables.num_slots} * tables.partial_rows;
  tables.partial_acc = layout.take<float>(rows * tables.partial_stride);
  tables.partial_max = layout.take<float>(rows);
  tables.partial_sum = layout.take<float>(rows);
  tables.scratch = layout.take<std::byte>(limits.threads * limits.scratch_bytes);
  return tables;
}

}  // namespace

namespace plan {

void plan_on_host(const PlanKey& key, const ScheduleLimits& limits, const Batch& batch,
                  detail::PlanTables& tables) {
  const auto* query_start_loc = static_cast<const std::int32_t*>(batch.query_start_loc.data);
  const auto* seq_lens = static_cast<const std::int32_t*>(batch.seq_lens.data);
  const std::int64_t loc_stride = batch.query_start_loc.strides[0];
  const std::int64_t len_stride = batch.seq_lens.given() ? batch.seq_lens.strides[0] : 1;
  tables.query_start_loc[0] = 0;
  for (std::int64_t s = 0; s < batch.num_seqs; ++s) {
    tables.query_start_loc[s + 1] = query_start_loc[(s + 1) * loc_stride];
    tables.seq_lens[s] = seq_lens[s * len_stride];
  }
  const ScheduleView view = schedule_view(key, limits, tables, batch);

  for (std::int32_t c = 0; c < limits.num_classes; ++c) tables.cost_before[c][0] = 0;
  if (tables.slot_before != nullptr) tables.slot_before[0] = 0;
  for (std::int32_t s = 0; s < view.num_seqs; ++s) {
    const SeqMask seq = seq_mask(view, s);
    const SeqTiles tiles = seq_tiles(view, seq.query_len);
    const std::int64_t cost = view.num_kv_heads * head_cost(view, seq, tiles);
    for (std::int32_t c = 0; c < limits.num_classes; ++c) {
      tables.cost_before[c][s + 1] = tables.cost_before[c][s] + (c == tiles.tile_class ? cost : 0);
    }
    if (tables.slot_before != nullptr) {
      const std::int32_t pieces = invariant_cut(view, tiles, seq.seq_len).pieces;
      const std::int32_t slots = pieces > 1 ? pieces * tiles.tiles_per_head * view.num_kv_heads : 0;
      tables.slot_before[s + 1] = tables.slot_before[s] + slots;
    }
  }
  for (std::int32_t c = 0; c < limits.num_classes; ++c) {
    const std::int64_t total = tables.cost_before[c][view.num_seqs];
    const std::int64_t workers = limits.classes[c].workers;
    for (std::int64_t w = 0; w <= workers; ++w) {
      // total / workers * w without overflow.
      const std::int64_t target = total / workers * w + total % workers * w / workers;
      tables.starts[c][w] = locate(view, c, target, total / workers);
    }
  }
}

}  // namespace plan

std::int64_t workspace_bytes(const Backend& backend, const PlanKey& key, const PlanMaxima& maxima) {
  core::validate_key(key);
  core::validate_maxima(key, maxima);
  Layout layout(nullptr);
  lay_out(key, backend.limits(key), maxima, layout);
  return layout.bytes();
}

Plan make_plan(const Backend& backend, const PlanKey& key, const PlanMaxima& maxima,
               const Batch& batch, const TensorView& workspace, Stream stream) {
  core::validate_key(key);
  core::validate_maxima(key, maxima);
  core::validate_device(backend, "query_start_loc", batch.query_start_loc.device);
  core::validate_batch(key, maxima, batch);
  Plan plan;
  plan.key_ = key;
  plan.limits_ = backend.limits(key);
  plan.device_ = batch.query_start_loc.device;
  Layout layout(workspace.data);
  plan.tables_ = lay_out(key, plan.limits_, maxima, layout);
  core::validate_workspace(workspace, layout.bytes(), batch.query_start_loc.device);
  plan.tables_.num_seqs = static_cast<std::int32_t>(batch.num_seqs);
  plan.tables_.num_tokens = static_cast<std::int32_t>(batch.num_actual_tokens);
  backend.plan(key, plan.limits_, batch, plan.tables_, stream);
  return plan;
}

std::vector<WorkItem> Plan::work_items(const Batch& batch) const {
  const plan::ScheduleView view = plan::schedule_view(key_, limits_, tables_, batch);
  std::vector<WorkItem> items;
  for (std::int32_t c = 0; c < limits_.num_classes; ++c) {
    for (std::int32_t w = 0; w < limits_.classes[c].workers; ++w) {
      plan::for_each_piece(view, c, w, [&](const plan::Piece& piece) {
        WorkItem item;
        item.tile_class = c;
        item.worker = w;
        item.seq = piece.seq;
        item.kv_head = piece.tile.kv_head;
        item.first_row = piece.tile.first_row;
        item.num_rows = piece.tile.num_rows;
        item.slot = piece.slot;
        // Neighbouring blocks unite, so there are at most two ranges.
        std::size_t used = 0;
        for (std::int32_t v = piece.begin_block; v < piece.end_block; ++v) {
          const KeyRange keys = piece.tile.keys_at(v);
          if (v > piece.begin_block && item.keys[used].end == keys.begin) {
            item.keys[used].end = keys.end;
          } else {
            if (v > piece.begin_block) ++used;
            item.keys[used] = keys;
          }
        }
        items.push_back(item);
      });
    }
  }
  return items;
}

}  // namespace diffkv
