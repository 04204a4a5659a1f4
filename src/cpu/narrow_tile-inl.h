// A tile of few rows on its way through its blocks of keys, for the target being compiled.

// Per-target include guard.
#if defined(DIFFKV_CPU_NARROW_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DIFFKV_CPU_NARROW_TILE_INL_H_
#undef DIFFKV_CPU_NARROW_TILE_INL_H_
#else
#define DIFFKV_CPU_NARROW_TILE_INL_H_
#endif

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/dtype.h"
#include "core/layout.h"
#include "core/softmax.h"
#include "cpu/bf16_dot.h"
#include "cpu/codec-inl.h"
#include "cpu/fetch.h"
#include "cpu/kernels.h"
#include "cpu/lanes-inl.h"
#include "cpu/narrow-inl.h"
#include "cpu/tile_base.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace diffkv::cpu::HWY_NAMESPACE {

// How a narrow tile multiplies: in fp32, whatever is stored; the head dimension in the lanes,
// keys and values converted in registers, nothing copied.
template <int kRows>
class NarrowFp32Products {
 public:
  static std::int64_t padded(std::int64_t head_size) { return padded_to_lanes(head_size); }

  NarrowFp32Products(const AttendArgs& args, const NarrowBlock& block)
      : args_(args), block_(block) {}

  void load_query(const std::byte* from, float scale, float* queries, std::int64_t row) const {
    const std::int64_t head_size = args_.cache.head_size_qk;
    const LaneTag d;
    with_dtype(args_.query.dtype, [&](auto dtype) HWY_ATTR {
      for (std::int64_t i = 0; i < head_size; i += kLanes) {
        const LaneVec x = load_padded<decltype(dtype)::value>(d, from, i, head_size);
        hn::Store(hn::Mul(x, hn::Set(d, scale)), d, queries + i * kRows + row * kLanes);
      }
    });
  }

  void score(const float* queries, const BlockRows& rows, Fetch& fetch, float /*scale*/) const {
    with_dtype(args_.cache.key.dtype, [&](auto dtype) HWY_ATTR {
      score_narrow<kRows, decltype(dtype)::value>(queries, rows, fetch, args_.cache.head_size_qk,
                                                  block_.scores);
    });
  }

  void accumulate(const BlockRows& rows, Fetch& fetch, const float* keep, float* acc) const {
    with_dtype(args_.cache.value.dtype, [&](auto dtype) HWY_ATTR {
      accumulate_narrow<kRows, decltype(dtype)::value>(rows, fetch, block_.scores, keep,
                                                       args_.cache.head_size_v, acc);
    });
  }

  // The same where hidden keys are marked -0 and some value is NaN or infinite.
  void accumulate_marked(const BlockRows& rows, Fetch& /*fetch*/, const float* keep, float* acc,
                         std::int64_t num_rows) const {
    const std::int64_t head_size = args_.cache.head_size_v;
    with_dtype(args_.cache.value.dtype, [&](auto dtype) HWY_ATTR {
      for (std::int64_t row = 0; row < num_rows; ++row) {
        accumulate_visible_narrow<decltype(dtype)::value>(rows, block_.scores + row * kBlockKeys,
                                                          keep[row], head_size,
                                                          acc + row * padded(head_size));
      }
    });
  }

 private:
  const AttendArgs& args_;
  const NarrowBlock& block_;
};

#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
// How a narrow tile multiplies bf16 queries with bf16 or fp8 keys and values where the machine has
// AVX512_BF16. Queries stay as they are and scores are scaled.
template <int kRows>
class NarrowBf16Products {
 public:
  static std::int64_t padded(std::int64_t head_size) { return padded_to_unit(head_size); }

  NarrowBf16Products(const AttendArgs& args, const NarrowBlock& block)
      : args_(args), block_(block) {}

  void load_query(const std::byte* from, float /*scale*/, float* queries, std::int64_t row) const {
    const std::int64_t head_size = args_.cache.head_size_qk;
    auto* query = reinterpret_cast<std::uint16_t*>(queries) + row * kBf16Padding;
    for (std::int64_t i = 0; i < head_size; i += kBf16Padding) {
      std::memcpy(query + i * kRows, from + 2 * i,
                  static_cast<std::size_t>(2 * std::min(kBf16Padding, head_size - i)));
    }
  }

  void score(const float* queries, const BlockRows& rows, Fetch& fetch, float scale) const {
    const KvCacheView& cache = args_.cache;
    bf16_scores_narrow(kRows, cache.key.dtype, reinterpret_cast<const std::uint16_t*>(queries),
                       rows.key.data(), fetch, rows.count(), cache.head_size_qk, scale,
                       block_.scores);
  }

  void accumulate(const BlockRows& rows, Fetch& fetch, const float* keep, float* acc) const {
    accumulate_from(args_.cache.value.dtype, rows.value.data(), rows.count(), fetch, keep, acc);
  }

