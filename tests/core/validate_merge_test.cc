// Every rule about merge_attn_states and fill_zero.
#include <gtest/gtest.h>

#include <cstdint>

#include "calls.h"

namespace diffkv::test {
namespace {

using Row = Refusal<MergeCall>;

class MergeRefuses : public testing::TestWithParam<Row> {};

TEST_P(MergeRefuses, ChangingNothing) {
  MergeCall call;
  GetParam().spoil(call);
  expect_refused(call.memory, call.backend, GetParam().code, GetParam().says,
                 [&] { call.merge(); });
}

const std::vector<Row> kRows = {
    {"NoPartA", [](MergeCall& c) { c.a.output = {}; }, {"a.output is not given"}},
    {"NoPartB", [](MergeCall& c) { c.b.output = {}; }, {"b.output is not given"}},
    {"NoLseA", [](MergeCall& c) { c.a.lse = {}; }, {"a.lse is not given"}},
    {"NoLseB", [](MergeCall& c) { c.b.lse = {}; }, {"b.lse is not given"}},
    {"NoOutput", [](MergeCall& c) { c.output = {}; }, {"output is not given"}},
    {"HeadSize",
     [](MergeCall& c) { c.a.output.shape[2] = 12; },
     {"head_size_v of a.output is 12", "multiple of 8"}},
    {"Fp8Part",
     [](MergeCall& c) { c.a.output.dtype = DType::kE4M3; },
     {"a.output is fp8_e4m3", "fp32, fp16 or bf16"}},
    {"Fp8Output",
     [](MergeCall& c) { c.output.dtype = DType::kE4M3; },
     {"output is fp8_e4m3", "fp32, fp16 or bf16"}},
    {"InPlaceOfAnotherDtype",
     [](MergeCall& c) {
       c.a.output = c.output;
       c.a.output.dtype = DType::kF16;
     },
     {"output starts where a.output does", "the same view"}},
    {"InPlaceOfOtherStrides",
     [](MergeCall& c) {
       c.b.lse = c.lse;
       c.b.lse.strides[0] = 8;
     },
     {"lse starts where b.lse does", "the same view"}},
    {"InPlaceOfTheOtherPart",
     [](MergeCall& c) {
       c.b.output = c.output;
       c.b.output.strides[0] = 128;
     },
     {"output starts where b.output does", "the same view"}},
    {"LseInPlaceOfPartA",
     [](MergeCall& c) {
       c.a.lse = c.lse;
       c.a.lse.strides[0] = 8;
     },
     {"lse starts where a.lse does", "the same view"}},
    {"OtherTokens",
     [](MergeCall& c) { c.b.output.shape[0] = 4; },
     {"b.output has num_tokens 4", "a.output has 5"}},
    {"OtherHeads",
     [](MergeCall& c) { c.output.shape[1] = 3; },
     {"output has num_heads 3", "a.output has 4"}},
    {"OtherHeadSize",
     [](MergeCall& c) { c.output.shape[2] = 8; },
     {"output has head_size_v 8", "a.output has 16"}},
    {"LseShape",
     [](MergeCall& c) { c.b.lse.shape[0] = 5; },
     {"b.lse has num_heads 5", "a.output has 4"}},
    {"LseDtype", [](MergeCall& c) { c.a.lse.dtype = DType::kBF16; }, {"a.lse is bf16"}},
    {"LseOut",
     [](MergeCall& c) { c.lse.shape[1] = 6; },
     {"lse has num_tokens 6", "a.output has 5"}},
    {"LseStrided", [](MergeCall& c) { c.a.lse.strides[1] = 2; }, {"a.lse has stride 2"}},
    {"LseOutOverlaps", [](MergeCall& c) { c.lse.strides[0] = 0; }, {"lse has stride 0", "overlap"}},
    {"OutputOverlaps",
     [](MergeCall& c) { c.output.strides[1] = 8; },
     {"output has stride 8 in dimension 1", "overlap"}},
    {"Misaligned",
     [](MergeCall& c) { c.b.output = moved(c.b.output, 6); },
     {"b.output starts 6 bytes past a multiple of 16"}},
    {"Null", [](MergeCall& c) { c.output.data = nullptr; }, {"output has no data"}},
    {"SinksCount",
     [](MergeCall& c) { c.sinks.shape[0] = 1; },
     {"sinks has num_heads 1", "a.output has 4"}},
    {"SinksDtype", [](MergeCall& c) { c.sinks.dtype = DType::kI32; }, {"sinks is int32"}},
    {"Elsewhere",
     [](MergeCall& c) {
       c.b.lse.device = {DeviceType::kCuda, 0};
     },
     {"b.lse is on cuda:0", "a.output is on cpu"}},
    {"SinksElsewhere",
     [](MergeCall& c) {
       c.sinks.device = {DeviceType::kCuda, 0};
     },
     {"sinks is on cuda:0", "a.output is on cpu"}},
};

INSTANTIATE_TEST_SUITE_P(Merge, MergeRefuses, testing::ValuesIn(kRows),
                         [](const auto& row) { return std::string(row.param.name); });

TEST(FillZero, RefusesWhatIsNoOutput) {
  MergeCall call;
  const auto refused = [&](const TensorView& output, const std::vector<std::string>& says) {
    expect_refused(call.memory, call.backend, ErrorCode::kInvalidArgument, says,
                   [&] { fill_zero(call.backend, output); });
  };
  refused({}, {"output is not given"});
  refused(with_dtype(call.output, DType::kI32), {"output is int32"});
  refused(TensorView(call.output.data, DType::kBF16, {5, 64}), {"output has rank 2"});
  refused(with_stride(call.output, 2, 2), {"output has stride 2 in its last dimension"});
  refused(with_stride(call.output, 0, 32), {"output has stride 32 in dimension 0", "overlap"});
  refused(moved(call.output, 1), {"output starts 1 bytes past"});
}

}  // namespace
}  // namespace diffkv::test
