// A tile of many rows on its way through its blocks of keys, for the target being compiled: scores
// have rows in the lanes; products as wide_products-inl.h and row_products-inl.h have them.

// Per-target include guard.
#if defined(DIFFKV_CPU_WIDE_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DIFFKV_CPU_WIDE_TILE_INL_H_
#undef DIFFKV_CPU_WIDE_TILE_INL_H_
#else
#define DIFFKV_CPU_WIDE_TILE_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "core/layout.h"
#include "core/softmax.h"
#include "cpu/fetch.h"
#include "cpu/kernels.h"
#include "cpu/lanes-inl.h"
#include "cpu/tile_base.h"
#include "cpu/wide-inl.h"
#include "cpu/wide_products-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace diffkv::cpu::HWY_NAMESPACE {

// One KV head of a tile.
template <class Products>
class WideTile : public TileBase {
 public:
  using Block = WideBlock;

  static WideBlock block(core::Layout& take, const KvCacheView& cache) {
    return {take, kGroupWidth, cache.head_size_qk, cache.head_size_v};
  }

  WideTile(const AttendCall& call, const plan::Piece& piece, std::int64_t head, const Block& block,
           core::Layout& take)
      : TileBase(call, piece, head),
        width_((num_rows() + kLanes - 1) / kLanes * kLanes),
        own_(take, width_, args_.cache.head_size_qk, args_.cache.head_size_v),
        block_(block),
        products_(args_, block, width_),
        scale_(query_scale()) {
    find_rows(width_, own_.rows);
    rules_ = score_rules();
    load_rows();
  }

  // Runs a block.
  void run_block(const BlockRows& rows, Fetch& fetch) {
    products_.load(rows);
    const bool all_seen = seen_by_all(rows.range);
    if constexpr (Products::kPacksQueries) {
      run_group<1>(rows, 0, fetch, all_seen);
    } else {
      for (std::int64_t row = 0; row < width_; row += kGroupWidth) {
        switch (std::min(width_ - row, kGroupWidth) / kLanes) {
          case 1:
            run_group<1>(rows, row, fetch, all_seen);
            break;
          case 2:
            run_group<2>(rows, row, fetch, all_seen);
            break;
          default:
            run_group<kGroupVectors>(rows, row, fetch, all_seen);
        }
      }
    }
  }

  void finish() {
    if (folded_any_) fold();
    float* sums = folded_any_ ? own_.folded : own_.acc;
    const float* max = folded_any_ ? own_.folded_max : own_.max;
    const float* sum = folded_any_ ? own_.folded_sum : own_.sum;
    const std::int64_t head_size = args_.cache.head_size_v;
    if constexpr (Products::kSumsByRow) {
      for (std::int64_t row = 0; row < num_rows(); ++row) {
        finish_row(row, {max[row], sum[row]}, sums + row * head_size);
      }
    } else {
      for (std::int64_t row = 0; row < num_rows(); row += kRowsTurned) {
        const std::int64_t group = row / kGroupWidth * kGroupWidth;
        const std::int64_t stride = std::min(width_ - group, kGroupWidth);
        const float* from = sums + group * head_size + (row - group);
        for (std::int64_t c = 0; c < head_size; c += kRowsTurned) {
          turn_block(from + c * stride, stride, block_.rows + c, head_size);
        }
        for (std::int64_t i = 0; i < std::min(kRowsTurned, num_rows() - row); ++i) {
          finish_row(row + i, {max[row + i], sum[row + i]}, block_.rows + i * head_size);
        }
      }
    }
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
      float* folded = own_.folded + first * head_size;
      const float* acc = own_.acc + first * head_size;
      if constexpr (Products::kSumsByRow) {
        for (std::int64_t r = 0; r < group_width; ++r) {
          for (std::int64_t at = r * head_size; at < (r + 1) * head_size; ++at) {
            folded[at] = std::fma(folded[at], keep[r], acc[at] * add[r]);
          }
        }
      } else {
        for (std::int64_t i = 0; i < head_size * group_width; i += kLanes) {
          const std::int64_t r = i % group_width;
          fold_lanes(folded + i, hn::Load(d, keep + r), acc + i, hn::Load(d, add + r));
        }
      }
    }
    clear();
  }

 private:
  void clear() {
    std::fill_n(own_.acc, width_ * args_.cache.head_size_v, 0.0F);
    std::fill_n(own_.max, width_, core::kNegInf);
    std::fill_n(own_.sum, width_, 0.0F);
  }

  void load_rows() {
    const std::int64_t words = products_.query_words();
    clear();
    if constexpr (Products::kPacksQueries) {
      std::fill_n(own_.query, width_ * words, 0.0F);
      for (std::int64_t row = 0; row < num_rows(); ++row) {
        products_.load_query(row, query_of(row), scale_, own_.query);
      }
    } else {
      turn_rows(words);
    }
  }

  // Queries to lanes.
  void turn_rows(std::int64_t words) {
    for (std::int64_t row = 0; row < width_; row += kRowsTurned) {
      for (std::int64_t i = 0; i < kRowsTurned; ++i) {
        float* to = block_.rows + i * words;
        if (row + i < num_rows()) {
          products_.load_query(row + i, query_of(row + i), scale_, to);
        } else {
          std::fill_n(to, words, 0.0F);
        }
      }
      const std::int64_t group = row / kGroupWidth * kGroupWidth;
      const std::int64_t stride = std::min(width_ - group, kGroupWidth);
      float* query = own_.query + group * args_.cache.head_size_qk + (row - group);
      for (std::int64_t c = 0; c < words; c += kRowsTurned) {
        turn_block(block_.rows + c, words, query + c * stride, stride);
      }
    }
  }

  template <int kVectors>
  void run_group(const BlockRows& rows, std::int64_t row, Fetch& fetch, bool all_seen) {
    constexpr std::int64_t kWidth = kVectors * kLanes;
    const KvCacheView& cache = args_.cache;
    const KeyRange range = rows.range;
    const std::int64_t num_keys = rows.count();
    GroupBuffers group;
    group.first_row = row;
    group.query = own_.query + row * cache.head_size_qk;
    group.acc = own_.acc + row * cache.head_size_v;
    group.scores = block_.scores;
    group.max = own_.max + row;
    group.sum = own_.sum + row;
    group.rows = info_.from(row);
    const std::int64_t count = std::min(kWidth, num_rows() - row);
    products_.template score<kVectors>(group, rows, fetch, scale_);
    if (rules_.any()) apply_rules(rules_, group, kWidth, range.begin, num_keys);
    const bool biased = add_qq_bias(range, row, count, block_.scores, kWidth, /*row_stride=*/1);
    if (!all_seen) apply_mask(group, kWidth, range.begin, num_keys);
    softmax_block<kVectors>(group, num_keys, block_.keep);
    if (!products_.template accumulate<kVectors>(group, rows, fetch, all_seen && !biased)) {
      mark_hidden(range, row, count, block_.scores, kWidth, /*row_stride=*/1);
      products_.template accumulate_marked<kVectors>(group, rows, fetch, count);
    }
  }

  std::int64_t width_;  // rows rounded up to whole vectors
  ScoreRules rules_;
  WideState own_;
  Block block_;
  Products products_;
  float scale_;  // of the scores
  bool folded_any_ = false;
};

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace diffkv::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
