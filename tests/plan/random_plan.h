// Plans of random batches, with tables of their own, for tests.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "diffkv/backend.h"
#include "diffkv/plan.h"
#include "plan/classes.h"
#include "plan/host_plan.h"
#include "plan/schedule.h"

namespace diffkv::plan {

inline constexpr int kRandomBatches = 200;

inline int uniform(std::mt19937& rng, int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(rng);
}

// A batch, limits of small tiles and blocks, and plan tables big enough for them.
struct Planned {
  PlanKey key;
  ScheduleLimits limits;
  std::vector<std::int32_t> query_start_loc{0};
  std::vector<std::int32_t> seq_lens;
  std::vector<std::int32_t> prefix_lens;
  std::vector<std::int32_t> mm_ranges;
  std::vector<std::uint8_t> causal;
  Batch batch;
  std::vector<std::int32_t> loc_copy, len_copy, slot_before;
  std::vector<std::int64_t> cost_before[kMaxTileClasses];
  std::vector<WorkStart> starts[kMaxTileClasses];
  std::vector<detail::FirstPiece> first_pieces[kMaxTileClasses];
  std::vector<std::uint64_t> arrivals[kMaxTileClasses];
  PlanTables tables;

  explicit Planned(std::mt19937& rng, SchedulePolicy policy) {
    key.num_kv_heads = uniform(rng, 1, 4);
    key.num_heads = key.num_kv_heads * uniform(rng, 1, 5);
    key.head_size_qk = key.head_size_v = 8;
    key.policy = policy;
    key.mask.causal = uniform(rng, 0, 3) != 0;
    const int kind = uniform(rng, 0, 3);
    if (kind == 1) {
      constexpr int kWidest[] = {40, 2000, 6000};
      key.mask.window = uniform(rng, 1, kWidest[uniform(rng, 0, 2)]);
    }
    if (kind == 2) {
      key.mask.chunk_size = uniform(rng, 1, 50);
      key.mask.chunk_lookback = uniform(rng, 0, 2);
    }
    if (kind == 3) key.mask.prefix_window = uniform(rng, 1, 40);
    key.causal_per_seq = uniform(rng, 0, 3) == 0;
    key.mm_ranges = uniform(rng, 0, 2) == 0;
    key.mask.clamp_mm_ranges = key.mm_ranges && uniform(rng, 0, 1) == 0;
    if (key.mask.clamp_mm_ranges) key.mask.window = uniform(rng, 1, 20);

    const int num_seqs = uniform(rng, 0, 6);
    for (int s = 0; s < num_seqs; ++s) {
      const int query_len = uniform(rng, 0, 3) == 0 ? uniform(rng, 0, 90) : uniform(rng, 0, 3);
      // Short ones have fewer blocks than workers.
      constexpr int kLongest[] = {5, 90, 9000, 9000, 9000};
      const int seq_len = uniform(rng, 0, kLongest[uniform(rng, 0, 4)]);
      query_start_loc.push_back(query_start_loc.back() + query_len);
      seq_lens.push_back(seq_len);
      prefix_lens.push_back(uniform(rng, 0, seq_len + 5));
      causal.push_back(static_cast<std::uint8_t>(uniform(rng, 0, 1)));
      const int first = uniform(rng, 0, seq_len + 1);
      const int middle = first + uniform(rng, 0, 30);
      for (int x : {first, middle, middle + 1, middle + uniform(rng, 0, 30)}) {
        mm_ranges.push_back(x);
      }
    }
    batch.num_seqs = num_seqs;
    batch.num_actual_tokens = query_start_loc.back();
    batch.query_start_loc = view_of(std::as_const(query_start_loc).data(), {num_seqs + 1});
    batch.seq_lens = view_of(std::as_const(seq_lens).data(), {num_seqs});
    if (key.mask.prefix_window > 0) {
      batch.prefix_lens = view_of(std::as_const(prefix_lens).data(), {num_seqs});
    }
    if (key.mm_ranges) {
      batch.mm_ranges = view_of(std::as_const(mm_ranges).data(), {num_seqs, 2, 2});
    }
    if (key.causal_per_seq) {
      batch.causal_per_seq = ConstTensorView(causal.data(), DType::kBool, {num_seqs});
    }

    limits.num_classes = uniform(rng, 1, 2);
    limits.threads = uniform(rng, 1, 3);
    for (int c = 0; c < limits.num_classes; ++c) {
      TileClass& cls = limits.classes[c];
      cls.tile_rows = c == 0 ? 4 : 12;
      cls.max_seq_rows = 4;
      cls.block_keys = 16;
      const auto divisor = [&](std::int64_t of) {
        const int n = static_cast<int>(of);
        return uniform(rng, 0, 1) == 0 ? n : n % 2 == 0 ? 2 : 1;
      };
      cls.tile_heads = divisor(key.num_kv_heads);
      cls.head_lanes = divisor(key.num_kv_heads / cls.tile_heads);
      cls.workers = cls.head_lanes * uniform(rng, 1, 5);
      cls.tile_cost = uniform(rng, 1, 20);
      cls.block_cost = uniform(rng, 1, 10);
      cls.least_cut = uniform(rng, 1, 4);
      cls.uncut_per_share = 16;
      cls.least_share_cost = uniform(rng, 0, 1) == 0 ? 0 : uniform(rng, 1, 2000);
      cls.takes_smaller = uniform(rng, 0, 1) == 0;
      cls.invariant_max_tiles = 3;
      cls.invariant_max_pieces = 4;
      cls.invariant_least_keys = 1024 << uniform(rng, 0, 1);
    }
    // Some queries are longer than the batch says.
    if (uniform(rng, 0, 1) == 0) batch.max_query_len = uniform(rng, 1, 6);
    limits = bounded(limits, key, batch);
    loc_copy.resize(query_start_loc.size());
    len_copy.resize(seq_lens.size() + 1);
    slot_before.resize(query_start_loc.size());
    tables.query_start_loc = loc_copy.data();
    tables.seq_lens = len_copy.data();
    if (policy == SchedulePolicy::kBatchInvariant) tables.slot_before = slot_before.data();
    for (int c = 0; c < limits.num_classes; ++c) {
      cost_before[c].resize(query_start_loc.size());
      starts[c].resize(static_cast<std::size_t>(limits.classes[c].workers) + 1);
      tables.cost_before[c] = cost_before[c].data();
      tables.starts[c] = starts[c].data();
      first_pieces[c].resize(static_cast<std::size_t>(limits.classes[c].workers));
      tables.first_pieces[c] = first_pieces[c].data();
      arrivals[c].resize(static_cast<std::size_t>(limits.classes[c].workers));
      tables.arrivals[c] = arrivals[c].data();
      tables.first_slot[c] = tables.num_slots;
      tables.num_slots += 2 * limits.classes[c].workers;
    }
    plan_on_host(key, limits, batch, tables);
    if (policy == SchedulePolicy::kBatchInvariant) {
      // Each class numbers its slots from its own start on.
      tables.num_slots = 0;
      const ScheduleView counted = view();
      for (int c = 0; c < limits.num_classes; ++c) {
        tables.first_slot[c] = tables.num_slots;
        for (int s = 0; s < num_seqs; ++s) {
          const SeqMask seq = seq_mask(counted, s);
          const SeqTiles tiles = seq_tiles(counted, seq.query_len);
          if (tiles.tile_class != c) continue;
          const InvariantCut cut = invariant_cut(counted, tiles, seq);
          if (cut.ranges <= 1) continue;
          tables.num_slots += cut.slots_per_tile * tiles.count();
        }
      }
      plan_on_host(key, limits, batch, tables);
    }
  }

  ScheduleView view() const { return schedule_view(key, limits, tables, batch); }
};

// Of a test's parameter, in the test's name.
inline std::string policy_name(const testing::TestParamInfo<SchedulePolicy>& policy) {
  return policy.param == SchedulePolicy::kBalanced ? "Balanced" : "BatchInvariant";
}

// Calls fn(planned, its view) for plans of random batches, until one fails.
template <class Fn>
void on_random_batches(SchedulePolicy policy, Fn&& fn) {
  for (unsigned seed = 0; seed < kRandomBatches; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937 rng(seed);
    const Planned planned(rng, policy);
    fn(planned, planned.view());
    if (testing::Test::HasFailure()) return;
  }
}

}  // namespace diffkv::plan
