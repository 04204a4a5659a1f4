// Every rule about a call of attend.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>

#include "calls.h"

namespace diffkv::test {
namespace {

using Row = Refusal<AttendCall>;

class AttendRefuses : public testing::TestWithParam<Row> {};

TEST_P(AttendRefuses, ChangingNothing) {
  AttendCall call;
  call.replan();
  GetParam().spoil(call);
  expect_refused(call.memory, call.backend, GetParam().code, GetParam().says,
                 [&] { call.attend(); });
}

float kFloats[64] = {1};
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

TensorView lse_as(const AttendCall& c, std::initializer_list<std::int64_t> shape) {
  return {c.args.lse.data, DType::kF32, shape};
}

// The call's cache as dense keys and values of so many tokens.
void make_dense(AttendCall& c, std::int64_t tokens) {
  const KvCacheView paged = c.args.cache;
  c.args.cache =
      KvCacheView::dense_tokens(ConstTensorView(paged.key.data, DType::kBF16, {tokens, 2, 24}),
                                ConstTensorView(paged.key.data, DType::kBF16, {tokens, 2, 16}));
}

// A plan of e4m3 queries: its calls need q_scale and give bf16.
void make_e4m3(AttendCall& c) {
  c.key.query_dtype = DType::kE4M3;
  c.args.query.dtype = DType::kE4M3;
  c.params.q_scale = view_of(kFloats, {1});
  c.replan();
}

const std::vector<Row> kPlanRows = {
    {"EmptyPlan", [](AttendCall& c) { c.plan = Plan(); }, {"the plan is empty", "make_plan"}},
    {"OtherHeads",
     [](AttendCall& c) {
       c.key.num_heads = 2;
       c.replan();
     },
     {"query has num_heads 4", "the layer was built for 2"}},
    {"OtherHeadSize",
     [](AttendCall& c) {
       c.key.head_size_qk = 32;
       c.replan();
     },
     {"query has head_size_qk 24", "the layer was built for 32"}},
    {"OtherKvHeads",
     [](AttendCall& c) {
       c.key.num_kv_heads = 4;
       c.replan();
     },
     {"the cache has num_kv_heads 2", "the layer was built for 4"}},
    {"OtherHeadSizeV",
     [](AttendCall& c) {
       c.key.head_size_v = 8;
       c.replan();
     },
     {"output has head_size_v 16", "the layer was built for 8"}},
    {"OtherQueryDtype",
     [](AttendCall& c) {
       c.key.query_dtype = c.args.output.dtype = DType::kF16;
       c.replan();
     },
     {"query is bf16", "the layer was built for fp16"}},
    {"OtherKeyDtype",
     [](AttendCall& c) {
       c.key.key_dtype = DType::kF16;
       c.replan();
     },
     {"the cache has keys of bf16", "the layer was built for fp16"}},
    {"OtherValueDtype",
     [](AttendCall& c) {
       c.key.value_dtype = DType::kE5M2;
       c.replan();
     },
     {"the cache has values of bf16", "the layer was built for fp8_e5m2"}},
    {"OtherSeqLen",
     [](AttendCall& c) { c.seq_lens[2] = 39; },
     {"other sequence lengths", "seq_lens[2] is 39", "the plan has 40"}},
    {"OtherQueryLens",
     [](AttendCall& c) { c.query_start_loc[1] = 1; },
     {"other query lengths", "query_start_loc[1] is 1", "the plan has 2"}},
    {"OtherNumSeqs",
     [](AttendCall& c) {
       c.args.batch.num_seqs = 2;
       c.args.batch.query_start_loc.shape[0] = 3;
       c.args.batch.seq_lens.shape[0] = 2;
       c.args.batch.block_table.shape[0] = 2;
     },
     {"the batch has num_seqs 2", "the plan was made for 3"}},
    {"OtherActualTokens",
     [](AttendCall& c) { c.args.batch.num_actual_tokens = 4; },
     {"the batch has num_actual_tokens 4", "the plan was made for 5"}},
    {"OtherMaxQueryLen",
     [](AttendCall& c) { c.args.batch.max_query_len = 3; },
     {"the batch has max_query_len 3", "the plan was made for 0"}},
    {"BatchOfAnotherMask",
     [](AttendCall& c) { c.args.batch.prefix_lens = view_of(c.seq_lens, {3}); },
     {"prefix_lens is given"}},
    {"NegativeLength", [](AttendCall& c) { c.seq_lens[0] = -1; }, {"seq_lens[0] is -1"}},
    {"FallingQueries",
     [](AttendCall& c) { c.query_start_loc[2] = 1; },
     {"query_start_loc[2] is 1", "2 or more"}},
};

const std::vector<Row> kTensorRows = {
    {"NoQuery",
     [](AttendCall& c) { c.args.query = {}; },
     {"query is not given", "[num_tokens, num_heads, head_size_qk]"}},
    {"QueryRank",
     [](AttendCall& c) {
       c.args.query = ConstTensorView(c.args.query.data, DType::kBF16, {6, 96});
     },
     {"query has rank 2", "expected 3"}},
    {"QueryHeadSize",
     [](AttendCall& c) { c.args.query.shape[2] = 16; },
     {"query has head_size_qk 16, the layer was built for 24"}},
    {"QueryHeads",
     [](AttendCall& c) { c.args.query.shape[1] = 3; },
     {"query has num_heads 3, the layer was built for 4"}},
    {"QueryDtype", [](AttendCall& c) { c.args.query.dtype = DType::kI64; }, {"query is int64"}},
    {"FewQueries",
     [](AttendCall& c) { c.args.query.shape[0] = c.args.output.shape[0] = 4; },
     {"query has num_tokens 4", "num_actual_tokens 5"}},
    {"QueryShorterThanItsBatch",
     [](AttendCall& c) {
       c.args.batch.num_actual_tokens = 3;
       c.replan();
       c.args.query.shape[0] = c.args.output.shape[0] = c.args.lse.shape[1] = 4;
     },
     {"query_start_loc[3] is 5", "query has num_tokens 4"}},
    {"QueryNull",
     [](AttendCall& c) { c.args.query.data = nullptr; },
     {"query has no data", "[6, 4, 24]"}},
    {"QueryMisaligned",
     [](AttendCall& c) { c.args.query = moved(c.args.query, 8); },
     {"query starts 8 bytes past a multiple of 16"}},
    {"QueryHeadStride",
     [](AttendCall& c) { c.args.query.strides[1] = 20; },
     {"query has stride 20 in dimension 1", "multiple of 8"}},
    {"QueryNotContiguous",
     [](AttendCall& c) { c.args.query.strides[2] = -1; },
     {"query has stride -1 in its last dimension"}},
    {"QueryAbsurd",
     [](AttendCall& c) {
       c.args.query.shape[0] = std::int64_t{1} << 60;
       c.args.query.strides[0] = 0;
     },
     {"query has shape [1152921504606846976, 4, 24]", "overflow"}},
    {"NoOutput", [](AttendCall& c) { c.args.output = {}; }, {"output is not given"}},
    {"OutputHeadSize",
     [](AttendCall& c) { c.args.output.shape[2] = 24; },
     {"output has head_size_v 24, the layer was built for 16"}},
    {"OutputTokens",
     [](AttendCall& c) { c.args.output.shape[0] = 5; },
     {"output has num_tokens 5, query has 6"}},
    {"OutputMisaligned",
     [](AttendCall& c) { c.args.output = moved(c.args.output, 4); },
     {"output starts 4 bytes past"}},
    {"OutputHeadStride",
     [](AttendCall& c) { c.args.output.strides[1] = 17; },
     {"output has stride 17 in dimension 1"}},
    {"OutputOverlaps",
     [](AttendCall& c) { c.args.output.strides[0] = 48; },
     {"output has stride 48 in dimension 0", "expected 64 or more", "overlap"}},
    {"LseRank",
     [](AttendCall& c) { c.args.lse = lse_as(c, {24}); },
     {"lse has rank 1", "[num_heads, num_tokens]"}},
    {"LseTransposed",
     [](AttendCall& c) {
       c.args.lse = lse_as(c, {6, 4});
     },
     {"lse has num_heads 6, the layer was built for 4"}},
    {"LseDtype",
     [](AttendCall& c) { c.args.lse.dtype = DType::kF16; },
     {"lse is fp16", "expected fp32"}},
    {"LseTokens",
     [](AttendCall& c) { c.args.lse.shape[1] = 5; },
     {"lse has num_tokens 5, query has 6"}},
    {"LseStrided",
     [](AttendCall& c) {
       c.args.lse.strides = {1, 4};
     },
     {"lse has stride 4 in its last dimension"}},
    {"LseOverlaps",
     [](AttendCall& c) { c.args.lse.strides[0] = 0; },
     {"lse has stride 0 in dimension 0", "overlap"}},
    {"OutputElsewhere",
     [](AttendCall& c) {
       c.args.output.device = {DeviceType::kCuda, 0};
     },
     {"output is on cuda:0", "query is on cpu"}},
    {"CacheElsewhere",
     [](AttendCall& c) {
       c.args.cache.device = {DeviceType::kCuda, 0};
     },
     {"the cache is on cuda:0", "runs on cpu"}},
    {"LseElsewhere",
     [](AttendCall& c) {
       c.args.lse.device = {DeviceType::kCuda, 3};
     },
     {"lse is on cuda:3"}},
    {"SinksElsewhere",
     [](AttendCall& c) { c.params.sinks = with_device(view_of(kFloats, {4}), DeviceType::kCuda); },
     {"sinks is on cuda:0", "query is on cpu"}},
    {"BatchElsewhere",
     [](AttendCall& c) {
       for (ConstTensorView* view :
            {&c.args.batch.query_start_loc, &c.args.batch.seq_lens, &c.args.batch.block_table}) {
         view->device = {DeviceType::kCuda, 0};
       }
     },
     {"query_start_loc is on cuda:0", "query is on cpu"}},
};

const std::vector<Row> kCacheRows = {
    {"HeadSizeQk",
     [](AttendCall& c) { c.args.cache.head_size_qk = 16; },
     {"the cache has head_size_qk 16, the layer was built for 24"}},
    {"HeadSizeV",
     [](AttendCall& c) { c.args.cache.head_size_v = 8; },
     {"the cache has head_size_v 8, the layer was built for 16"}},
    {"BlockIdPastPool",
     [](AttendCall& c) { c.block_table[1] = 8; },
     {"block_table[0][1] is 8", "below num_blocks 8"}},
    {"BlockIdNegative", [](AttendCall& c) { c.block_table[10] = -1; }, {"block_table[2][2] is -1"}},
    {"BlockIdHuge",
     [](AttendCall& c) { c.block_table[8] = std::numeric_limits<std::int32_t>::max(); },
     {"block_table[2][0] is 2147483647"}},
    {"EmptyPool",
     [](AttendCall& c) { c.args.cache.num_blocks = 0; },
     {"block_table[0][0] is 3", "num_blocks 0"}},
    {"TableTooNarrow",
     [](AttendCall& c) { c.args.batch.block_table.shape[1] = 2; },
     {"seq_lens[2] is 40", "max_blocks 2 of 16 tokens"}},
    {"NoBlockTable",
     [](AttendCall& c) { c.args.batch.block_table = {}; },
     {"block_table is not given", "paged"}},
    {"MisalignedCache",
     [](AttendCall& c) { c.args.cache.value.stride_token += 4; },
     {"cache.value has stride 84 in dimension 1"}},
    {"DenseWithoutStarts",
     [](AttendCall& c) { make_dense(c, 58); },
     {"kv_start is not given", "dense"}},
    {"DenseTooShort",
     [](AttendCall& c) {
       make_dense(c, 57);
       c.args.batch.kv_start = view_of(c.memory.take_values<std::int32_t>({0, 18, 18}), {3});
     },
     {"kv_start[2] is 18", "seq_lens[2] is 40", "57 tokens"}},
    {"DenseNegativeStart",
     [](AttendCall& c) {
       make_dense(c, 58);
       c.args.batch.kv_start = view_of(c.memory.take_values<std::int32_t>({-1, 0, 18}), {3});
     },
     {"kv_start[0] is -1"}},
    {"DenseStartOverflows",
     [](AttendCall& c) {
       make_dense(c, 58);
       c.args.batch.kv_start = view_of(c.memory.take_values<std::int32_t>({0, 0, 0x7fffffff}), {3});
     },
     {"kv_start[2] is 2147483647"}},
};

const std::vector<Row> kParamRows = {
    {"ScaleNan", [](AttendCall& c) { c.params.scale = kNan; }, {"scale is nan", "finite"}},
    {"ScaleInf", [](AttendCall& c) { c.params.scale = kInf; }, {"scale is inf"}},
    {"SoftCapNan", [](AttendCall& c) { c.params.soft_cap = kNan; }, {"soft_cap is nan", "finite"}},
    {"SoftCapInf", [](AttendCall& c) { c.params.soft_cap = kInf; }, {"soft_cap is inf"}},
    {"SlopesCount",
     [](AttendCall& c) { c.params.alibi_slopes = view_of(kFloats, {2}); },
     {"alibi_slopes has num_heads 2", "the layer was built for 4"}},
    {"SlopesDtype",
     [](AttendCall& c) { c.params.alibi_slopes = ConstTensorView(kFloats, DType::kBF16, {4}); },
     {"alibi_slopes is bf16", "expected fp32"}},
    {"SlopesStrided",
     [](AttendCall& c) { c.params.alibi_slopes = with_stride(view_of(kFloats, {4}), 0, 2); },
     {"alibi_slopes has stride 2"}},
    {"SqrtWithoutSlopes",
     [](AttendCall& c) { c.params.alibi_sqrt = true; },
     {"alibi_sqrt is set", "alibi_slopes is not given"}},
    {"BiasNotSquare",
     [](AttendCall& c) {
       c.params.qq_bias = view_of(kFloats, {4, 5});
     },
     {"qq_bias has columns 5", "as its rows 4"}},
    {"BiasRank",
     [](AttendCall& c) {
       c.params.qq_bias = view_of(kFloats, {1, 4, 4});
     },
     {"qq_bias has rank 3", "expected 2"}},
    {"BiasDtype",
     [](AttendCall& c) {
       c.params.qq_bias = ConstTensorView(kFloats, DType::kF16, {4, 4});
     },
     {"qq_bias is fp16", "fp32 or bf16"}},
    {"BiasTransposed",
     [](AttendCall& c) {
       c.params.qq_bias = with_stride(view_of(kFloats, {4, 4}), 1, 4);
     },
     {"qq_bias has stride 4 in its last dimension"}},
    {"SinksDtype",
     [](AttendCall& c) { c.params.sinks = ConstTensorView(kFloats, DType::kE4M3, {4}); },
     {"sinks is fp8_e4m3", "fp32, fp16 or bf16"}},
    {"SinksCount",
     [](AttendCall& c) { c.params.sinks = view_of(kFloats, {5}); },
     {"sinks has num_heads 5", "the layer was built for 4"}},
    {"SinksStrided",
     [](AttendCall& c) { c.params.sinks = with_stride(view_of(kFloats, {4}), 0, 2); },
     {"sinks has stride 2"}},
    {"SinkMode",
     [](AttendCall& c) { c.params.sink_mode = static_cast<SinkMode>(2); },
     {"sink_mode is 2"}},
    {"QScaleWithoutE4m3",
     [](AttendCall& c) { c.params.q_scale = view_of(kFloats, {1}); },
     {"q_scale is given", "queries are bf16", "fp8_e4m3 queries only"}},
    {"E4m3WithoutQScale",
     [](AttendCall& c) {
       make_e4m3(c);
       c.params.q_scale = {};
     },
     {"q_scale is not given", "queries are fp8_e4m3"}},
    {"QScaleCount",
     [](AttendCall& c) {
       make_e4m3(c);
       c.params.q_scale = view_of(kFloats, {2});
     },
     {"q_scale has elements 2", "expected 1"}},
    {"E4m3QueriesFp32Output",
     [](AttendCall& c) {
       make_e4m3(c);
       c.args.output.dtype = DType::kF32;
     },
     {"output of fp8_e4m3 queries is fp32", "fp16 or bf16"}},
    {"OutputDtype",
     [](AttendCall& c) { c.args.output.dtype = DType::kF16; },
     {"output is fp16", "expected bf16"}},
    {"E4m3OutputWithoutScale",
     [](AttendCall& c) { c.args.output.dtype = DType::kE4M3; },
     {"output is fp8_e4m3", "output_scale is not given"}},
    {"OutputScaleWithoutE4m3",
     [](AttendCall& c) { c.params.output_scale = view_of(kFloats, {1}); },
     {"output is bf16", "output_scale is given"}},
    {"OutputScaleCount",
     [](AttendCall& c) {
       c.args.output.dtype = DType::kE4M3;
       c.params.output_scale = view_of(kFloats, {4});
     },
     {"output_scale has elements 4", "expected 1"}},
    {"OutputBlockScale",
     [](AttendCall& c) { c.params.output_block_scale = view_of(kFloats, {1}); },
     {"output_block_scale is given", "expected none"},
     ErrorCode::kUnsupported},
    {"ParamsOnTwoDevices",
     [](AttendCall& c) {
       c.params.sinks = view_of(kFloats, {4});
       c.params.alibi_slopes = with_device(view_of(kFloats, {4}), DeviceType::kCuda);
     },
     {"sinks is on cpu", "alibi_slopes is on cuda:0"}},
};

const auto kName = [](const testing::TestParamInfo<Row>& info) {
  return std::string(info.param.name);
};
INSTANTIATE_TEST_SUITE_P(Plan, AttendRefuses, testing::ValuesIn(kPlanRows), kName);
INSTANTIATE_TEST_SUITE_P(Tensor, AttendRefuses, testing::ValuesIn(kTensorRows), kName);
INSTANTIATE_TEST_SUITE_P(Cache, AttendRefuses, testing::ValuesIn(kCacheRows), kName);
INSTANTIATE_TEST_SUITE_P(Params, AttendRefuses, testing::ValuesIn(kParamRows), kName);

}  // namespace
}  // namespace diffkv::test
