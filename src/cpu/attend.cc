// Attention of one worker's share: pieces of tiles to output rows or partials. One source for
// decode and prefill tiles; they differ in the number of vectors of rows that share a converted
// key.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "core/layout.h"
#include "core/mask.h"
#include "core/softmax.h"
#include "cpu/kernels.h"
#include "cpu/simd_targets.h"
#include "cpu/tile_base.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/attend.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// Highway's headers must come after foreach_target.h.
#include "cpu/codec-inl.h"
#include "cpu/lanes-inl.h"
#include "cpu/narrow-inl.h"
#include "cpu/wide-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace diffkv::cpu::HWY_NAMESPACE {
namespace {

constexpr std::int64_t kGroupWidth = kGroupVectors * kLanes;

// Soft cap and ALiBi of a call on one sequence.
ScoreRules rules_of(const AttentionParams& params, const core::SeqMask& seq) {
  ScoreRules rules;
  rules.soft_cap = params.soft_cap;
  rules.alibi = params.alibi_slopes.given();
  rules.alibi_sqrt = params.alibi_sqrt;
  rules.context_len = static_cast<std::int32_t>(seq.context_len());
  return rules;
}

// A tile of many rows: rows in the lanes, keys and values converted once into scratch.
class WideTile : TileBase {
 public:
  WideTile(const AttendCall& call, const plan::Piece& piece, std::byte* scratch)
      : WideTile(call, piece, core::Layout(scratch)) {}

  void run() {
    load_rows();
    for (std::int32_t v = piece_.begin_block; v < piece_.end_block; ++v) {
      if (v > piece_.begin_block && (v - piece_.begin_block) % kFoldBlocks == 0) fold();
      run_block(piece_.tile.keys_at(v));
    }
    if (folded_any_) fold();
    const float* sums = folded_any_ ? own_.folded : own_.acc;
    const float* max = folded_any_ ? own_.folded_max : own_.max;
    const float* sum = folded_any_ ? own_.folded_sum : own_.sum;
    for (std::int64_t row = 0; row < num_rows(); ++row) {
      float* acc = destination(row, own_.row);
      for (std::int64_t c = 0; c < args_.cache.head_size_v; ++c) {
        acc[c] = sums[place(row, args_.cache.head_size_v, c)];
      }
      finish_row(row, {max[row], sum[row]}, acc);
    }
  }

 private:
  WideTile(const AttendCall& call, const plan::Piece& piece, core::Layout take)
      : TileBase(call, piece),
        width_((num_rows() + kLanes - 1) / kLanes * kLanes),
        own_(take, width_, kGroupWidth, args_.cache.head_size_qk, args_.cache.head_size_v) {
    find_rows(width_, own_.rows);
    rules_ = rules_of(params_, seq_);
  }

  // Moves what was accumulated into the outer sums and starts anew.
  void fold() {
    const LaneTag d;
    const std::int64_t head_size = args_.cache.head_size_v;
    if (!folded_any_) {
      std::fill_n(own_.folded, width_ * head_size, 0.0F);
      std::fill_n(own_.folded_max, width_, core::kNegInf);
      std::fill_n(own_.folded_sum, width_, 0.0F);
      folded_any_ = true;
    }
    for (std::int64_t first = 0; first < width_; first += kGroupWidth) {
      const std::int64_t group_width = std::min(width_ - first, kGroupWidth);
      HWY_ALIGN float keep[kGroupWidth];
      HWY_ALIGN float add[kGroupWidth];
      for (std::int64_t r = 0; r < group_width; ++r) {
        core::SoftmaxState state{own_.folded_max[first + r], own_.folded_sum[first + r]};
        core::merge(state, {own_.max[first + r], own_.sum[first + r]}, keep[r], add[r]);
        own_.folded_max[first + r] = state.max;
        own_.folded_sum[first + r] = state.sum;
      }
      for (std::int64_t i = 0; i < head_size * group_width; i += kLanes) {
        const std::int64_t r = i % group_width;
        const std::int64_t at = first * head_size + i;
        fold_lanes(own_.folded + at, hn::Load(d, keep + r), own_.acc + at, hn::Load(d, add + r));
      }
    }
    clear();
  }

