// What the matrix unit multiplies, made by vectors: also on machines that have no such unit.
#include "cpu/amx.h"

#ifdef DIFFKV_HAS_AMX

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/dtype.h"
#include "cpu/amx_fp16.h"
#include "cpu/bf16_dot.h"
#include "cpu/kernels.h"

namespace diffkv {
namespace {

constexpr std::uint32_t kUnwritten = 0xffffffffU;

float of_pair(std::uint32_t pair, std::size_t key) {
  return core::bf16_to_float(static_cast<std::uint16_t>(key % 2 == 0 ? pair : pair >> 16));
}

// Every fp16 is the sum of its parts, which are the same beside others of its kind and of all.
TEST(CpuPartsTest, OfEveryFp16) {
  if (!cpu::bf16_dot_available()) GTEST_SKIP() << "no AVX512_BF16";
  constexpr int kNumbers = 1 << 16;
  std::vector<std::uint16_t> first_upper(kNumbers);
  std::vector<std::uint16_t> first_lower(kNumbers);
  for (const int step : {1, 2053}) {
    std::vector<std::uint16_t> numbers(kNumbers);
    for (int i = 0; i < kNumbers; ++i) {
      numbers[static_cast<std::size_t>(i)] = static_cast<std::uint16_t>(i * step);
    }
    std::vector<std::uint16_t> upper(kNumbers);
    std::vector<std::uint16_t> lower(kNumbers);
    constexpr int kRow = 1 << 10;
    std::vector<const std::byte*> rows;
    for (int i = 0; i < kNumbers; i += kRow) {
      rows.push_back(reinterpret_cast<const std::byte*>(numbers.data() + i));
    }
    const std::uint64_t nonfinite =
        cpu::amx_split_rows(rows.data(), kNumbers / kRow, kRow, {upper.data(), lower.data()});
    std::uint64_t expected = 0;
    const auto index = [](std::size_t i) {
      return static_cast<std::size_t>(cpu::split_index(static_cast<std::int64_t>(i)));
    };
    for (std::size_t i = 0; i < numbers.size(); ++i) {
      const float x = core::f16_to_float(numbers[i]);
      const float u = core::bf16_to_float(upper[index(i)]);
      const float l = core::bf16_to_float(lower[index(i)]);
      if (std::isfinite(x)) {
        ASSERT_EQ(u + l, x) << i;
        ASSERT_LE(std::abs(l), 0x1p-8F * std::abs(x)) << i;
      } else {
        expected |= std::uint64_t{1} << i / kRow;
        ASSERT_TRUE(std::isnan(x) ? std::isnan(u) : u == x) << i;
        ASSERT_EQ(l, 0.0F) << i;
      }
    }
    EXPECT_EQ(nonfinite, expected);
    for (std::size_t i = 0; i < numbers.size(); ++i) {
      if (step == 1) {
        first_upper[numbers[i]] = upper[index(i)];
        first_lower[numbers[i]] = lower[index(i)];
      }
      ASSERT_EQ(upper[index(i)], first_upper[numbers[i]]) << numbers[i];
      ASSERT_EQ(lower[index(i)], first_lower[numbers[i]]) << numbers[i];
    }
  }
}

// Pairs of an odd number of keys.
TEST(CpuPartsTest, OfValues) {
  if (!cpu::bf16_dot_available()) GTEST_SKIP() << "no AVX512_BF16";
  constexpr std::size_t kKeys = 7;
  constexpr std::size_t kColumns = 48;
  for (const bool finite : {true, false}) {
    std::vector<std::uint16_t> values(kKeys * kColumns);
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] = static_cast<std::uint16_t>((0x3001 + 97 * i) & 0x3fffU);
    }
    if (!finite) {
      values[2 * kColumns + 3] = 0x7e00;   // NaN
      values[3 * kColumns + 40] = 0x7c00;  // and infinities: of an odd key,
      values[4 * kColumns + 17] = values[5 * kColumns + 17] = 0xfc00;  // of a pair,
      values[6 * kColumns + 47] = 0xfc00;                              // of the last key
    }
    std::vector<const std::byte*> rows;
    for (std::size_t k = 0; k < kKeys; ++k) {
      rows.push_back(reinterpret_cast<const std::byte*>(values.data() + k * kColumns));
    }
    std::vector<std::uint32_t> upper((kKeys + 1) / 2 * kColumns, kUnwritten);
    std::vector<std::uint32_t> lower(upper.size(), kUnwritten);
    EXPECT_EQ(cpu::amx_split_values(rows.data(), kKeys, kColumns, {upper.data(), lower.data()}),
              finite);
    for (std::size_t k = 0; k < kKeys + 1; ++k) {
      for (std::size_t c = 0; c < kColumns; ++c) {
        const std::size_t at = k / 2 * kColumns + c;
        const float x = k < kKeys ? core::f16_to_float(values[k * kColumns + c]) : 0.0F;
        EXPECT_EQ(of_pair(upper[at], k) + of_pair(lower[at], k), std::isfinite(x) ? x : 0.0F)
            << k << " " << c;
      }
    }
  }
}

// Both kinds, of keys that fill registers and of keys that do not.
TEST(CpuPartsTest, OfWeights) {
  if (!cpu::bf16_dot_available()) GTEST_SKIP() << "no AVX512_BF16";
  constexpr std::size_t kWidth = 32;
  constexpr std::size_t kPairs = cpu::kBlockKeys / 2;
  for (const std::size_t keys : {1, 31, 32, 37, 64}) {
    std::vector<float> p(keys * kWidth);
    for (std::size_t i = 0; i < p.size(); ++i) p[i] = 1.0F / static_cast<float>(i + 3);
    std::vector<std::uint32_t> whole(kWidth * kPairs, kUnwritten);
    std::vector<std::uint32_t> upper(whole.size(), kUnwritten);
    std::vector<std::uint32_t> lower(whole.size(), kUnwritten);
    const auto count = static_cast<std::int64_t>(keys);
    cpu::amx_weights(kWidth, p.data(), count, whole.data());
    cpu::amx_split_weights(kWidth, p.data(), count, {upper.data(), lower.data()});
    const std::size_t padded = (keys + 31) / 32 * 32;
    for (std::size_t row = 0; row < kWidth; ++row) {
      for (std::size_t k = 0; k < padded; ++k) {
        const std::size_t at = row * kPairs + k / 2;
        const float x = k < keys ? p[k * kWidth + row] : 0.0F;
        EXPECT_EQ(of_pair(whole[at], k), core::bf16_to_float(core::float_to_bf16(x)));
        EXPECT_NEAR(of_pair(upper[at], k) + of_pair(lower[at], k), x, 0x1p-17F * x);
      }
    }
  }
}

}  // namespace
}  // namespace diffkv

#endif
