// How a wide tile multiplies, for the target being compiled: in fp32, or of bf16 pairs.

// Per-target include guard.
#if defined(DIFFKV_CPU_WIDE_PRODUCTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DIFFKV_CPU_WIDE_PRODUCTS_INL_H_
#undef DIFFKV_CPU_WIDE_PRODUCTS_INL_H_
#else
#define DIFFKV_CPU_WIDE_PRODUCTS_INL_H_
#endif

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu/amx.h"
#include "cpu/amx_fp16.h"
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

// How a wide tile multiplies in fp32, whatever is stored: keys and values are converted into
// scratch. A tile of one group of rows reads a converted element once, so a few are converted at a
// time and read while they are in the first-level cache; for several groups a block is converted
// once.
class Fp32Products {
 public:
  static constexpr bool kSumsByRow = false;
  static constexpr bool kPacksQueries = false;

  Fp32Products(const AttendArgs& args, const WideBlock& own, std::int64_t width)
      : args_(args), own_(own), whole_blocks_(width > kGroupWidth) {}

  // 32-bit words of a query row.
  std::int64_t query_words() const { return args_.cache.head_size_qk; }

  // The tile's query row `row`, times `scale`.
  void load_query(std::int64_t /*row*/, const std::byte* query, float scale, float* to) const {
    load_scaled(args_.query.dtype, query, query_words(), scale, to);
  }

  // Begins a block.
  void load(const BlockRows& rows) {
    if (!whole_blocks_) return;
    load_keys(rows, 0, rows.count());
    finite_ = load_values(rows);
  }

  template <int kVectors>
  void score(const GroupBuffers& group, const BlockRows& rows, Fetch& fetch,
             float /*scale*/) const {
    const std::int64_t n = args_.cache.head_size_qk;
    if (whole_blocks_) {
      score_block<kVectors>(group, own_.keys, fetch, rows.count(), n);
      return;
    }
    GroupBuffers part = group;
    for (std::int64_t k = 0; k < rows.count(); k += kKeysAtOnce) {
      const std::int64_t count = std::min(rows.count() - k, kKeysAtOnce);
      load_keys(rows, k, count);
      part.scores = group.scores + k * kVectors * kLanes;
      score_block<kVectors>(part, own_.keys, fetch, count, n);
    }
  }

  // Returns false where some value is NaN or infinite and not all rows see it, so that hidden keys
  // have to be marked -0 and accumulate_marked has to do it.
  template <int kVectors>
  bool accumulate(const GroupBuffers& group, const BlockRows& rows, Fetch& fetch,
                  bool all_seen) const {
    if (!all_seen && !finite(rows)) return false;
    const std::int64_t n = args_.cache.head_size_v;
    // Whoever had to ask whether all are finite has converted all.
    if (whole_blocks_ || !all_seen) {
      accumulate_block<kVectors>(group, own_.values, fetch, rows.count(), n, own_.keep);
      return true;
    }
    GroupBuffers part = group;
    for (std::int64_t c = 0; c < n; c += kValueColumns) {
      load_columns(rows, c);
      part.acc = group.acc + c * kVectors * kLanes;
      accumulate_block<kVectors>(part, own_.values, fetch, rows.count(),
                                 std::min(n - c, kValueColumns), own_.keep);
    }
    return true;
  }

  // `count`: rows that are there.
  template <int kVectors>
  void accumulate_marked(const GroupBuffers& group, const BlockRows& rows, Fetch& /*fetch*/,
                         std::int64_t /*count*/) const {
    accumulate_visible(group, kVectors * kLanes, own_.values, rows.count(), args_.cache.head_size_v,
                       own_.keep);
  }

 private:
  static constexpr std::int64_t kKeysAtOnce = 16;

  // Keys first to first + count - 1, and zeros up to a multiple of kKeyPadding.
  void load_keys(const BlockRows& rows, std::int64_t first, std::int64_t count) const {
    const std::int64_t n = args_.cache.head_size_qk;
    with_dtype(args_.cache.key.dtype, [&](auto dtype) HWY_ATTR {
      for (std::int64_t k = 0; k < count; ++k) {
        load_row<decltype(dtype)::value>(rows.key[static_cast<std::size_t>(first + k)], n,
                                         own_.keys + k * n);
      }
    });
    const std::int64_t padded = (count + kKeyPadding - 1) / kKeyPadding * kKeyPadding;
    std::fill(own_.keys + count * n, own_.keys + padded * n, 0.0F);
  }