  void clear() {
    std::fill_n(own_.acc, width_ * args_.cache.head_size_v, 0.0F);
    std::fill_n(own_.max, width_, core::kNegInf);
    std::fill_n(own_.sum, width_, 0.0F);
  }

  // Element (i, row) of a [size, rows] array, which is stored group by group.
  std::int64_t place(std::int64_t row, std::int64_t size, std::int64_t i) const {
    const std::int64_t group = row / kGroupWidth * kGroupWidth;
    return group * size + i * std::min(width_ - group, kGroupWidth) + (row - group);
  }

  void load_rows() {
    const std::int64_t head_size = args_.cache.head_size_qk;
    const float scale = query_scale();
    std::fill_n(own_.query, width_ * head_size, 0.0F);
    clear();
    for (std::int64_t row = 0; row < num_rows(); ++row) {
      with_dtype(args_.query.dtype, [&](auto dtype) HWY_ATTR {
        load_row<decltype(dtype)::value>(query_of(row), head_size, own_.row);
      });
      for (std::int64_t i = 0; i < head_size; ++i) {
        own_.query[place(row, head_size, i)] = own_.row[i] * scale;
      }
    }
  }

  void load_keys() {
    const std::int64_t n = args_.cache.head_size_qk;
    with_dtype(args_.cache.key.dtype, [&](auto dtype) HWY_ATTR {
      for (std::int64_t k = 0; k < rows_.count(); ++k) {
        load_row<decltype(dtype)::value>(rows_.key[static_cast<std::size_t>(k)], n,
                                         own_.keys + k * n);
      }
    });
    const std::int64_t padded = (rows_.count() + kKeyPadding - 1) / kKeyPadding * kKeyPadding;
    std::fill(own_.keys + rows_.count() * n, own_.keys + padded * n, 0.0F);
  }

  // Returns whether every value is finite.
  bool load_values() {
    const RowTag d;
    RowVec zeros = hn::Zero(d);  // NaN once an infinity or a NaN was multiplied by zero
    with_dtype(args_.cache.value.dtype, [&](auto dtype) HWY_ATTR {
      for (std::int64_t k = 0; k < rows_.count(); ++k) {
        const std::byte* row = rows_.value[static_cast<std::size_t>(k)];
        for (std::int64_t c = 0; c < args_.cache.head_size_v;
             c += static_cast<std::int64_t>(hn::MaxLanes(d))) {
          const RowVec x = load_lanes<decltype(dtype)::value>(d, row, c);
          zeros = hn::MulAdd(x, hn::Zero(d), zeros);
          hn::StoreU(x, d, own_.values + (c / 8) * (kBlockKeys * 8) + k * 8 + c % 8);
        }
      }
    });
    return hn::AllFalse(d, hn::IsNaN(zeros));
  }

  void run_block(KeyRange range) {
    source_.locate(range, rows_);
    load_keys();
    const bool finite = load_values();
    const bool all_seen = seen_by_all(range);
    for (std::int64_t row = 0; row < width_; row += kGroupWidth) {
      switch (std::min(width_ - row, kGroupWidth) / kLanes) {
        case 1:
          run_group<1>(row, all_seen, finite);
          break;
        case 2:
          run_group<2>(row, all_seen, finite);
          break;
        default:
          run_group<kGroupVectors>(row, all_seen, finite);
      }
    }
  }

  template <int kVectors>
  void run_group(std::int64_t row, bool all_seen, bool finite) {
    constexpr std::int64_t kWidth = kVectors * kLanes;
    const KvCacheView& cache = args_.cache;
    const KeyRange range = rows_.range;
    const std::int64_t num_keys = rows_.count();
    GroupBuffers group;
    group.query = own_.query + row * cache.head_size_qk;
    group.acc = own_.acc + row * cache.head_size_v;
    group.scores = own_.scores;
    group.max = own_.max + row;
    group.sum = own_.sum + row;
    group.rows = info_.from(row);
    score_block<kVectors>(group, own_.keys, num_keys, cache.head_size_qk);
    if (rules_.any()) apply_rules(rules_, group, kWidth, range.begin, num_keys);
    const std::int64_t count = std::min(kWidth, num_rows() - row);
    const bool biased = add_qq_bias(range, row, count, own_.scores, kWidth, /*row_stride=*/1);
    if (!all_seen) apply_mask(group, kWidth, range.begin, num_keys);
    softmax_block<kVectors>(group, num_keys, own_.keep);
    if (finite || (all_seen && !biased)) {
      accumulate_block<kVectors>(group, own_.values, num_keys, cache.head_size_v, own_.keep);
    } else {
      mark_hidden(range, row, count, own_.scores, kWidth, /*row_stride=*/1);
      accumulate_visible(group, kWidth, own_.values, num_keys, cache.head_size_v, own_.keep);
    }
  }

