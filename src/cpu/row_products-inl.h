// How a wide tile of up to 16 rows multiplies, for the target being compiled, as rows-inl.h says.

// Per-target include guard.
#if defined(DIFFKV_CPU_ROW_PRODUCTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DIFFKV_CPU_ROW_PRODUCTS_INL_H_
#undef DIFFKV_CPU_ROW_PRODUCTS_INL_H_
#else
#define DIFFKV_CPU_ROW_PRODUCTS_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu/bf16_dot.h"
#include "cpu/codec-inl.h"
#include "cpu/fetch.h"
#include "cpu/kernels.h"
#include "cpu/narrow-inl.h"
#include "cpu/packed_rows.h"
#include "cpu/rows-inl.h"
#include "cpu/tile_base.h"
#include "cpu/wide-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace diffkv::cpu::HWY_NAMESPACE {

#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3

// What both kinds of products share.
class RowProducts {
 public:
  static constexpr bool kSumsByRow = true;
  static constexpr bool kPacksQueries = true;

  void load(const BlockRows& /*rows*/) const {}

 protected:
  RowProducts(const AttendArgs& args, const WideBlock& own) : args_(args), own_(own) {}

  // A row of so many words to its places among the tile's.
  static void pack(std::int64_t row, const void* from, std::int64_t words, float* to) {
    const auto* at = static_cast<const std::byte*>(from);
    for (std::int64_t word = 0; word < words; word += kRowWords, at += 4 * kRowWords) {
      std::memcpy(to + row_word_at(row, word), at, static_cast<std::size_t>(4 * kRowWords));
    }
  }

  // Values that are not finite are left out of the products and then added to the rows that see
  // them, so what hidden slots hold does not change a bit of the other rows.
  void add_left_out(const GroupBuffers& group, const BlockRows& rows, std::int64_t count) const {
    const KvCacheView& cache = args_.cache;
    add_nonfinite(rows, cache.value.dtype, cache.head_size_v, count, group.scores, kDecodeRows,
                  /*p_row=*/1, group.acc, /*acc_column=*/1, /*acc_row=*/cache.head_size_v);
  }

  const AttendArgs& args_;
  const WideBlock& own_;
};

// In fp32, whatever is stored. Keys are converted a few at a time, values in registers.
class Fp32RowProducts : public RowProducts {
 public:
  Fp32RowProducts(const AttendArgs& args, const WideBlock& own, std::int64_t /*width*/)
      : RowProducts(args, own) {}

  std::int64_t query_words() const { return args_.cache.head_size_qk; }

  void load_query(std::int64_t row, const std::byte* query, float scale, float* to) const {
    load_scaled(args_.query.dtype, query, query_words(), scale, own_.rows);
    pack(row, own_.rows, query_words(), to);
  }

  template <int kVectors>
  void score(const GroupBuffers& group, const BlockRows& rows, Fetch& fetch,
             float /*scale*/) const {
    with_dtype(args_.cache.key.dtype, [&](auto dtype) HWY_ATTR {
      score_rows<decltype(dtype)::value>(group.query, rows, fetch, args_.cache.head_size_qk,
                                         own_.keys, group.scores);
    });
  }

  template <int kVectors>
  bool accumulate(const GroupBuffers& group, const BlockRows& rows, Fetch& fetch,
                  bool all_seen) const {
    const KvCacheView& cache = args_.cache;
    return with_dtype(cache.value.dtype, [&](auto dtype) HWY_ATTR {
      constexpr DType kStored = decltype(dtype)::value;
      if (!all_seen && !values_finite<kStored>(rows, cache.head_size_v)) return false;
      accumulate_rows<kStored>(group.scores, rows, fetch, cache.head_size_v, own_.keep, group.acc);
      return true;
    });
  }