  bool finite(const BlockRows& rows) const { return whole_blocks_ ? finite_ : load_values(rows); }

  // All columns. Returns whether every value is finite.
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

  // kValueColumns columns from c on, to where the first ones are.
  void load_columns(const BlockRows& rows, std::int64_t c) const {
    const LaneTag d;
    const std::int64_t n = args_.cache.head_size_v;
    const std::int64_t columns = std::min(n - c, kValueColumns);
    const std::byte* const* HWY_RESTRICT row = rows.value.data();
    float* HWY_RESTRICT to = own_.values;
    const std::int64_t count = rows.count();
    with_dtype(args_.cache.value.dtype, [&](auto dtype) HWY_ATTR {
      for (std::int64_t k = 0; k < count; ++k, to += kValueColumns) {
        for (std::int64_t i = 0; i < columns; i += kLanes) {
          hn::StoreU(load_padded<decltype(dtype)::value>(d, row[k], c + i, n), d, to + i);
        }
      }
    });
  }

  const AttendArgs& args_;
  const WideBlock& own_;
  bool whole_blocks_;
  bool finite_ = false;
};

#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
// How a wide tile multiplies bf16 queries with bf16 or fp8 keys and values where the machine has
// AVX512_BF16, or in its matrix unit. Queries stay as they are and scores are scaled; bf16 keys are
// read in place.
template <bool kAmx>
class Bf16Products {
 public:
  static constexpr bool kSumsByRow = kAmx;
  static constexpr bool kPacksQueries = false;

  Bf16Products(const AttendArgs& args, const WideBlock& own, std::int64_t /*width*/)
      : args_(args), own_(own) {}

  std::int64_t query_words() const { return args_.cache.head_size_qk / 2; }

  void load_query(std::int64_t /*row*/, const std::byte* query, float /*scale*/, float* to) const {
    std::memcpy(to, query, static_cast<std::size_t>(4 * query_words()));
  }

  void load(const BlockRows& rows) {
    const KvCacheView& cache = args_.cache;
    if (cache.key.dtype != DType::kBF16) {
      bf16_keys(cache.key.dtype, rows.key.data(), rows.count(), cache.head_size_qk, keys());
    }
    finite_ = bf16_values(cache.value.dtype, rows.value.data(), rows.count(), cache.head_size_v,
                          values());
  }

  template <int kVectors>
  void score(const GroupBuffers& group, const BlockRows& rows, Fetch& fetch, float scale) const {
    const std::int64_t head_size = args_.cache.head_size_qk;
    const Bf16Keys bf16(rows, args_.cache.key.dtype, keys(), head_size);
    const std::byte* const* key = bf16.data();
    const auto* query = reinterpret_cast<const std::uint32_t*>(group.query);
    if constexpr (kAmx) {
      amx_scores(kVectors * kLanes, query, key, keys() + kBlockKeys * head_size, fetch,
                 rows.count(), head_size, scale, group.scores);
    } else {
      bf16_scores(kVectors * kLanes, query, key, fetch, rows.count(), head_size, scale,
                  group.scores);
    }
  }

  template <int kVectors>
  bool accumulate(const GroupBuffers& group, const BlockRows& rows, Fetch& fetch,
                  bool all_seen) const {
    if (!all_seen && !finite_) return false;
    constexpr std::int64_t kWidth = kVectors * kLanes;
    const std::int64_t head_size = args_.cache.head_size_v;
    if constexpr (kAmx) {
      amx_weights(kWidth, group.scores, rows.count(), own_.weights);
      amx_accumulate(kWidth, own_.weights, values(), fetch, rows.count(), head_size, own_.keep,
                     group.acc);
    } else {
      bf16_weights(kWidth, group.scores, rows.count(), own_.weights);
      bf16_accumulate(kWidth, own_.weights, values(), fetch, rows.count(), head_size, own_.keep,
                      group.acc);
    }
    return true;
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
    accumulate<kVectors>(group, rows, fetch, /*all_seen=*/true);
    add_nonfinite(rows, cache.value.dtype, cache.head_size_v, count, group.scores, kWidth,
                  /*p_row=*/1, group.acc, kSumsByRow ? 1 : kWidth,
                  /*acc_row=*/kSumsByRow ? cache.head_size_v : 1);
  }

 private:
  std::uint16_t* keys() const { return reinterpret_cast<std::uint16_t*>(own_.keys); }
  std::uint32_t* values() const { return reinterpret_cast<std::uint32_t*>(own_.values); }

  const AttendArgs& args_;
  const WideBlock& own_;
  bool finite_ = false;
};