  std::int64_t width_;  // rows rounded up to whole vectors
  ScoreRules rules_;
  BlockRows rows_;
  WideScratch own_;
  bool folded_any_ = false;
};

// A tile of up to kRows rows: the head dimension in the lanes, nothing copied.
template <int kRows>
class NarrowTile : TileBase {
 public:
  NarrowTile(const AttendCall& call, const plan::Piece& piece, core::Layout take)
      : TileBase(call, piece),
        padded_qk_(padded_to_lanes(args_.cache.head_size_qk)),
        padded_v_(padded_to_lanes(args_.cache.head_size_v)),
        own_(take, kRows, padded_qk_, padded_v_) {
    find_rows(kRows, own_.info);
    rules_ = rules_of(params_, seq_);
  }

  void run() {
    load_rows();
    if (piece_.begin_block < piece_.end_block) {
      source_.locate(piece_.tile.keys_at(piece_.begin_block), rows_);
    }
    for (std::int32_t v = piece_.begin_block; v < piece_.end_block; ++v) {
      if (v > piece_.begin_block && (v - piece_.begin_block) % kFoldBlocks == 0) fold();
      const bool more = v + 1 < piece_.end_block;
      if (more) source_.locate(piece_.tile.keys_at(v + 1), next_);
      run_block(more ? next_ : rows_);
      if (more) std::swap(rows_, next_);
    }
    if (folded_any_) fold();
    const float* sums = folded_any_ ? own_.folded : own_.acc;
    const core::SoftmaxState* states = folded_any_ ? folded_state_ : state_;
    for (std::int64_t row = 0; row < num_rows(); ++row) {
      float* acc = destination(row, own_.row);
      std::copy_n(sums + row * padded_v_, args_.cache.head_size_v, acc);
      finish_row(row, states[row], acc);
    }
  }

 private:
  // Moves what was accumulated into the outer sums and starts anew.
  void fold() {
    const LaneTag d;
    if (!folded_any_) std::fill_n(own_.folded, kRows * padded_v_, 0.0F);
    folded_any_ = true;
    for (std::int64_t row = 0; row < num_rows(); ++row) {
      float keep = 0.0F;
      float add = 0.0F;
      core::merge(folded_state_[row], state_[row], keep, add);
      state_[row] = {};
      for (std::int64_t c = row * padded_v_; c < (row + 1) * padded_v_; c += kLanes) {
        fold_lanes(own_.folded + c, hn::Set(d, keep), own_.acc + c, hn::Set(d, add));
      }
    }
    std::fill_n(own_.acc, kRows * padded_v_, 0.0F);
  }

  void load_rows() {
    const std::int64_t head_size = args_.cache.head_size_qk;
    const float scale = query_scale();
    std::fill_n(own_.query, kRows * padded_qk_, 0.0F);
    std::fill_n(own_.acc, kRows * padded_v_, 0.0F);
    for (std::int64_t row = 0; row < num_rows(); ++row) {
      float* query = own_.query + row * padded_qk_;
      with_dtype(args_.query.dtype, [&](auto dtype) HWY_ATTR {
        load_row<decltype(dtype)::value>(query_of(row), head_size, query);
      });
      for (std::int64_t i = 0; i < head_size; ++i) query[i] *= scale;
    }
  }