  template <int kVectors>
  void accumulate_marked(const GroupBuffers& group, const BlockRows& rows, Fetch& fetch,
                         std::int64_t count) const {
    const std::int64_t n = args_.cache.head_size_v;
    BlockRows finite = rows;
    with_dtype(args_.cache.value.dtype, [&](auto dtype) HWY_ATTR {
      for (std::int64_t k = 0; k < rows.count(); ++k) {
        float* to = own_.values + k * n;
        load_row<decltype(dtype)::value>(rows.value[static_cast<std::size_t>(k)], n, to);
        std::replace_if(
            to, to + n, [](float x) { return !std::isfinite(x); }, 0.0F);
        finite.value[static_cast<std::size_t>(k)] = reinterpret_cast<const std::byte*>(to);
      }
    });
    accumulate_rows<DType::kF32>(group.scores, finite, fetch, n, own_.keep, group.acc);
    add_left_out(group, rows, count);
  }
};

// Of pairs of bf16, with bf16 queries over bf16 or fp8 caches. bf16 keys and values are read in
// place, the latter paired in registers.
class Bf16RowProducts : public RowProducts {
 public:
  Bf16RowProducts(const AttendArgs& args, const WideBlock& own, std::int64_t /*width*/)
      : RowProducts(args, own) {}

  std::int64_t query_words() const { return args_.cache.head_size_qk / 2; }

  void load_query(std::int64_t row, const std::byte* query, float /*scale*/, float* to) const {
    pack(row, query, query_words(), to);
  }

  template <int kVectors>
  void score(const GroupBuffers& group, const BlockRows& rows, Fetch& fetch, float scale) const {
    const KvCacheView& cache = args_.cache;
    const std::int64_t n = cache.head_size_qk;
    auto* converted = reinterpret_cast<std::uint16_t*>(own_.keys);
    if (cache.key.dtype != DType::kBF16) {
      bf16_keys(cache.key.dtype, rows.key.data(), rows.count(), n, converted);
    }
    const Bf16Keys keys(rows, cache.key.dtype, converted, n);
    bf16_scores_of_rows(reinterpret_cast<const std::uint32_t*>(group.query), keys.data(), fetch,
                        rows.count(), n, scale, group.scores);
  }

  template <int kVectors>
  bool accumulate(const GroupBuffers& group, const BlockRows& rows, Fetch& fetch,
                  bool all_seen) const {
    const KvCacheView& cache = args_.cache;
    const std::int64_t n = cache.head_size_v;
    if (all_seen && cache.value.dtype == DType::kBF16) {
      bf16_weights(kDecodeRows, group.scores, rows.count(), own_.weights);
      bf16_accumulate_rows(own_.weights, rows.value.data(), fetch, rows.count(), n, own_.keep,
                           group.acc);
      return true;
    }
    const bool finite =
        bf16_values(cache.value.dtype, rows.value.data(), rows.count(), n, values());
    if (!all_seen && !finite) return false;
    accumulate_pairs(group, rows, fetch);
    return true;
  }

  // From the pairs that accumulate() left.
  template <int kVectors>
  void accumulate_marked(const GroupBuffers& group, const BlockRows& rows, Fetch& fetch,
                         std::int64_t count) const {
    bf16_drop_nonfinite(reinterpret_cast<std::uint16_t*>(values()),
                        (rows.count() + 1) / 2 * 2 * args_.cache.head_size_v);
    accumulate_pairs(group, rows, fetch);
    add_left_out(group, rows, count);
  }

 private:
  std::uint32_t* values() const { return reinterpret_cast<std::uint32_t*>(own_.values); }

  void accumulate_pairs(const GroupBuffers& group, const BlockRows& rows, Fetch& fetch) const {
    bf16_weights(kDecodeRows, group.scores, rows.count(), own_.weights);
    bf16_accumulate_pairs(own_.weights, values(), fetch, rows.count(), args_.cache.head_size_v,
                          own_.keep, group.acc);
  }
};

#endif

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace diffkv::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
