// The arithmetic of pages against addresses counted out by hand.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "diffkv/cache.h"

namespace diffkv {
namespace {

using Shape = std::array<std::int64_t, 4>;

// Byte offset from `base` of element (block, token, head, d) of a plane.
std::int64_t offset_in(const void* base, const KvPlane& plane, std::int64_t block,
                       std::int64_t token, std::int64_t head, std::int64_t d) {
  const std::int64_t element =
      block * plane.stride_block + token * plane.stride_token + head * plane.stride_head + d;
  return static_cast<const char*>(plane.data) - static_cast<const char*>(base) +
         element * size_of(plane.dtype);
}

// Calls fn(block, token, head) for all of a view.
void for_each_row(const KvCacheView& view,
                  const std::function<void(std::int64_t, std::int64_t, std::int64_t)>& fn) {
  for (std::int64_t block = 0; block < view.num_blocks; ++block) {
    for (std::int64_t token = 0; token < view.block_size; ++token) {
      for (std::int64_t head = 0; head < view.num_kv_heads; ++head) fn(block, token, head);
    }
  }
}

struct SpecCase {
  KvCacheSpec spec;
  std::string name;
};

class CacheSpec : public testing::TestWithParam<SpecCase> {};

// Lays pages out byte by byte: K of a row, then V of it, rows in the layout's order, then padding.
TEST_P(CacheSpec, AddressesMatchPagesLaidOutByHand) {
  const KvCacheSpec& spec = GetParam().spec;
  const std::int64_t num_blocks = 3;
  alignas(64) static char memory[1 << 20];
  ASSERT_LE(num_blocks * spec.page_stride_bytes(), std::int64_t{sizeof(memory)});
  const KvCacheView view = spec.view(memory, num_blocks);
  EXPECT_EQ(view.num_blocks, num_blocks);
  EXPECT_EQ(view.block_size, spec.block_size);
  EXPECT_EQ(view.num_kv_heads, spec.num_kv_heads);
  EXPECT_EQ(view.head_size_qk, spec.head_size_qk);
  EXPECT_EQ(view.head_size_v, spec.head_size_v);
  EXPECT_FALSE(view.dense);
  EXPECT_FALSE(view.read_only);

  const bool nhd = spec.layout == KvCacheLayout::kNHD;
  const std::int64_t size = size_of(spec.dtype);
  std::int64_t at = 0;
  for (std::int64_t block = 0; block < num_blocks; ++block) {
    const std::int64_t page = at;
    for (std::int64_t outer = 0; outer < (nhd ? spec.block_size : spec.num_kv_heads); ++outer) {
      for (std::int64_t inner = 0; inner < (nhd ? spec.num_kv_heads : spec.block_size); ++inner) {
        const std::int64_t token = nhd ? outer : inner;
        const std::int64_t head = nhd ? inner : outer;
        for (std::int64_t d = 0; d < spec.head_size_qk; ++d, at += size) {
          ASSERT_EQ(offset_in(memory, view.key, block, token, head, d), at);
        }
        for (std::int64_t d = 0; d < spec.head_size_v; ++d, at += size) {
          ASSERT_EQ(offset_in(memory, view.value, block, token, head, d), at);
        }
      }
    }
    EXPECT_EQ(at - page, spec.page_size_bytes());
    if (spec.page_size_padded > 0) at = page + spec.page_size_padded;
    EXPECT_EQ(at - page, spec.page_stride_bytes());
  }
}

TEST_P(CacheSpec, ShapeAndStridesAreThoseOfOneTensor) {
  const KvCacheSpec& spec = GetParam().spec;
  const Shape shape = spec.shape(7);
  EXPECT_EQ(shape,
            (Shape{7, spec.block_size, spec.num_kv_heads, spec.head_size_qk + spec.head_size_v}));
  // Every element of a page has its own place, and the last one ends the page's content.
  const Shape strides = spec.strides();
  EXPECT_EQ(strides[3], 1);
  EXPECT_EQ(strides[0] * size_of(spec.dtype), spec.page_stride_bytes());
  std::set<std::int64_t> places;
  for (std::int64_t t = 0; t < shape[1]; ++t) {
    for (std::int64_t h = 0; h < shape[2]; ++h) {
      for (std::int64_t d = 0; d < shape[3]; ++d) {
        places.insert(t * strides[1] + h * strides[2] + d);
      }
    }
  }
  EXPECT_EQ(static_cast<std::int64_t>(places.size()), shape[1] * shape[2] * shape[3]);
  EXPECT_EQ((*places.rbegin() + 1) * size_of(spec.dtype), spec.page_size_bytes());
}

std::vector<SpecCase> spec_cases() {
  const struct {
    std::int64_t block_size, heads, size_qk, size_v;
    DType dtype;
    std::int64_t padding;
  } rows[] = {
      {16, 4, 192, 128, DType::kBF16, 0},  {16, 2, 96, 64, DType::kF16, 512},
      {1, 1, 8, 8, DType::kF32, 0},        {5, 3, 24, 40, DType::kE4M3, 8},
      {13, 1, 64, 128, DType::kE5M2, 0},   {1, 5, 16, 8, DType::kBF16, 16},
      {100, 2, 40, 24, DType::kF32, 4096},
  };
  std::vector<SpecCase> cases;
  for (const auto& row : rows) {
    for (const KvCacheLayout layout : {KvCacheLayout::kNHD, KvCacheLayout::kHND}) {
      KvCacheSpec spec{.block_size = row.block_size,
                       .num_kv_heads = row.heads,
                       .head_size_qk = row.size_qk,
                       .head_size_v = row.size_v,
                       .dtype = row.dtype,
                       .layout = layout};
      if (row.padding > 0) spec.page_size_padded = spec.page_size_bytes() + row.padding;
      cases.push_back({spec, std::string(to_string(layout)) + "_" + std::to_string(cases.size()) +
                                 "_" + std::string(to_string(row.dtype))});
    }
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(Pages, CacheSpec, testing::ValuesIn(spec_cases()),
                         [](const auto& row) { return row.param.name; });

alignas(64) char buffer[1 << 16];

TEST(SeparateCache, HasItsOwnStridesAndDtypes) {
  // K is bf16 in NHD pages; V is e5m2, heads first, with gaps between pages.
  const TensorView key(buffer, DType::kBF16, {4, 16, 2, 24});
  TensorView value(buffer + 8192, DType::kE5M2, {4, 16, 2, 40});
  value.strides = {2048, 40, 640, 1};
  const KvCacheView view = KvCacheView::separate(key, value);
  EXPECT_EQ(view.key.dtype, DType::kBF16);
  EXPECT_EQ(view.value.dtype, DType::kE5M2);
  EXPECT_EQ(view.head_size_qk, 24);
  EXPECT_EQ(view.head_size_v, 40);
  for_each_row(view, [&](std::int64_t b, std::int64_t t, std::int64_t h) {
    EXPECT_EQ(offset_in(buffer, view.key, b, t, h, 5), (((b * 16 + t) * 2 + h) * 24 + 5) * 2);
    EXPECT_EQ(offset_in(buffer, view.value, b, t, h, 39), 8192 + b * 2048 + h * 640 + t * 40 + 39);
  });
}

TEST(DenseTokens, AreOneReadOnlyPage) {
  // Slices of a fused [token, k | v] buffer.
  ConstTensorView key(buffer, DType::kF16, {9, 3, 16});
  ConstTensorView value(buffer + 3 * 16 * 2, DType::kF16, {9, 3, 8});
  key.strides[0] = value.strides[0] = 3 * (16 + 8);
  const KvCacheView view = KvCacheView::dense_tokens(key, value);
  EXPECT_TRUE(view.dense);
  EXPECT_TRUE(view.read_only);
  EXPECT_EQ(view.num_blocks, 1);
  EXPECT_EQ(view.block_size, 9);
  EXPECT_EQ(view.num_kv_heads, 3);
  for_each_row(view, [&](std::int64_t b, std::int64_t t, std::int64_t h) {
    EXPECT_EQ(offset_in(buffer, view.key, b, t, h, 2), (t * 72 + h * 16 + 2) * 2);
    EXPECT_EQ(offset_in(buffer, view.value, b, t, h, 7), (t * 72 + 48 + h * 8 + 7) * 2);
  });
}

TEST(DenseTokens, MayBeNone) {
  const KvCacheView view =
      KvCacheView::dense_tokens(ConstTensorView(nullptr, DType::kF16, {0, 3, 16}),
                                ConstTensorView(nullptr, DType::kF16, {0, 3, 8}));
  EXPECT_EQ(view.block_size, 0);
  EXPECT_EQ(view.key.data, nullptr);
  EXPECT_EQ(view.value.data, nullptr);
}

TEST(PackedCache, RawBytesAreWhatTheyAreNamed) {
  const TensorView bytes(buffer, DType::kU8, {2, 16, 2, 40});
  for (const DType stored : {DType::kE4M3, DType::kE5M2}) {
    const KvCacheView view = KvCacheView::packed(bytes, 24, stored);
    EXPECT_EQ(view.key.dtype, stored);
    EXPECT_EQ(view.value.dtype, stored);
    EXPECT_EQ(static_cast<char*>(view.value.data) - buffer, 24);
    EXPECT_EQ(view.head_size_v, 16);
  }
}

TEST(PackedCache, StridesOfDimensionsOfOneMeanNothing) {
  TensorView cache(buffer, DType::kBF16, {1, 16, 1, 40});
  cache.strides[0] = std::numeric_limits<std::int64_t>::max();
  cache.strides[2] = -3;
  const KvCacheView view = KvCacheView::packed(cache, 24);
  EXPECT_EQ(offset_in(buffer, view.key, 0, 15, 0, 23), (15 * 40 + 23) * 2);
  EXPECT_EQ(offset_in(buffer, view.value, 0, 15, 0, 15), (15 * 40 + 39) * 2);
}

void expect_refused(const std::function<void()>& call, const std::vector<std::string>& says) {
  try {
    call();
    ADD_FAILURE() << "not refused; expected: " << says.front();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
    for (const std::string& part : says) {
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos)
          << "\"" << error.what() << "\" does not say \"" << part << "\"";
    }
  }
}

TEST(PackedCache, Refuses) {
  const TensorView cache(buffer, DType::kBF16, {2, 16, 2, 40});
  const auto refused = [](TensorView tensor, std::int64_t size_qk, DType stored,
                          const std::vector<std::string>& says) {
    expect_refused([&] { KvCacheView::packed(tensor, size_qk, stored); }, says);
  };
  refused({}, 24, DType::kBF16, {"kv_cache is not given", "[num_blocks, block_size"});
  refused(cache, 24, DType::kF16, {"kv_cache is bf16", "`stored` is fp16", "the same"});
  refused(cache, 20, DType::kBF16, {"head_size_qk is 20", "multiple of 8"});
  refused(cache, std::numeric_limits<std::int64_t>::max(), DType::kBF16,
          {"head_size_qk is 9223372036854775807"});
  refused(cache, 40, DType::kBF16, {"head_size_qk + head_size_v 40", "48"});
  refused(TensorView(buffer, DType::kBF16, {2, 16, 80}), 24, DType::kBF16,
          {"kv_cache has rank 3", "expected 4"});
  refused(TensorView(buffer, DType::kU8, {2, 16, 2, 40}), 24, DType::kU8,
          {"kv_cache is uint8", "`stored` is uint8", "fp8_e4m3 or fp8_e5m2"});
  refused(TensorView(buffer, DType::kI32, {2, 16, 2, 40}), 24, DType::kI32,
          {"kv_cache is int32", "expected fp32"});
  refused(TensorView(buffer, DType::kBF16, {2, 16, 2, 44}), 24, DType::kBF16,
          {"head_size_v is 20"});
  refused(TensorView(buffer, DType::kBF16, {-1, 16, 2, 40}), 24, DType::kBF16,
          {"num_blocks -1", "0 or more"});
  refused(TensorView(buffer, DType::kBF16, {2, 0, 2, 40}), 24, DType::kBF16, {"block_size 0"});
  refused(TensorView(nullptr, DType::kBF16, {2, 16, 2, 40}), 24, DType::kBF16, {"no data"});
  refused(TensorView(buffer + 2, DType::kBF16, {2, 16, 2, 40}), 24, DType::kBF16,
          {"starts 2 bytes past a multiple of 16"});
  TensorView strided = cache;
  strided.strides[3] = 2;
  refused(strided, 24, DType::kBF16, {"stride 2 in its last dimension"});
  strided = cache;
  strided.strides[1] = 84;
  refused(strided, 24, DType::kBF16, {"stride 84 in dimension 1", "multiple of 8"});
  expect_refused(
      [] {
        KvCacheView::packed(TensorView(buffer, DType::kU8, {2, 16, 2, 40}), 24);
      },
      {"kv_cache is uint8"});
}

TEST(SeparateCache, Refuses) {
  const TensorView key(buffer, DType::kBF16, {2, 16, 2, 24});
  const auto refused = [&](const TensorView& value, const std::vector<std::string>& says) {
    expect_refused([&] { KvCacheView::separate(key, value); }, says);
  };
  refused(TensorView(buffer, DType::kBF16, {3, 16, 2, 16}),
          {"value cache has num_blocks 3, the key cache has 2"});
  refused(TensorView(buffer, DType::kBF16, {2, 8, 2, 16}), {"block_size 8, the key cache has 16"});
  refused(TensorView(buffer, DType::kBF16, {2, 16, 1, 16}),
          {"num_kv_heads 1, the key cache has 2"});
  refused(TensorView(buffer, DType::kU8, {2, 16, 2, 16}), {"value cache is uint8"});
  refused(TensorView(buffer, DType::kBF16, {2, 16, 2, 16}, {DeviceType::kCuda, 0}),
          {"value cache is on cuda:0", "the key cache is on cpu"});
  refused(TensorView(buffer, DType::kBF16, {2, 16, 2, 7}), {"head_size_v is 7"});
  TensorView strided(buffer, DType::kBF16, {2, 16, 2, 16});
  strided.strides[3] = 2;
  refused(strided, {"value cache has stride 2 in its last dimension"});
  const TensorView value(buffer, DType::kBF16, {2, 16, 2, 16});
  expect_refused([&] { KvCacheView::separate({}, value); }, {"key cache is not given"});
  expect_refused([&] { KvCacheView::separate(strided, value); },
                 {"key cache has stride 2 in its last dimension"});
}

TEST(DenseTokens, Refuses) {
  const ConstTensorView key(buffer, DType::kBF16, {8, 2, 24});
  const auto refused = [&](const ConstTensorView& value, const std::vector<std::string>& says) {
    expect_refused([&] { KvCacheView::dense_tokens(key, value); }, says);
  };
  refused({}, {"value is not given"});
  refused(ConstTensorView(buffer, DType::kBF16, {7, 2, 16}), {"num_kv_tokens 7, key has 8"});
  refused(ConstTensorView(buffer, DType::kBF16, {8, 1, 16}), {"num_kv_heads 1, key has 2"});
  refused(ConstTensorView(buffer, DType::kBF16, {8, 2, 600}), {"head_size_v is 600"});
  ConstTensorView strided(buffer, DType::kBF16, {8, 2, 16});
  strided.strides[2] = 4;
  refused(strided, {"value has stride 4 in its last dimension"});
  const ConstTensorView value(buffer, DType::kBF16, {8, 2, 16});
  refused(ConstTensorView(buffer, DType::kBF16, {8, 2, 16}, {DeviceType::kCuda, 1}),
          {"value is on cuda:1", "key is on cpu"});
  expect_refused([&] { KvCacheView::dense_tokens({}, value); }, {"key is not given"});
  expect_refused([&] { KvCacheView::dense_tokens(strided, value); },
                 {"key has stride 4 in its last dimension"});
}

TEST(CacheSpec, Refuses) {
  const KvCacheSpec good{.head_size_qk = 192, .head_size_v = 128};
  EXPECT_NO_THROW(good.check());
  const auto refused = [&](const std::function<void(KvCacheSpec&)>& spoil,
                           const std::vector<std::string>& says) {
    KvCacheSpec spec = good;
    spoil(spec);
    expect_refused([&] { spec.check(); }, says);
    expect_refused([&] { spec.view(buffer, 1); }, says);
  };
  refused([](KvCacheSpec& s) { s.block_size = 0; }, {"block_size is 0", "1 or more"});
  refused([](KvCacheSpec& s) { s.block_size = std::int64_t{1} << 40; }, {"block_size is 1099511"});
  refused([](KvCacheSpec& s) { s.num_kv_heads = -1; }, {"num_kv_heads is -1"});
  refused([](KvCacheSpec& s) { s.head_size_qk = 190; }, {"head_size_qk is 190"});
  refused([](KvCacheSpec& s) { s.head_size_v = 0; }, {"head_size_v is 0"});
  refused([](KvCacheSpec& s) { s.dtype = DType::kU8; }, {"dtype is uint8", "fp8_e4m3"});
  refused([](KvCacheSpec& s) { s.layout = static_cast<KvCacheLayout>(5); }, {"layout is 5"});
  refused([](KvCacheSpec& s) { s.page_size_padded = 16 * 320 * 2 - 16; },
          {"page_size_padded is 10224", "from 10240"});
  refused([](KvCacheSpec& s) { s.page_size_padded = 16 * 320 * 2 + 8; },
          {"page_size_padded is 10248", "multiple of 16"});
  refused([](KvCacheSpec& s) { s.page_size_padded = -16; }, {"page_size_padded is -16"});
  refused([](KvCacheSpec& s) { s.block_size = s.num_kv_heads = std::numeric_limits<int>::max(); },
          {"2147483647 tokens of 2147483647 KV heads", "overflows"});
  expect_refused([&] { good.view(buffer, -2); }, {"num_blocks -2"});
  expect_refused([&] { good.view(buffer, std::int64_t{1} << 50); },
                 {"kv_cache has shape [1125899906842624, 16, 1, 320]", "overflow"});
  expect_refused([&] { good.view(nullptr, 1); }, {"no data"});
}

}  // namespace
}  // namespace diffkv
