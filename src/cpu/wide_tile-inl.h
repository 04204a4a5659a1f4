// A tile of many rows on its way through its blocks of keys, for the target being compiled: rows in
// the lanes, products in fp32 (keys and values converted once into scratch) or of bf16 pairs.

// Per-target include guard.
#if defined(DIFFKV_CPU_WIDE_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DIFFKV_CPU_WIDE_TILE_INL_H_
#undef DIFFKV_CPU_WIDE_TILE_INL_H_
#else
#define DIFFKV_CPU_WIDE_TILE_INL_H_
#endif

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/layout.h"
#include "core/softmax.h"
#include "cpu/amx.h"
#include "cpu/bf16_dot.h"
#include "cpu/codec-inl.h"
#include "cpu/fetch.h"
#include "cpu/kernels.h"
#include "cpu/lanes-inl.h"
#include "cpu/tile_base.h"
#include "cpu/wide-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace diffkv::cpu::HWY_NAMESPACE {

inline constexpr std::int64_t kGroupWidth = kGroupVectors * kLanes;

// How a wide tile multiplies: in fp32, whatever is stored.
class Fp32Products {
 public:
  Fp32Products(const AttendArgs& args, const WideBlock& own) : args_(args), own_(own) {}

  // 32-bit words of a query row.
  std::int64_t query_words() const { return args_.cache.head_size_qk; }

  // One query row, times `scale`.
  void load_query(const std::byte* query, float scale, float* to) const {
    const std::int64_t n = query_words();
    with_dtype(args_.query.dtype,
               [&](auto dtype) HWY_ATTR { load_row<decltype(dtype)::value>(query, n, to); });
    for (std::int64_t i = 0; i < n; ++i) to[i] *= scale;
  }

  // Converts a block. Returns whether every value is finite.
  bool load(const BlockRows& rows) const {
    load_keys(rows);
    return load_values(rows);
  }

  template <int kVectors>
  void score(const GroupBuffers& group, const BlockRows& rows, Fetch& fetch,
             float /*scale*/) const {
    score_block<kVectors>(group, own_.keys, fetch, rows.count(), args_.cache.head_size_qk);
  }

  template <int kVectors>
  void accumulate(const GroupBuffers& group, const BlockRows& rows, Fetch& fetch) const {
    accumulate_block<kVectors>(group, own_.values, fetch, rows.count(), args_.cache.head_size_v,
                               own_.keep);
  }

  // The same where hidden keys are marked -0 and some value is NaN or infinite; `count`: rows that
  // are there.
  template <int kVectors>
  void accumulate_marked(const GroupBuffers& group, const BlockRows& rows, Fetch& /*fetch*/,
                         std::int64_t /*count*/) const {
    accumulate_visible(group, kVectors * kLanes, own_.values, rows.count(), args_.cache.head_size_v,
                       own_.keep);
  }

 private:
  void load_keys(const BlockRows& rows) const {
    const std::int64_t n = args_.cache.head_size_qk;
    with_dtype(args_.cache.key.dtype, [&](auto dtype) HWY_ATTR {
      for (std::int64_t k = 0; k < rows.count(); ++k) {
        load_row<decltype(dtype)::value>(rows.key[static_cast<std::size_t>(k)], n,
                                         own_.keys + k * n);
      }
    });
    const std::int64_t padded = (rows.count() + kKeyPadding - 1) / kKeyPadding * kKeyPadding;
    std::fill(own_.keys + rows.count() * n, own_.keys + padded * n, 0.0F);
  }

  bool load_values(const BlockRows& rows) const {
    const LaneTag d;
    LaneVec zeros = hn::Zero(d);  // NaN once an infinity or a NaN was multiplied by zero
    with_dtype(args_.cache.value.dtype, [&](auto dtype) HWY_ATTR {
      for (std::int64_t k = 0; k < rows.count(); ++k) {
        const std::byte* row = rows.value[static_cast<std::size_t>(k)];
        for (std::int64_t c = 0; c < args_.cache.head_size_v; c += kLanes) {
          const LaneVec x = load_padded<decltype(dtype)::value>(d, row, c, args_.cache.head_size_v);
          zeros = hn::MulAdd(x, hn::Zero(d), zeros);
          hn::StoreU(x, d, own_.values + value_at(k, c));
        }
      }
    });
    return hn::AllFalse(d, hn::IsNaN(zeros));
  }

  const AttendArgs& args_;
  const WideBlock& own_;
};

#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
// How a wide tile multiplies bf16 queries with bf16 or fp8 keys and values where the machine has
// AVX512_BF16, or in its matrix unit. Queries stay as they are and scores are scaled; bf16 keys are
// read in place.
template <bool kAmx>
class Bf16Products {
 public:
  Bf16Products(const AttendArgs& args, const WideBlock& own) : args_(args), own_(own) {}

  std::int64_t query_words() const { return args_.cache.head_size_qk / 2; }

  void load_query(const std::byte* query, float /*scale*/, float* to) const {
    std::memcpy(to, query, static_cast<std::size_t>(4 * query_words()));
  }

  bool load(const BlockRows& rows) const {
    const KvCacheView& cache = args_.cache;
    if (cache.key.dtype != DType::kBF16) {
      bf16_keys(cache.key.dtype, rows.key.data(), rows.count(), cache.head_size_qk, keys());
    }
    const bool finite = bf16_values(cache.value.dtype, rows.value.data(), rows.count(),
                                    cache.head_size_v, values());
    turn(rows);
    return finite;
  }

