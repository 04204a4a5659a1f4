// Attention of one worker's share: pieces of tiles to output rows or partials. One source for
// decode and prefill tiles; they differ in the number of vectors of rows that share a converted
// key.
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "core/mask.h"
#include "core/softmax.h"
#include "cpu/kernels.h"
#include "cpu/row_io.h"
#include "cpu/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/attend.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// Highway's headers must come after foreach_target.h.
#include "cpu/codec-inl.h"
#include "cpu/tile-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace diffkv::cpu::HWY_NAMESPACE {
namespace {

constexpr std::int64_t kGroupWidth = kGroupVectors * kLanes;

// Hands out a thread's scratch in 64-byte pieces.
class Scratch {
 public:
  explicit Scratch(std::byte* base) : at_(base) {}

  template <class T>
  T* take(std::int64_t count) {
    T* piece = reinterpret_cast<T*>(at_);
    at_ += (count * static_cast<std::int64_t>(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }

 private:
  std::byte* at_;
};

// Where the keys of one sequence are.
class KeySource {
 public:
  KeySource(const AttendArgs& args, std::int32_t seq) : cache_(args.cache) {
    if (cache_.dense) {
      first_token_ = static_cast<const std::int32_t*>(
          args.batch.kv_start.data)[seq * args.batch.kv_start.strides[0]];
    } else {
      blocks_ = static_cast<const std::int32_t*>(args.batch.block_table.data) +
                seq * args.batch.block_table.strides[0];
    }
  }

  // Calls fn(row, stride, first, count) for runs of keys [first, first + count) of `range` whose
  // rows lie at row + i * stride bytes.
  template <class Fn>
  HWY_INLINE void for_each_run(const KvPlane& plane, std::int64_t head, KeyRange range,
                               Fn&& fn) const {
    const std::int64_t bytes = size_of(plane.dtype);
    const auto* base = static_cast<const std::byte*>(plane.data) + head * plane.stride_head * bytes;
    const std::int64_t stride = plane.stride_token * bytes;
    if (cache_.dense) {
      fn(base + (first_token_ + range.begin) * stride, stride, std::int64_t{range.begin},
         std::int64_t{range.end} - range.begin);
      return;
    }
    for (std::int64_t key = range.begin; key < range.end;) {
      const std::int64_t logical = key / cache_.block_size;
      const std::int64_t offset = key - logical * cache_.block_size;
      const std::int64_t count = std::min(cache_.block_size - offset, range.end - key);
      // Ids are validated; the clamp only keeps a table changed behind our back from faulting.
      const std::int64_t block =
          std::clamp<std::int64_t>(blocks_[logical], 0, cache_.num_blocks - 1);
      fn(base + block * plane.stride_block * bytes + offset * stride, stride, key, count);
      key += count;
    }
  }

 private:
  const KvCacheView& cache_;
  const std::int32_t* blocks_ = nullptr;
  std::int64_t first_token_ = 0;
};

// One piece of a tile on its way through the blocks.
class TileRunner {
 public:
  TileRunner(const AttendCall& call, const plan::Piece& piece, std::byte* scratch)
      : params_(*call.params),
        args_(*call.args),
        call_(call),
        piece_(piece),
        seq_(plan::seq_mask(call.schedule, piece.seq)),
        source_(*call.args, piece.seq),
        width_((piece.tile.num_rows + kLanes - 1) / kLanes * kLanes) {
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
    slope_ = take.take<float>(width_);
    prefix_end_ = take.take<std::int32_t>(width_);
    begin_ = take.take<std::int32_t>(width_);
    end_ = take.take<std::int32_t>(width_);
    position_ = take.take<std::int32_t>(width_);
  }

  void run() {
    load_rows();
    for (std::int32_t v = piece_.begin_block; v < piece_.end_block; ++v) {
      run_block(piece_.tile.keys_at(v));
    }
    store_rows();
  }

 private:
  std::int64_t token_of(std::int64_t row) const {
    return call_.schedule.tables.query_start_loc[piece_.seq] +
           (piece_.tile.first_row + row) / call_.schedule.group;
  }
  std::int64_t head_of(std::int64_t row) const {
    return std::int64_t{piece_.tile.kv_head} * call_.schedule.group +
           (piece_.tile.first_row + row) % call_.schedule.group;
  }
  // Element (i, row) of a [.., rows] array of which a group has `size` lines.
  static std::int64_t place(std::int64_t row, std::int64_t width, std::int64_t size,
                            std::int64_t i) {
    const std::int64_t group = row / kGroupWidth * kGroupWidth;
    const std::int64_t group_width = std::min(width - group, kGroupWidth);
    return group * size + i * group_width + (row - group);
  }

  void load_rows() {
    const KvCacheView& cache = args_.cache;
    const float q_scale =
        params_.q_scale.given() ? *static_cast<const float*>(params_.q_scale.data) : 1.0F;
    const float scale = params_.scale * q_scale * scale_of(cache.k_scale, piece_.tile.kv_head);
    std::fill_n(query_, width_ * cache.head_size_qk, 0.0F);
    std::fill_n(acc_, width_ * cache.head_size_v, 0.0F);
    std::fill_n(max_, width_, core::kNegInf);
    for (float* zeros : {sum_, slope_}) std::fill_n(zeros, width_, 0.0F);
    for (std::int32_t* zeros : {prefix_end_, begin_, end_, position_}) {
      std::fill_n(zeros, width_, 0);
    }
    all_see_ = {0, 0, seq_.seq_len};
    all_see_.prefix_end = seq_.seq_len;
    for (std::int64_t row = 0; row < piece_.tile.num_rows; ++row) {
      const std::int64_t token = token_of(row);
      const std::int64_t head = head_of(row);
      const auto* src = static_cast<const std::byte*>(args_.query.data) +
                        (token * args_.query.strides[0] + head * args_.query.strides[1]) *
                            size_of(args_.query.dtype);
      with_dtype(args_.query.dtype, [&](auto dtype) HWY_ATTR {
        load_row<decltype(dtype)::value>(src, cache.head_size_qk, row_);
      });
      for (std::int64_t i = 0; i < cache.head_size_qk; ++i) {
        query_[place(row, width_, cache.head_size_qk, i)] = row_[i] * scale;
      }
      if (params_.alibi_slopes.given()) {
        slope_[row] = static_cast<const float*>(
            params_.alibi_slopes.data)[head * params_.alibi_slopes.strides[0]];
      }
      const auto index =
          static_cast<std::int32_t>((piece_.tile.first_row + row) / call_.schedule.group);
      const core::RowKeys keys = core::row_keys(call_.schedule.mask, seq_, index);
      prefix_end_[row] = keys.prefix_end;
      begin_[row] = keys.begin;
      end_[row] = keys.end;
      position_[row] = static_cast<std::int32_t>(seq_.context_len()) + index;
      all_see_.prefix_end = std::min(all_see_.prefix_end, keys.prefix_end);
      all_see_.begin = std::max(all_see_.begin, keys.begin);
      all_see_.end = std::min(all_see_.end, keys.end);
    }
  }

  void load_keys(KeyRange range) {
    const KvCacheView& cache = args_.cache;
    const std::int64_t n = cache.head_size_qk;
    with_dtype(cache.key.dtype, [&](auto dtype) HWY_ATTR {
      source_.for_each_run(
          cache.key, piece_.tile.kv_head, range,
          [&](const std::byte* row, std::int64_t stride, std::int64_t first, std::int64_t count)
              HWY_ATTR {
                for (std::int64_t k = 0; k < count; ++k, row += stride) {
                  load_row<decltype(dtype)::value>(row, n, keys_ + (first + k - range.begin) * n);
                }
              });
    });
    const std::int64_t count = range.end - range.begin;
    const std::int64_t padded = (count + kKeyPadding - 1) / kKeyPadding * kKeyPadding;
    std::fill(keys_ + count * n, keys_ + padded * n, 0.0F);
  }

  // Returns whether every value is finite.
  bool load_values(KeyRange range) {
    const KvCacheView& cache = args_.cache;
    const RowTag d;
    RowVec zeros = hn::Zero(d);  // NaN once an infinity or a NaN was multiplied by zero
    with_dtype(cache.value.dtype, [&](auto dtype) HWY_ATTR {
      source_.for_each_run(cache.value, piece_.tile.kv_head, range,
                           [&](const std::byte* row, std::int64_t stride, std::int64_t first,
                               std::int64_t count) HWY_ATTR {
                             for (std::int64_t k = 0; k < count; ++k, row += stride) {
                               float* dst = values_ + (first + k - range.begin) * 8;
                               for (std::int64_t c = 0; c < cache.head_size_v;
                                    c += static_cast<std::int64_t>(hn::MaxLanes(d))) {
                                 const RowVec x = load_lanes<decltype(dtype)::value>(row, c);
                                 zeros = hn::MulAdd(x, hn::Zero(d), zeros);
                                 hn::StoreU(x, d, dst + (c / 8) * (kBlockKeys * 8) + c % 8);
                               }
                             }
                           });
    });
    return hn::AllFalse(d, hn::IsNaN(zeros));
  }

  bool seen_by_all(KeyRange range) const {
    return (range.begin >= all_see_.begin && range.end <= all_see_.end) ||
           range.end <= all_see_.prefix_end;
  }

  void run_block(KeyRange range) {
    load_keys(range);
    const bool finite = load_values(range);
    const bool all_seen = seen_by_all(range);
    for (std::int64_t row = 0; row < width_; row += kGroupWidth) {
      switch (std::min(width_ - row, kGroupWidth) / kLanes) {
        case 1:
          run_group<1>(row, range, all_seen, finite);
          break;
        case 2:
          run_group<2>(row, range, all_seen, finite);
          break;
        default:
          run_group<kGroupVectors>(row, range, all_seen, finite);
      }
    }
  }

  template <int kVectors>
  void run_group(std::int64_t row, KeyRange range, bool all_seen, bool finite) {
    constexpr std::int64_t kWidth = kVectors * kLanes;
    const KvCacheView& cache = args_.cache;
    const std::int64_t num_keys = range.end - range.begin;
    GroupBuffers group;
    group.query = query_ + row * cache.head_size_qk;
    group.acc = acc_ + row * cache.head_size_v;
    group.scores = scores_;
    group.max = max_ + row;
    group.sum = sum_ + row;
    group.prefix_end = prefix_end_ + row;
    group.begin = begin_ + row;
    group.end = end_ + row;
    group.position = position_ + row;
    group.slope = slope_ + row;
    score_block<kVectors>(group, keys_, num_keys, cache.head_size_qk);
    ScoreRules rules;
    rules.soft_cap = params_.soft_cap;
    rules.alibi = params_.alibi_slopes.given();
    rules.alibi_sqrt = params_.alibi_sqrt;
    rules.context_len = static_cast<std::int32_t>(seq_.context_len());
    if (rules.soft_cap > 0.0F || rules.alibi) {
      apply_rules(rules, group, kWidth, range.begin, num_keys);
    }
    const bool biased = add_qq_bias(row, kWidth, range);
    if (!all_seen) apply_mask(group, kWidth, range.begin, num_keys);
    if (finite || (all_seen && !biased)) {
      softmax_block<kVectors, false>(group, num_keys, keep_);
      accumulate_block<kVectors>(group, values_, num_keys, cache.head_size_v, keep_);
    } else {
      softmax_block<kVectors, true>(group, num_keys, keep_);
      accumulate_visible(group, kWidth, values_, num_keys, cache.head_size_v, keep_);
    }
  }

  // Adds qq_bias[i, j - context_len] to the scores; returns whether any was in reach.
  bool add_qq_bias(std::int64_t first_row, std::int64_t width, KeyRange range) {
    if (!params_.qq_bias.given()) return false;
    const ConstTensorView& bias = params_.qq_bias;
    const std::int64_t context_len = seq_.context_len();
    const std::int64_t first = std::max<std::int64_t>(range.begin, context_len);
    const std::int64_t last = std::min<std::int64_t>(range.end, context_len + bias.shape[1]);
    const std::int64_t num_rows = std::min(width, piece_.tile.num_rows - first_row);
    for (std::int64_t r = 0; r < num_rows; ++r) {
      const std::int64_t i = (piece_.tile.first_row + first_row + r) / call_.schedule.group;
      if (i >= bias.shape[0]) break;
      for (std::int64_t key = first; key < last; ++key) {
        scores_[(key - range.begin) * width + r] += core::load_element(
            bias.dtype, bias.data, i * bias.strides[0] + (key - context_len) * bias.strides[1]);
      }
    }
    return first < last;
  }

  void store_rows() {
    const detail::PlanTables& tables = call_.schedule.tables;
    const std::int64_t head_size_v = args_.cache.head_size_v;
    for (std::int64_t row = 0; row < piece_.tile.num_rows; ++row) {
      const std::int64_t slot_row = std::int64_t{piece_.slot} * tables.partial_rows + row;
      float* dst = piece_.slot < 0 ? row_ : tables.partial_acc + slot_row * tables.partial_stride;
      for (std::int64_t c = 0; c < head_size_v; ++c) {
        dst[c] = acc_[place(row, width_, head_size_v, c)];
      }
      if (piece_.slot >= 0) {
        tables.partial_max[slot_row] = max_[row];
        tables.partial_sum[slot_row] = sum_[row];
      } else if (token_of(row) < tables.num_tokens) {
        write_row(call_, token_of(row), head_of(row), piece_.tile.kv_head, {max_[row], sum_[row]},
                  row_);
      }
    }
  }

  const AttentionParams& params_;
  const AttendArgs& args_;
  const AttendCall& call_;
  const plan::Piece& piece_;
  core::SeqMask seq_;
  KeySource source_;
  core::RowKeys all_see_;
  std::int64_t width_;  // rows rounded up to whole vectors
  float* query_;
  float* acc_;
  float* keys_;    // [kBlockKeys, head_size_qk]
  float* values_;  // [head_size_v / 8, kBlockKeys, 8]
  float* scores_;
  float* keep_;
  float* row_;
  float* max_;
  float* sum_;
  float* slope_;
  std::int32_t* prefix_end_;
  std::int32_t* begin_;
  std::int32_t* end_;
  std::int32_t* position_;
};

void AttendShare(const AttendCall& call, std::int32_t tile_class, std::int32_t worker,
                 std::byte* scratch) {
  plan::for_each_piece(call.schedule, tile_class, worker,
                       [&](const plan::Piece& piece) { TileRunner(call, piece, scratch).run(); });
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
