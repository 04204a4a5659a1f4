// Attention of one worker's share: pieces of tiles to output rows or partials. One source for
// decode and prefill tiles; they differ in the number of vectors of rows that share a converted
// key.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>

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
      : TileBase(call, piece), width_((num_rows() + kLanes - 1) / kLanes * kLanes) {
    Scratch take(scratch);
    const KvCacheView& cache = args_.cache;
    query_ = take.take<float>(width_ * cache.head_size_qk);
    acc_ = take.take<float>(width_ * cache.head_size_v);
    keys_ = take.take<float>(kBlockKeys * cache.head_size_qk);
    values_ = take.take<float>(kBlockKeys * cache.head_size_v);
    scores_ = take.take<float>(kBlockKeys * kGroupWidth);
    keep_ = take.take<float>(kGroupWidth);
    row_ = take.take<float>(std::max(cache.head_size_qk, cache.head_size_v));
    max_ = take.take<float>(width_);
    sum_ = take.take<float>(width_);
    find_rows(width_, take);
    rules_ = rules_of(params_, seq_);
  }

  void run() {
    load_rows();
    for (std::int32_t v = piece_.begin_block; v < piece_.end_block; ++v) {
      run_block(piece_.tile.keys_at(v));
    }
    for (std::int64_t row = 0; row < num_rows(); ++row) {
      float* acc = destination(row, row_);
      for (std::int64_t c = 0; c < args_.cache.head_size_v; ++c) {
        acc[c] = acc_[place(row, args_.cache.head_size_v, c)];
      }
      finish_row(row, {max_[row], sum_[row]}, acc);
    }
  }

 private:
  // Element (i, row) of a [size, rows] array, which is stored group by group.
  std::int64_t place(std::int64_t row, std::int64_t size, std::int64_t i) const {
    const std::int64_t group = row / kGroupWidth * kGroupWidth;
    return group * size + i * std::min(width_ - group, kGroupWidth) + (row - group);
  }

  void load_rows() {
    const std::int64_t head_size = args_.cache.head_size_qk;
    const float scale = query_scale();
    std::fill_n(query_, width_ * head_size, 0.0F);
    std::fill_n(acc_, width_ * args_.cache.head_size_v, 0.0F);
    std::fill_n(max_, width_, core::kNegInf);
    std::fill_n(sum_, width_, 0.0F);
    for (std::int64_t row = 0; row < num_rows(); ++row) {
      with_dtype(args_.query.dtype, [&](auto dtype) HWY_ATTR {
        load_row<decltype(dtype)::value>(query_of(row), head_size, row_);
      });
      for (std::int64_t i = 0; i < head_size; ++i) {
        query_[place(row, head_size, i)] = row_[i] * scale;
      }
    }
  }

  void load_keys() {
    const std::int64_t n = args_.cache.head_size_qk;
    with_dtype(args_.cache.key.dtype, [&](auto dtype) HWY_ATTR {
      for (std::int64_t k = 0; k < rows_.count(); ++k) {
        load_row<decltype(dtype)::value>(rows_.key[static_cast<std::size_t>(k)], n, keys_ + k * n);
      }
    });
    const std::int64_t padded = (rows_.count() + kKeyPadding - 1) / kKeyPadding * kKeyPadding;
    std::fill(keys_ + rows_.count() * n, keys_ + padded * n, 0.0F);
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
          hn::StoreU(x, d, values_ + (c / 8) * (kBlockKeys * 8) + k * 8 + c % 8);
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
    group.query = query_ + row * cache.head_size_qk;
    group.acc = acc_ + row * cache.head_size_v;
    group.scores = scores_;
    group.max = max_ + row;
    group.sum = sum_ + row;
    group.rows = {info_.prefix_end + row, info_.begin + row, info_.end + row, info_.position + row,
                  info_.slope + row};
    score_block<kVectors>(group, keys_, num_keys, cache.head_size_qk);
    if (rules_.any()) apply_rules(rules_, group, kWidth, range.begin, num_keys);
    const bool biased = add_qq_bias(range, row, std::min(kWidth, num_rows() - row), scores_, kWidth,
                                    /*row_stride=*/1);
    if (!all_seen) apply_mask(group, kWidth, range.begin, num_keys);
    if (finite || (all_seen && !biased)) {
      softmax_block<kVectors, false>(group, num_keys, keep_);
      accumulate_block<kVectors>(group, values_, num_keys, cache.head_size_v, keep_);
    } else {
      softmax_block<kVectors, true>(group, num_keys, keep_);
      accumulate_visible(group, kWidth, values_, num_keys, cache.head_size_v, keep_);
    }
  }

  std::int64_t width_;  // rows rounded up to whole vectors
  ScoreRules rules_;
  BlockRows rows_;
  float* query_;   // [head_size_qk, rows] by groups
  float* acc_;     // [head_size_v, rows] by groups
  float* keys_;    // [kBlockKeys, head_size_qk]
  float* values_;  // [head_size_v / 8, kBlockKeys, 8]
  float* scores_;  // [kBlockKeys, rows of a group]
  float* keep_;
  float* row_;
  float* max_;
  float* sum_;
};

// A tile of up to kRows rows: the head dimension in the lanes, nothing copied.
template <int kRows>
class NarrowTile : TileBase {
 public:
  NarrowTile(const AttendCall& call, const plan::Piece& piece, std::byte* scratch)
      : TileBase(call, piece),
        padded_qk_(padded_to_lanes(args_.cache.head_size_qk)),
        padded_v_(padded_to_lanes(args_.cache.head_size_v)) {
    Scratch take(scratch);
    query_ = take.take<float>(kRows * padded_qk_);
    acc_ = take.take<float>(kRows * padded_v_);
    scores_ = take.take<float>(kRows * kBlockKeys);
    row_ = take.take<float>(args_.cache.head_size_v);
    find_rows(kRows, take);
    rules_ = rules_of(params_, seq_);
  }

