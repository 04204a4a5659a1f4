// Workspace layout, host planner, and the plan as a list.
#include "diffkv/plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "core/layout.h"
#include "core/softmax.h"
#include "core/validate.h"
#include "diffkv/backend.h"
#include "diffkv/error.h"
#include "plan/classes.h"
#include "plan/host_plan.h"
#include "plan/schedule.h"
#include "plan/shares.h"
#include "plan/walk.h"

namespace diffkv {
namespace {

using core::Layout;

// Partial slots of a class that any batch within the maxima can need.
std::int64_t slot_capacity(const PlanKey& key, const ScheduleLimits& limits,
                           const PlanMaxima& maxima, std::int32_t tile_class) {
  const TileClass& cls = limits.classes[tile_class];
  // A worker's share cuts at most two tiles, one where it starts and one where it ends.
  if (key.policy == SchedulePolicy::kBalanced) return 2 * std::int64_t{cls.workers};
  const std::int64_t length = cls.invariant_least_keys;
  const std::int64_t ranges =
      std::min<std::int64_t>(cls.invariant_max_pieces, (maxima.max_seq_len + length - 1) / length);
  const std::int64_t span =
      plan::window_span(key.mask, key.mask.causal && !key.causal_per_seq, key.mm_ranges, cls);
  const std::int64_t pieces = plan::pieces_of_tile(cls, span, length, ranges);
  if (pieces <= 1) return 0;
  const bool last = tile_class + 1 == limits.num_classes;
  const std::int64_t least_rows =
      tile_class == 0 ? 1 : std::int64_t{limits.classes[tile_class - 1].max_seq_rows} + 1;
  const std::int64_t seqs =
      std::min({maxima.max_seqs, maxima.max_tokens, maxima.max_tokens * key.group() / least_rows});
  std::int64_t tiles = cls.invariant_max_tiles;
  if (!last) {
    tiles = std::min<std::int64_t>(tiles, (cls.max_seq_rows + cls.tile_rows - 1) / cls.tile_rows);
  }
  return key.num_kv_heads / cls.tile_heads * pieces * seqs * tiles;
}

detail::PlanTables lay_out(const PlanKey& key, const ScheduleLimits& limits,
                           const PlanMaxima& maxima, Layout& layout) {
  detail::PlanTables tables;
  tables.query_start_loc = layout.take<std::int32_t>(maxima.max_seqs + 1);
  tables.seq_lens = layout.take<std::int32_t>(maxima.max_seqs);
  std::int64_t slots = 0;
  std::int64_t rows = 0;
  for (std::int32_t c = 0; c < limits.num_classes; ++c) {
    tables.cost_before[c] = layout.take<std::int64_t>(maxima.max_seqs + 1);
    tables.starts[c] = layout.take<detail::WorkStart>(limits.classes[c].workers + 1);
    tables.first_pieces[c] = layout.take<detail::FirstPiece>(limits.classes[c].workers);
    tables.arrivals[c] = layout.take<std::uint64_t>(limits.classes[c].workers);
    tables.first_slot[c] = static_cast<std::int32_t>(slots);
    tables.first_partial_row[c] = rows;
    const std::int64_t capacity = slot_capacity(key, limits, maxima, c);
    slots += capacity;
    rows += capacity * limits.classes[c].tile_rows * limits.classes[c].tile_heads;
    if (slots > std::numeric_limits<std::int32_t>::max()) {
      throw Error(
          ErrorCode::kInvalidArgument,
          fmt::format("max_tokens {}, max_seqs {} and max_seq_len {} need {} partials, more "
                      "than a batch-invariant plan can number",
                      maxima.max_tokens, maxima.max_seqs, maxima.max_seq_len, slots));
    }
  }
  if (key.policy == SchedulePolicy::kBatchInvariant) {
    tables.slot_before = layout.take<std::int32_t>(maxima.max_seqs);
  }
  tables.num_slots = static_cast<std::int32_t>(slots);
  tables.partial_stride =
      static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(key.head_size_v)));
  tables.partial_acc = layout.take<float>(rows * tables.partial_stride);
  tables.partial_state = layout.take<core::SoftmaxState>(rows);
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

  std::array<std::int32_t, kMaxTileClasses> next_slot = tables.first_slot;
  for (std::int32_t c = 0; c < limits.num_classes; ++c) tables.cost_before[c][0] = 0;
  for (std::int32_t s = 0; s < view.num_seqs; ++s) {
    const SeqWork work = seq_work(view, seq_mask(view, s));
    for (std::int32_t c = 0; c < limits.num_classes; ++c) {
      tables.cost_before[c][s + 1] =
          tables.cost_before[c][s] + (c == work.tile_class ? work.cost : 0);
    }
    if (tables.slot_before != nullptr) {
      tables.slot_before[s] = next_slot[work.tile_class];
      next_slot[work.tile_class] += work.slots;
    }
  }
  for (std::int32_t c = 0; c < limits.num_classes; ++c) {
    Start start = share_start(view, c, 0);
    tables.starts[c][0] = start.at;
    for (std::int32_t share = 0; share < num_shares(limits.classes[c]); ++share) {
      const Start next = share_start(view, c, share + 1);
      tables.starts[c][share + 1] = next.at;
      tables.first_pieces[c][share] = first_piece_of(view, c, share, start, tables.starts[c]);
      start = next;
    }
    std::fill_n(tables.arrivals[c], limits.classes[c].workers, 0);
  }
}

}  // namespace plan

std::int64_t workspace_bytes(const Backend& backend, const PlanKey& key, const PlanMaxima& maxima) {
  core::validate_key(key);
  core::validate_maxima(key, maxima);
  Layout layout(nullptr);
  lay_out(key, backend.limits(key, maxima.threads), maxima, layout);
  return layout.bytes();
}

Plan make_plan(const Backend& backend, const PlanKey& key, const PlanMaxima& maxima,
               const Batch& batch, const TensorView& workspace, Stream stream) {
  core::validate_key(key);
  core::validate_maxima(key, maxima);
  core::validate_device(backend, "query_start_loc", batch.query_start_loc.device);
  core::validate_batch(key, maxima, batch);
  Plan plan;
  plan.key_ = core::normalised(key);
  const ScheduleLimits limits = backend.limits(key, maxima.threads);
  plan.limits_ = plan::bounded(limits, key, batch);
  plan.max_query_len_ = batch.max_query_len;
  plan.device_ = batch.query_start_loc.device;
  plan.mask_fingerprint_ = core::mask_fingerprint(batch);
  Layout count(nullptr);
  lay_out(key, limits, maxima, count);
  core::validate_workspace(workspace, count.bytes(), batch.query_start_loc.device);
  Layout layout(workspace.data);
  plan.tables_ = lay_out(key, limits, maxima, layout);
  plan.tables_.num_seqs = static_cast<std::int32_t>(batch.num_seqs);
  plan.tables_.num_tokens = static_cast<std::int32_t>(batch.num_actual_tokens);
  plan.tables_.max_tokens = static_cast<std::int32_t>(maxima.max_tokens);
  plan.tables_.max_seq_len = static_cast<std::int32_t>(maxima.max_seq_len);
  backend.plan(key, plan.limits_, batch, plan.tables_, stream);
  return plan;
}

std::vector<WorkItem> Plan::work_items(const Batch& batch) const {
  core::validate_planned(batch, *this);
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
        item.num_kv_heads = piece.tile.num_heads;
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