#ifdef DIFFKV_HAS_AMX
// How a wide tile of more rows than a decode tile's multiplies fp16 in the matrix unit for bf16:
// queries, keys, weights and values each as two parts. Of 16 rows, for which keys and values are
// split as well, decode is no faster than in fp32: 1 x 32768 by two threads of a Xeon took 9.6 to
// 11.1 ms, and 8.3 to 13.8.
class SplitProducts {
 public:
  static constexpr bool kSumsByRow = true;
  static constexpr bool kPacksQueries = false;

  SplitProducts(const AttendArgs& args, const WideBlock& own, std::int64_t /*width*/)
      : args_(args), own_(own) {}

  std::int64_t query_words() const { return args_.cache.head_size_qk; }

  void load_query(std::int64_t row, const std::byte* query, float /*scale*/, float* to) {
    const std::int64_t n = query_words();
    auto* parts = reinterpret_cast<std::uint16_t*>(to);
    const std::uint64_t nonfinite = amx_split_rows(&query, 1, n, {parts, parts + n});
    nonfinite_rows_[static_cast<std::size_t>(row / kGroupWidth)] |= nonfinite << row % kGroupWidth;
  }

  void load(const BlockRows& rows) {
    const KvCacheView& cache = args_.cache;
    nonfinite_keys_ =
        amx_split_rows(rows.key.data(), rows.count(), cache.head_size_qk, {keys(), lower_keys()});
    finite_ = amx_split_values(rows.value.data(), rows.count(), cache.head_size_v,
                               {values(), lower_values()});
  }

  template <int kVectors>
  void score(const GroupBuffers& group, const BlockRows& rows, Fetch& fetch, float scale) const {
    constexpr std::int64_t kWidth = kVectors * kLanes;
    const std::int64_t n = args_.cache.head_size_qk;
    const auto* query = reinterpret_cast<const std::uint32_t*>(group.query);
    SplitScores operands;
    operands.query = {query, query + n / 2 * kWidth};
    operands.keys = {keys(), lower_keys()};
    operands.nonfinite_rows =
        nonfinite_rows_[static_cast<std::size_t>(group.first_row / kGroupWidth)];
    operands.nonfinite_keys = nonfinite_keys_;
    amx_split_scores(kWidth, operands, fetch, rows.count(), n, scale, group.scores);
  }

  // Leaves out what is not finite even where all rows see it: no part of a weight is to multiply it
  // alone.
  template <int kVectors>
  bool accumulate(const GroupBuffers& group, const BlockRows& rows, Fetch& fetch,
                  bool /*all_seen*/) const {
    constexpr std::int64_t kWidth = kVectors * kLanes;
    const Parts<std::uint32_t> weights{own_.weights, own_.weights + kBlockKeys / 2 * kWidth};
    amx_split_weights(kWidth, group.scores, rows.count(), weights);
    amx_split_accumulate(kWidth, {weights.upper, weights.lower}, {values(), lower_values()}, fetch,
                         rows.count(), args_.cache.head_size_v, own_.keep, group.acc);
    return finite_;
  }

  // Adds what was left out.
  template <int kVectors>
  void accumulate_marked(const GroupBuffers& group, const BlockRows& rows, Fetch& /*fetch*/,
                         std::int64_t count) const {
    constexpr std::int64_t kWidth = kVectors * kLanes;
    const KvCacheView& cache = args_.cache;
    add_nonfinite(rows, cache.value.dtype, cache.head_size_v, count, group.scores, kWidth,
                  /*p_row=*/1, group.acc, /*acc_column=*/1, /*acc_row=*/cache.head_size_v);
  }

 private:
  std::uint16_t* keys() const { return reinterpret_cast<std::uint16_t*>(own_.keys); }
  std::uint16_t* lower_keys() const { return keys() + kBlockKeys * args_.cache.head_size_qk; }
  std::uint32_t* values() const { return reinterpret_cast<std::uint32_t*>(own_.values); }
  std::uint32_t* lower_values() const {
    return values() + kBlockKeys / 2 * args_.cache.head_size_v;
  }

  const AttendArgs& args_;
  const WideBlock& own_;
  // Bits of rows and of the block's keys that hold a NaN or an infinity.
  std::array<std::uint64_t, (kPrefillRows + kGroupWidth - 1) / kGroupWidth> nonfinite_rows_{};
  std::uint64_t nonfinite_keys_ = 0;
  bool finite_ = false;
};
#endif
#endif

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace diffkv::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
