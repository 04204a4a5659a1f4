// Every rule about caches and what is written into them, through update_cache.
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>

#include "calls.h"

namespace diffkv::test {
namespace {

using Row = Refusal<UpdateCall>;

class UpdateCacheRefuses : public testing::TestWithParam<Row> {};

TEST_P(UpdateCacheRefuses, ChangingNothing) {
  UpdateCall call;
  GetParam().spoil(call);
  expect_refused(call.memory, call.backend, GetParam().code, GetParam().says,
                 [&] { call.update(); });
}

float kScales[8] = {1, 1, 1, 1, 1, 1, 1, 1};

const std::vector<Row> kCacheRows = {
    {"Default",
     [](UpdateCall& c) { c.cache = {}; },
     {"the cache has block_size 0", "expected 1 to"}},
    {"NegativeBlocks",
     [](UpdateCall& c) { c.cache.num_blocks = -1; },
     {"num_blocks -1", "expected 0 to 2147483647"}},
    {"BlocksBeyondInt32",
     [](UpdateCall& c) { c.cache.num_blocks = std::int64_t{1} << 31; },
     {"num_blocks 2147483648"}},
    {"NoKvHeads", [](UpdateCall& c) { c.cache.num_kv_heads = 0; }, {"num_kv_heads 0"}},
    {"HeadSizeQk",
     [](UpdateCall& c) { c.cache.head_size_qk = 20; },
     {"head_size_qk is 20", "multiple of 8"}},
    {"HeadSizeV", [](UpdateCall& c) { c.cache.head_size_v = 577; }, {"head_size_v is 577"}},
    {"RawBytes",
     [](UpdateCall& c) { c.cache.key.dtype = DType::kU8; },
     {"cache.key is uint8", "fp8_e4m3 or fp8_e5m2"}},
    {"IntegerValues",
     [](UpdateCall& c) { c.cache.value.dtype = DType::kI32; },
     {"cache.value is int32"}},
    {"NoKeys",
     [](UpdateCall& c) { c.cache.key.data = nullptr; },
     {"cache.key has no data", "[8, 16, 2, 24]"}},
    {"MisalignedKeys",
     [](UpdateCall& c) { c.cache.key.data = static_cast<char*>(c.cache.key.data) + 8; },
     {"cache.key starts 8 bytes past a multiple of 16", "rows of bf16"}},
    {"HeadStride",
     [](UpdateCall& c) { c.cache.value.stride_head = 44; },
     {"cache.value has stride 44 in dimension 2", "multiple of 8 elements (16 bytes)"}},
    {"TokenStride",
     [](UpdateCall& c) { c.cache.key.stride_token = 81; },
     {"cache.key has stride 81 in dimension 1"}},
    {"BlockStride",
     [](UpdateCall& c) { c.cache.key.stride_block = 16 * 80 + 4; },
     {"cache.key has stride 1284 in dimension 0"}},
    {"Fp8Alignment",
     [](UpdateCall& c) {
       c.cache.key.dtype = c.cache.value.dtype = DType::kE4M3;
       c.cache.value.stride_head = 36;
     },
     {"cache.value has stride 36 in dimension 2", "multiple of 8 elements (8 bytes)"}},
    {"StridesOverflow",
     [](UpdateCall& c) { c.cache.key.stride_block = std::int64_t{1} << 61; },
     {"cache.key has shape [8, 16, 2, 24]", "overflow int64"}},
    {"StrideLowest",
     [](UpdateCall& c) { c.cache.value.stride_block = std::numeric_limits<std::int64_t>::min(); },
     {"cache.value", "overflow int64"}},
    {"ReadOnly", [](UpdateCall& c) { c.cache.read_only = true; }, {"read_only"}},
    {"PagesOverlap",
     [](UpdateCall& c) { c.cache.key.stride_block = 16 * 40; },
     {"cache.key has stride 640 in dimension 0", "overlap"}},
    {"HeadsOverlap",
     [](UpdateCall& c) { c.cache.value.stride_head = 0; },
     {"cache.value has stride 0 in dimension 2", "overlap"}},
    {"DenseWithPages",
     [](UpdateCall& c) { c.cache.dense = true; },
     {"dense cache has num_blocks 8", "expected 1"}},
    {"ScaleDtype",
     [](UpdateCall& c) { c.cache.k_scale = with_dtype(view_of(kScales, {1}), DType::kBF16); },
     {"k_scale is bf16", "expected fp32"}},
    {"ScaleCount",
     [](UpdateCall& c) { c.cache.v_scale = view_of(kScales, {3}); },
     {"v_scale has 3 elements", "1 or num_kv_heads 2"}},
    {"ScaleRank",
     [](UpdateCall& c) {
       c.cache.v_scale = view_of(kScales, {2, 1});
     },
     {"v_scale has rank 2"}},
    {"ScaleNull",
     [](UpdateCall& c) { c.cache.k_scale = ConstTensorView(nullptr, DType::kF32, {2}); },
     {"k_scale has no data"}},
    {"ScaleOfWideRows",
     [](UpdateCall& c) { c.cache.v_scale = view_of(kScales, {2}); },
     {"v_scale is given", "stored as bf16", "fp8 only"}},
    {"ScaleElsewhere",
     [](UpdateCall& c) { c.cache.k_scale = with_device(view_of(kScales, {1}), DeviceType::kCuda); },
     {"k_scale is on cuda:0", "the cache is on cpu"}},
};

const std::vector<Row> kInputRows = {
    {"NoKey", [](UpdateCall& c) { c.key = {}; }, {"key is not given", "[num_tokens"}},
    {"KeyRank",
     [](UpdateCall& c) {
       c.key = ConstTensorView(c.key.data, DType::kBF16, {4, 48});
     },
     {"key has rank 2", "expected 3"}},
    {"FewKeys",
     [](UpdateCall& c) { c.key.shape[0] = 3; },
     {"key has num_tokens 3", "slot_mapping has 4"}},
    {"FewValues",
     [](UpdateCall& c) { c.value.shape[0] = 0; },
     {"value has num_tokens 0", "slot_mapping has 4"}},
    {"KeyHeads",
     [](UpdateCall& c) { c.key.shape[1] = 1; },
     {"key has num_kv_heads 1", "the cache has 2"}},
    {"KeyHeadSize",
     [](UpdateCall& c) { c.key.shape[2] = 16; },
     {"key has head_size_qk 16", "the cache has 24"}},
    {"ValueHeadSize",
     [](UpdateCall& c) { c.value.shape[2] = 24; },
     {"value has head_size_v 24", "the cache has 16"}},
    {"IntegerKey", [](UpdateCall& c) { c.key.dtype = DType::kI32; }, {"key is int32", "expected"}},
    {"RawByteKey", [](UpdateCall& c) { c.key.dtype = DType::kU8; }, {"key is uint8"}},
    {"Fp8KeyIntoBf16",
     [](UpdateCall& c) { c.key.dtype = DType::kE4M3; },
     {"key is fp8_e4m3", "the cache's own bf16"}},
    {"OtherFp8Value",
     [](UpdateCall& c) {
       c.cache.value.dtype = DType::kE4M3;
       c.value.dtype = DType::kE5M2;
     },
     {"value is fp8_e5m2", "the cache's own fp8_e4m3"}},
    {"KeyNotContiguous",
     [](UpdateCall& c) { c.key.strides[2] = 2; },
     {"key has stride 2 in its last dimension"}},
    {"KeyTokenStride",
     [](UpdateCall& c) { c.key.strides[0] = 50; },
     {"key has stride 50 in dimension 0", "multiple of 8"}},
    {"ValueMisaligned",
     [](UpdateCall& c) { c.value = moved(c.value, 2); },
     {"value starts 2 bytes past a multiple of 16"}},
    {"ValueElsewhere",
     [](UpdateCall& c) {
       c.value.device = {DeviceType::kCuda, 0};
     },
     {"value is on cuda:0", "the cache is on cpu"}},
    {"NoSlots", [](UpdateCall& c) { c.slot_mapping = {}; }, {"slot_mapping is not given"}},
    {"SlotsInt32",
     [](UpdateCall& c) { c.slot_mapping.dtype = DType::kI32; },
     {"slot_mapping is int32", "expected int64"}},
    {"SlotsStrided",
     [](UpdateCall& c) { c.slot_mapping = with_stride(with_shape(c.slot_mapping, 0, 2), 0, 2); },
     {"slot_mapping has stride 2"}},
    {"SlotsElsewhere",
     [](UpdateCall& c) {
       c.slot_mapping.device = {DeviceType::kCuda, 0};
     },
     {"slot_mapping is on cuda:0"}},
    {"SlotPastCapacity",
     [](UpdateCall& c) { c.slots[3] = 128; },
     {"slot_mapping[3] is 128", "num_blocks 8 x block_size 16 = 128"}},
    {"SlotHuge",
     [](UpdateCall& c) { c.slots[0] = std::numeric_limits<std::int64_t>::max(); },
     {"slot_mapping[0] is 9223372036854775807"}},
};

const auto kName = [](const testing::TestParamInfo<Row>& info) {
  return std::string(info.param.name);
};
INSTANTIATE_TEST_SUITE_P(Cache, UpdateCacheRefuses, testing::ValuesIn(kCacheRows), kName);
INSTANTIATE_TEST_SUITE_P(Input, UpdateCacheRefuses, testing::ValuesIn(kInputRows), kName);

}  // namespace
}  // namespace diffkv::test