  // Values that are not finite are left out of the products and then added to the rows that see
  // them, so what hidden slots hold does not change a bit of the other rows.
  void accumulate_marked(const BlockRows& rows, Fetch& fetch, const float* keep, float* acc,
                         std::int64_t num_rows) const {
    const KvCacheView& cache = args_.cache;
    const std::int64_t n = cache.head_size_v;
    std::array<const std::byte*, kBlockKeys> finite{};
    for (std::int64_t k = 0; k < rows.count() && cache.value.dtype == DType::kBF16; ++k) {
      std::memcpy(block_.values + k * n, rows.value[static_cast<std::size_t>(k)],
                  static_cast<std::size_t>(2 * n));
    }
    if (cache.value.dtype != DType::kBF16) {
      bf16_keys(cache.value.dtype, rows.value.data(), rows.count(), n, block_.values);
    }
    bf16_drop_nonfinite(block_.values, rows.count() * n);
    for (std::int64_t k = 0; k < rows.count(); ++k) {
      finite[static_cast<std::size_t>(k)] =
          reinterpret_cast<const std::byte*>(block_.values + k * n);
    }
    accumulate_from(DType::kBF16, finite.data(), rows.count(), fetch, keep, acc);
    add_nonfinite(rows, cache.value.dtype, n, num_rows, block_.scores, /*p_key=*/1, kBlockKeys, acc,
                  /*acc_column=*/1, padded(n));
  }

 private:
  void accumulate_from(DType stored, const std::byte* const* values, std::int64_t num_keys,
                       Fetch& fetch, const float* keep, float* acc) const {
    bf16_weights_narrow(kRows, block_.scores, num_keys, block_.weights);
    bf16_accumulate_narrow(kRows, stored, block_.weights, values, fetch, num_keys,
                           args_.cache.head_size_v, keep, acc);
  }

  const AttendArgs& args_;
  const NarrowBlock& block_;
};
#endif

// One KV head of a tile of up to kRows rows.
template <int kRows, class Products>
class NarrowTile : public TileBase {
 public:
  using Block = NarrowBlock;

  static NarrowBlock block(core::Layout& take, const KvCacheView& cache) {
    return {take, kRows, Products::padded(cache.head_size_v)};
  }

  NarrowTile(const AttendCall& call, const plan::Piece& piece, std::int64_t head,
             const Block& block, core::Layout& take)
      : TileBase(call, piece, head),
        padded_qk_(Products::padded(args_.cache.head_size_qk)),
        padded_v_(Products::padded(args_.cache.head_size_v)),
        own_(take, kRows, padded_qk_, padded_v_),
        block_(block),
        products_(args_, block),
        scale_(query_scale()) {
    find_rows(kRows, own_.info);
    rules_ = score_rules();
    load_rows();
  }

  // Runs a block.
  void run_block(const BlockRows& rows, Fetch& fetch) {
    const KvCacheView& cache = args_.cache;
    const KeyRange range = rows.range;
    products_.score(own_.query, rows, fetch, scale_);
    const bool all_seen = seen_by_all(range);
    const bool whole_vectors = rows.count() % kLanes == 0;
    for (std::int64_t row = 0; rules_.any() && row < num_rows(); ++row) {
      apply_rules_to_row(rules_, info_.slope[row], info_.position[row], range.begin, rows.count(),
                         block_.scores + row * kBlockKeys);
    }
    const bool biased =
        add_qq_bias(range, 0, num_rows(), block_.scores, /*key_stride=*/1, kBlockKeys);
    bool finite = true;
    if (!all_seen || biased) {
      finite = with_dtype(cache.value.dtype, [&](auto dtype) HWY_ATTR {
        return values_finite<decltype(dtype)::value>(rows, cache.head_size_v);
      });
    }
    float keep[kRows] = {};
    for (std::int64_t row = 0; row < num_rows(); ++row) {
      float* scores = block_.scores + row * kBlockKeys;
      if (!all_seen || !whole_vectors) {
        apply_mask_to_row({info_.prefix_end[row], info_.begin[row], info_.end[row]}, range, scores);
      }
      keep[row] = softmax_row(scores, rows.count(), state_[row]);
    }
    if (finite) {
      products_.accumulate(rows, fetch, keep, own_.acc);
    } else {
      mark_hidden(range, 0, num_rows(), block_.scores, /*key_stride=*/1, kBlockKeys);
      products_.accumulate_marked(rows, fetch, keep, own_.acc, num_rows());
    }
  }

  void finish() {
    if (folded_any_) fold();
    float* sums = folded_any_ ? own_.folded : own_.acc;
    const core::SoftmaxState* states = folded_any_ ? folded_state_ : state_;
    for (std::int64_t row = 0; row < num_rows(); ++row) {
      finish_row(row, states[row], sums + row * padded_v_);
    }
  }

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

 private:
  void load_rows() {
    std::fill_n(own_.query, kRows * padded_qk_, 0.0F);
    std::fill_n(own_.acc, kRows * padded_v_, 0.0F);
    for (std::int64_t row = 0; row < num_rows(); ++row) {
      products_.load_query(query_of(row), scale_, own_.query, row);
    }
  }

  std::int64_t padded_qk_;
  std::int64_t padded_v_;
  ScoreRules rules_;
  NarrowState own_;
  Block block_;
  Products products_;
  float scale_;  // of the scores
  core::SoftmaxState state_[kRows];
  core::SoftmaxState folded_state_[kRows];
  bool folded_any_ = false;
};

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace diffkv::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
