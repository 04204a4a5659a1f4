// Products in fp32 of a tile of up to 16 rows with AVX-512, where Tuning has them. Rows would
// be one vector of lanes, and every product would read an operand from memory (wide-inl.h). So a
// vector of queries holds four words of each of four rows, four of which meet the same words of
// four keys, repeated, and of values a block of rows multiplies some columns at a time: half a load
// a product.
//
// Seen on Zen 5, 8 x 4096 by two threads, pages of 16: fp16 3.9 ms instead of 4.55, fp32 4.5 to 4.8
// instead of 5.5 to 5.8, with whole vectors of four rows' queries and of four keys, whose 16 sums
// were each summed over 16 lanes; with four rows in a vector, whose sums take a fifth of the
// instructions to sum, fp16 3.56 instead of 3.77, fp32 4.08 instead of 4.25. In loops on data in
// the second-level cache, ns a key and KV head before that and with whole vectors: scores 31 and
// 27, sums 20 and 15.5; on a Xeon 45 and 50, 31 and 31. Next rows are fetched many lines at a time:
// where to fetch next takes registers from the sums, so that a line at a time is 10 % slower, and 2
// or 4 lines of values instead of 8 are 8 and 2 %.
//
// Tried and not kept on Zen 5, with whole vectors: keys converted while they are multiplied with
// the first rows (4.2 ms instead of 3.65 with contiguous keys), 16 keys at a time (4.6), lines
// brought on into the first level four keys ahead (0 to 1 % faster); in the loops alone, scores of
// 8 rows x 2 keys converted in registers (28.5 ns), sums of 4 rows x 64 columns (16), of 16 x 16
// (17.5), and of values converted beforehand (18.4). Fetches between two loops over keys instead of
// in one, and columns that are known to be whole: 0 to 8 % slower, by how the compiler lays out the
// same products.

// Per-target include guard.
#if defined(DIFFKV_CPU_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DIFFKV_CPU_ROWS_INL_H_
#undef DIFFKV_CPU_ROWS_INL_H_
#else
#define DIFFKV_CPU_ROWS_INL_H_
#endif

#include <cstddef>
#include <cstdint>

#include "cpu/codec-inl.h"
#include "cpu/fetch.h"
#include "cpu/kernels.h"
#include "cpu/lanes-inl.h"
#include "cpu/narrow-inl.h"
#include "cpu/packed_rows.h"
#include "cpu/tile_base.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace diffkv::cpu::HWY_NAMESPACE {

#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3

// Keys that are scored at a time, and rows that are summed.
inline constexpr int kRowsKeys = 4;
inline constexpr int kSummedRows = 8;
// Head dimensions of keys that are multiplied between fetches; 16 and 96 are 1 % slower, 192 6 %.
inline constexpr std::int64_t kDimsPerFetch = 48;
// All blocks of rows together fetch a unit for each key and unit of columns.
inline constexpr std::int64_t kUnitsPerFetch = 8;
inline constexpr std::int64_t kKeysPerFetch =
    kUnitsPerFetch * (kDecodeRows / kSummedRows) * Fetch::kUnit / (2 * kLanes);

// scores[key, row] = sum over d of query[row, d] * key[key, d], for num_keys rounded up to
// kRowsKeys. query: as row_word_at() says; scores: [kBlockKeys, kDecodeRows]; `converted` holds
// kRowsKeys keys. The next rows are fetched on the way.
template <DType kDType>
HWY_NOINLINE void score_rows(const float* HWY_RESTRICT query, const BlockRows& rows, Fetch& next,
                             std::int64_t head_size_qk, float* HWY_RESTRICT converted,
                             float* HWY_RESTRICT scores) {
  const LaneTag d;
  const std::int64_t padded = padded_to_unit(head_size_qk);
  Fetch fetch = next;
  for (std::int64_t k = 0; k < rows.count(); k += kRowsKeys) {
    for (std::int64_t j = 0; j < kRowsKeys; ++j) {
      const std::byte* key = rows.key[static_cast<std::size_t>(k + j)];
      for (std::int64_t i = 0; i < head_size_qk; i += kLanes) {
        hn::Store(load_padded<kDType>(d, key, i, head_size_qk), d, converted + j * padded + i);
      }
    }
    LaneVec sum[kRowsKeys][kRowParts];
    HWY_UNROLL(4)
    for (auto& of_key : sum) {
      HWY_UNROLL(4)
      for (LaneVec& v : of_key) v = hn::Zero(d);
    }
    for (std::int64_t begin = 0; begin < head_size_qk; begin += kDimsPerFetch) {
      const std::int64_t end = HWY_MIN(begin + kDimsPerFetch, head_size_qk);
      fetch.units((end - begin) * kRowsKeys / Fetch::kUnit);
      for (std::int64_t i = begin; i < end; i += kRowWords) {
        LaneVec q[kRowParts];
        HWY_UNROLL(4)
        for (std::int64_t v = 0; v < kRowParts; ++v) {
          q[v] = hn::Load(d, query + i / kRowWords * kRowParts * kLanes + v * kLanes);
        }
        HWY_UNROLL(4)
        for (std::int64_t j = 0; j < kRowsKeys; ++j) {
          const LaneVec key = hn::LoadDup128(d, converted + j * padded + i);
          HWY_UNROLL(4)
          for (int v = 0; v < kRowParts; ++v) sum[j][v] = hn::MulAdd(q[v], key, sum[j][v]);
        }
      }
    }
    HWY_UNROLL(4)
    for (std::int64_t j = 0; j < kRowsKeys; ++j) {
      hn::Store(sum_blocks(sum[j]), d, scores + (k + j) * kDecodeRows);
    }
  }
  next = fetch;
}