  void run() {
    load_rows();
    if (piece_.begin_block < piece_.end_block) {
      source_.locate(piece_.tile.keys_at(piece_.begin_block), rows_);
    }
    for (std::int32_t v = piece_.begin_block; v < piece_.end_block; ++v) {
      const bool more = v + 1 < piece_.end_block;
      if (more) source_.locate(piece_.tile.keys_at(v + 1), next_);
      run_block(more ? next_ : rows_);
      if (more) std::swap(rows_, next_);
    }
    for (std::int64_t row = 0; row < num_rows(); ++row) {
      float* acc = destination(row, row_);
      std::copy_n(acc_ + row * padded_v_, args_.cache.head_size_v, acc);
      finish_row(row, state_[row], acc);
    }
  }

 private:
  void load_rows() {
    const std::int64_t head_size = args_.cache.head_size_qk;
    const float scale = query_scale();
    std::fill_n(query_, kRows * padded_qk_, 0.0F);
    std::fill_n(acc_, kRows * padded_v_, 0.0F);
    for (std::int64_t row = 0; row < num_rows(); ++row) {
      float* query = query_ + row * padded_qk_;
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
      score_narrow<kRows, decltype(dtype)::value>(query_, rows_, next, cache.head_size_qk, scores_);
    });
    const bool all_seen = seen_by_all(range);
    const bool whole_vectors = rows_.count() % kLanes == 0;
    for (std::int64_t row = 0; rules_.any() && row < num_rows(); ++row) {
      apply_rules_to_row(rules_, info_.slope[row], info_.position[row], range.begin, rows_.count(),
                         scores_ + row * kBlockKeys);
    }
    const bool biased = add_qq_bias(range, 0, num_rows(), scores_, /*key_stride=*/1, kBlockKeys);
    bool finite = true;
    if (!all_seen || biased) {
      finite = with_dtype(cache.value.dtype, [&](auto dtype) HWY_ATTR {
        return values_finite<decltype(dtype)::value>(rows_, cache.head_size_v);
      });
    }
    float keep[kRows] = {};
    for (std::int64_t row = 0; row < num_rows(); ++row) {
      float* scores = scores_ + row * kBlockKeys;
      if (!all_seen || !whole_vectors) {
        apply_mask_to_row({info_.prefix_end[row], info_.begin[row], info_.end[row]}, range, scores);
      }
      keep[row] = softmax_row(scores, rows_.count(), !finite, state_[row]);
    }
    with_dtype(cache.value.dtype, [&](auto dtype) HWY_ATTR {
      constexpr DType kDType = decltype(dtype)::value;
      if (finite) {
        accumulate_narrow<kRows, kDType>(rows_, next, scores_, keep, cache.head_size_v, acc_);
        return;
      }
      for (std::int64_t row = 0; row < num_rows(); ++row) {
        accumulate_visible_narrow<kDType>(rows_, scores_ + row * kBlockKeys, keep[row],
                                          cache.head_size_v, acc_ + row * padded_v_);
      }
    });
  }

  std::int64_t padded_qk_;
  std::int64_t padded_v_;
  ScoreRules rules_;
  BlockRows rows_;
  BlockRows next_;
  core::SoftmaxState state_[kRows];
  float* query_;   // [kRows, padded_qk_]
  float* acc_;     // [kRows, padded_v_]
  float* scores_;  // [kRows, kBlockKeys]
  float* row_;
};

void AttendShare(const AttendCall& call, std::int32_t tile_class, std::int32_t worker,
                 std::byte* scratch) {
  plan::for_each_piece(call.schedule, tile_class, worker, [&](const plan::Piece& piece) {
    const std::int32_t rows = piece.tile.num_rows;
    if (rows > kNarrowRows) {
      WideTile(call, piece, scratch).run();
    } else if (rows > 4) {
      NarrowTile<8>(call, piece, scratch).run();
    } else if (rows > 2) {
      NarrowTile<4>(call, piece, scratch).run();
    } else if (rows > 1) {
      NarrowTile<2>(call, piece, scratch).run();
    } else {
      NarrowTile<1>(call, piece, scratch).run();
    }
  });
}

}  // namespace
// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace diffkv::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace diffkv::cpu {

HWY_EXPORT(AttendShare);

void attend_share(const AttendCall& call, std::int32_t tile_class, std::int32_t worker,
                  std::byte* scratch) {
  HWY_DYNAMIC_DISPATCH(AttendShare)(call, tile_class, worker, scratch);
}

std::int64_t attend_scratch_bytes(std::int64_t rows, std::int64_t head_size_qk,
                                  std::int64_t head_size_v) {
  constexpr std::int64_t kMostGroupWidth = 48;  // 3 vectors of 16 lanes
  constexpr std::int64_t kRowArrays = 7;
  constexpr std::int64_t kPieces = 14;  // each rounded up to 64 bytes
  const std::int64_t floats = (rows + kBlockKeys) * (head_size_qk + head_size_v) +
                              (kBlockKeys + 1) * kMostGroupWidth +
                              std::max(head_size_qk, head_size_v) + kRowArrays * rows;
  return (floats * static_cast<std::int64_t>(sizeof(float)) + kPieces * 64 + 63) / 64 * 64;
}

}  // namespace diffkv::cpu
#endif  // HWY_ONCE
