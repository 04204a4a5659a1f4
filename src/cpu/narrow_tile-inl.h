// A tile of few rows on its way through its blocks of keys, for the target being compiled.

// Per-target include guard.
#if defined(DIFFKV_CPU_NARROW_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DIFFKV_CPU_NARROW_TILE_INL_H_
#undef DIFFKV_CPU_NARROW_TILE_INL_H_
#else
#define DIFFKV_CPU_NARROW_TILE_INL_H_
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "core/layout.h"
#include "core/softmax.h"
#include "cpu/codec-inl.h"
#include "cpu/kernels.h"
#include "cpu/lanes-inl.h"
#include "cpu/narrow-inl.h"
#include "cpu/tile_base.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace diffkv::cpu::HWY_NAMESPACE {

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
    rules_ = score_rules();
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

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace diffkv::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