  template <int kVectors>
  void score(const GroupBuffers& group, const BlockRows& rows, Fetch& fetch, float scale) const {
    const std::byte* const* key = rows.key.data();
    std::array<const std::byte*, kBlockKeys> converted;
    if (args_.cache.key.dtype != DType::kBF16) {
      for (std::int64_t k = 0; k < kBlockKeys; ++k) {
        const std::int64_t there = std::min(k, rows.count() - 1);
        converted[static_cast<std::size_t>(k)] =
            reinterpret_cast<const std::byte*>(keys() + there * args_.cache.head_size_qk);
      }
      key = converted.data();
    }
    const auto* query = reinterpret_cast<const std::uint32_t*>(group.query);
    const std::int64_t head_size = args_.cache.head_size_qk;
    if constexpr (kAmx) {
      amx_scores(kVectors * kLanes, query, key, keys() + kBlockKeys * head_size, fetch,
                 rows.count(), head_size, scale, group.scores);
    } else {
      bf16_scores(kVectors * kLanes, query, key, fetch, rows.count(), head_size, scale,
                  group.scores);
    }
  }

  template <int kVectors>
  void accumulate(const GroupBuffers& group, const BlockRows& rows, Fetch& fetch) const {
    constexpr std::int64_t kWidth = kVectors * kLanes;
    const std::int64_t head_size = args_.cache.head_size_v;
    bf16_weights(kWidth, group.scores, rows.count(), own_.weights);
    if constexpr (kAmx) {
      amx_accumulate(kWidth, own_.weights, turned(), fetch, rows.count(), head_size, own_.keep,
                     group.acc);
    } else {
      bf16_accumulate(kWidth, own_.weights, values(), fetch, rows.count(), head_size, own_.keep,
                      group.acc);
    }
  }

  // Values that are not finite are left out of the products and then added to the rows that see
  // them, so what hidden slots hold does not change a bit of the other rows.
  template <int kVectors>
  void accumulate_marked(const GroupBuffers& group, const BlockRows& rows, Fetch& fetch,
                         std::int64_t count) const {
    constexpr std::int64_t kWidth = kVectors * kLanes;
    const KvCacheView& cache = args_.cache;
    bf16_drop_nonfinite(reinterpret_cast<std::uint16_t*>(values()),
                        (rows.count() + 1) / 2 * 2 * cache.head_size_v);
    turn(rows);
    accumulate<kVectors>(group, rows, fetch);
    add_nonfinite(rows, cache.value.dtype, cache.head_size_v, count, group.scores, kWidth,
                  /*p_row=*/1, group.acc, kWidth, /*acc_row=*/1);
  }

 private:
  std::uint16_t* keys() const { return reinterpret_cast<std::uint16_t*>(own_.keys); }
  std::uint32_t* values() const { return reinterpret_cast<std::uint32_t*>(own_.values); }
  std::uint32_t* turned() const { return values() + kBlockKeys / 2 * args_.cache.head_size_v; }

  // The values for all groups of rows, as the matrix unit reads them.
  void turn(const BlockRows& rows) const {
    if constexpr (kAmx) amx_turn_values(values(), rows.count(), args_.cache.head_size_v, turned());
  }

  const AttendArgs& args_;
  const WideBlock& own_;
};
#endif

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
        products_(args_, block),
        scale_(query_scale()) {
    find_rows(width_, own_.rows);
    rules_ = score_rules();
    load_rows();
  }

  // Runs a block.
  void run_block(const BlockRows& rows, Fetch& fetch) {
    const bool finite = products_.load(rows);
    const bool all_seen = seen_by_all(rows.range);
    for (std::int64_t row = 0; row < width_; row += kGroupWidth) {
      switch (std::min(width_ - row, kGroupWidth) / kLanes) {
        case 1:
          run_group<1>(rows, row, fetch, all_seen, finite);
          break;
        case 2:
          run_group<2>(rows, row, fetch, all_seen, finite);
          break;
        default:
          run_group<kGroupVectors>(rows, row, fetch, all_seen, finite);
      }
    }
  }

  void finish() {
    if (folded_any_) fold();
    const float* sums = folded_any_ ? own_.folded : own_.acc;
    const float* max = folded_any_ ? own_.folded_max : own_.max;
    const float* sum = folded_any_ ? own_.folded_sum : own_.sum;
    const std::int64_t head_size = args_.cache.head_size_v;
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

 private:
  void clear() {
    std::fill_n(own_.acc, width_ * args_.cache.head_size_v, 0.0F);
    std::fill_n(own_.max, width_, core::kNegInf);
    std::fill_n(own_.sum, width_, 0.0F);
  }

  void load_rows() {
    const std::int64_t words = products_.query_words();
    clear();
    for (std::int64_t row = 0; row < width_; row += kRowsTurned) {
      for (std::int64_t i = 0; i < kRowsTurned; ++i) {
        float* to = block_.rows + i * words;
        if (row + i < num_rows()) {
          products_.load_query(query_of(row + i), scale_, to);
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
  void run_group(const BlockRows& rows, std::int64_t row, Fetch& fetch, bool all_seen,
                 bool finite) {
    constexpr std::int64_t kWidth = kVectors * kLanes;
    const KvCacheView& cache = args_.cache;
    const KeyRange range = rows.range;
    const std::int64_t num_keys = rows.count();
    GroupBuffers group;
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
    if (finite || (all_seen && !biased)) {
      products_.template accumulate<kVectors>(group, rows, fetch);
    } else {
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