// Columns c to c + kVectors * kLanes - 1, or fewer where these are the last, of kSummedRows rows.
template <DType kDType, int kVectors>
HWY_INLINE void accumulate_row_block(const float* HWY_RESTRICT p, const BlockRows& rows,
                                     Fetch& fetch, std::int64_t c, std::int64_t head_size_v,
                                     const float* HWY_RESTRICT keep, float* HWY_RESTRICT acc) {
  const LaneTag d;
  LaneVec sum[kSummedRows][kVectors];
  HWY_UNROLL(8)
  for (auto& row : sum) {
    for (LaneVec& v : row) v = hn::Zero(d);
  }
  const std::byte* const* HWY_RESTRICT value = rows.value.data();
  const std::int64_t count = rows.count();
  for (std::int64_t k = 0; k < count; ++k, p += kDecodeRows) {
    if (k % kKeysPerFetch == 0) fetch.units(kUnitsPerFetch);
    LaneVec x[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      x[v] = load_padded<kDType>(d, value[k], c + v * kLanes, head_size_v);
    }
    HWY_UNROLL(8)
    for (int r = 0; r < kSummedRows; ++r) {
      const LaneVec weight = hn::Set(d, p[r]);
      for (int v = 0; v < kVectors; ++v) sum[r][v] = hn::MulAdd(x[v], weight, sum[r][v]);
    }
  }
  HWY_UNROLL(8)
  for (int r = 0; r < kSummedRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      const std::int64_t at = c + v * kLanes;
      float* HWY_RESTRICT to = acc + r * head_size_v + at;
      const LaneVec factor = hn::Set(d, keep[r]);
      if (head_size_v - at >= kLanes) {
        hn::StoreU(hn::MulAdd(hn::LoadU(d, to), factor, sum[r][v]), d, to);
      } else {
        const auto there = hn::FirstN(d, static_cast<std::size_t>(head_size_v - at));
        hn::BlendedStore(hn::MulAdd(hn::MaskedLoad(there, d, to), factor, sum[r][v]), there, d, to);
      }
    }
  }
}

// acc[row, c] = acc[row, c] * keep[row] + sum over keys of value[key, c] * p[key, row]. p:
// [kBlockKeys, kDecodeRows]; acc: [kDecodeRows, head_size_v]. Values are converted in registers.
template <DType kDType>
HWY_NOINLINE void accumulate_rows(const float* HWY_RESTRICT p, const BlockRows& rows, Fetch& next,
                                  std::int64_t head_size_v, const float* HWY_RESTRICT keep,
                                  float* HWY_RESTRICT acc) {
  Fetch fetch = next;
  for (std::int64_t c = 0; c < head_size_v; c += 2 * kLanes) {
    for (std::int64_t row = 0; row < kDecodeRows; row += kSummedRows) {
      float* HWY_RESTRICT to = acc + row * head_size_v;
      if (head_size_v - c > kLanes) {
        accumulate_row_block<kDType, 2>(p + row, rows, fetch, c, head_size_v, keep + row, to);
      } else {
        accumulate_row_block<kDType, 1>(p + row, rows, fetch, c, head_size_v, keep + row, to);
      }
    }
  }
  next = fetch;
}

#endif

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace diffkv::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