  void run_block(const BlockRows& next) {
    const KvCacheView& cache = args_.cache;
    const KeyRange range = rows_.range;
    with_dtype(cache.key.dtype, [&](auto dtype) HWY_ATTR {
      score_narrow<kRows, decltype(dtype)::value>(own_.query, rows_, next, cache.head_size_qk,
                                                  own_.scores);
    });
    const bool all_seen = seen_by_all(range);
    const bool whole_vectors = rows_.count() % kLanes == 0;
    for (std::int64_t row = 0; rules_.any() && row < num_rows(); ++row) {
      apply_rules_to_row(rules_, info_.slope[row], info_.position[row], range.begin, rows_.count(),
                         own_.scores + row * kBlockKeys);
    }
    const bool biased =
        add_qq_bias(range, 0, num_rows(), own_.scores, /*key_stride=*/1, kBlockKeys);
    bool finite = true;
    if (!all_seen || biased) {
      finite = with_dtype(cache.value.dtype, [&](auto dtype) HWY_ATTR {
        return values_finite<decltype(dtype)::value>(rows_, cache.head_size_v);
      });
    }
    float keep[kRows] = {};
    for (std::int64_t row = 0; row < num_rows(); ++row) {
      float* scores = own_.scores + row * kBlockKeys;
      if (!all_seen || !whole_vectors) {
        apply_mask_to_row({info_.prefix_end[row], info_.begin[row], info_.end[row]}, range, scores);
      }
      keep[row] = softmax_row(scores, rows_.count(), state_[row]);
    }
    if (!finite) mark_hidden(range, 0, num_rows(), own_.scores, /*key_stride=*/1, kBlockKeys);
    with_dtype(cache.value.dtype, [&](auto dtype) HWY_ATTR {
      constexpr DType kDType = decltype(dtype)::value;
      if (finite) {
        accumulate_narrow<kRows, kDType>(rows_, next, own_.scores, keep, cache.head_size_v,
                                         own_.acc);
        return;
      }
      for (std::int64_t row = 0; row < num_rows(); ++row) {
        accumulate_visible_narrow<kDType>(rows_, own_.scores + row * kBlockKeys, keep[row],
                                          cache.head_size_v, own_.acc + row * padded_v_);
      }
    });
  }

  std::int64_t padded_qk_;
  std::int64_t padded_v_;
  ScoreRules rules_;
  BlockRows rows_;
  BlockRows next_;
  NarrowScratch own_;
  core::SoftmaxState state_[kRows];
  core::SoftmaxState folded_state_[kRows];
  bool folded_any_ = false;
};

void run_share(const AttendCall& call, std::int32_t tile_class, std::int32_t worker,
               std::byte* scratch) {
  plan::for_each_piece(call.schedule, tile_class, worker, [&](const plan::Piece& piece) {
    const std::int32_t rows = piece.tile.num_rows;
    if (rows > kNarrowRows) {
      WideTile(call, piece, scratch).run();
    } else if (rows > 4) {
      NarrowTile<8>(call, piece, core::Layout(scratch)).run();
    } else if (rows > 2) {
      NarrowTile<4>(call, piece, core::Layout(scratch)).run();
    } else if (rows > 1) {
      NarrowTile<2>(call, piece, core::Layout(scratch)).run();
    } else {
      NarrowTile<1>(call, piece, core::Layout(scratch)).run();
    }
  });
}

}  // namespace
// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace diffkv::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace diffkv::cpu {

HWY_EXPORT(run_share);

void attend_share(const AttendCall& call, std::int32_t tile_class, std::int32_t worker,
                  std::byte* scratch) {
  HWY_DYNAMIC_DISPATCH(run_share)(call, tile_class, worker, scratch);
}

std::int64_t attend_scratch_bytes(std::int64_t rows, std::int64_t head_size_qk,
                                  std::int64_t head_size_v) {
  // What the widest target takes: a group of 3 vectors of 16 lanes, head sizes padded to 16.
  constexpr std::int64_t kMostGroupWidth = 48;
  core::Layout wide(nullptr);
  WideScratch(wide, rows, kMostGroupWidth, head_size_qk, head_size_v);
  core::Layout narrow(nullptr);
  NarrowScratch(narrow, kNarrowRows, head_size_qk + 8, head_size_v + 8);
  return std::max(wide.bytes(), narrow.bytes());
}

}  // namespace diffkv::cpu
#endif  // HWY_ONCE
