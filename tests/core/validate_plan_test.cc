// Every rule about keys, maxima, batches and workspaces, through make_plan.
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>

#include "calls.h"

namespace diffkv::test {
namespace {

using Row = Refusal<AttendCall>;

constexpr std::int32_t kMin32 = std::numeric_limits<std::int32_t>::min();
constexpr std::int32_t kMax32 = std::numeric_limits<std::int32_t>::max();

class MakePlanRefuses : public testing::TestWithParam<Row> {};

TEST_P(MakePlanRefuses, ChangingNothing) {
  AttendCall call;
  call.replan();
  GetParam().spoil(call);
  expect_refused(call.memory, call.backend, GetParam().code, GetParam().says,
                 [&] { call.make_plan_now(); });
}

const std::vector<Row> kKeyRows = {
    {"NoHeads", [](AttendCall& c) { c.key.num_heads = 0; }, {"num_heads is 0", "expected 1 to"}},
    {"NegativeKvHeads",
     [](AttendCall& c) { c.key.num_kv_heads = -2; },
     {"num_kv_heads is -2", "expected 1 to"}},
    {"HugeHeads",
     [](AttendCall& c) { c.key.num_heads = std::int64_t{1} << 40; },
     {"num_heads is 1099511627776"}},
    {"UnevenGroups",
     [](AttendCall& c) { c.key.num_kv_heads = 3; },
     {"num_heads is 4", "a multiple of num_kv_heads 3"}},
    {"MoreKvHeadsThanHeads",
     [](AttendCall& c) { c.key.num_kv_heads = 8; },
     {"num_heads is 4", "a multiple of num_kv_heads 8"}},
    {"HeadSizeNotMultipleOf8",
     [](AttendCall& c) { c.key.head_size_qk = 100; },
     {"head_size_qk is 100", "multiple of 8 from 8 to 576"}},
    {"HeadSizeTooLarge",
     [](AttendCall& c) { c.key.head_size_v = 584; },
     {"head_size_v is 584", "8 to 576"}},
    {"HeadSizeZero", [](AttendCall& c) { c.key.head_size_v = 0; }, {"head_size_v is 0"}},
    {"HeadSizeNegative", [](AttendCall& c) { c.key.head_size_qk = -8; }, {"head_size_qk is -8"}},
    {"IntegerQueries",
     [](AttendCall& c) { c.key.query_dtype = DType::kI32; },
     {"query_dtype is int32", "fp32, fp16, bf16 or fp8_e4m3"}},
    {"E5m2Queries",
     [](AttendCall& c) { c.key.query_dtype = DType::kE5M2; },
     {"query_dtype is fp8_e5m2"}},
    {"RawByteKeys",
     [](AttendCall& c) { c.key.key_dtype = DType::kU8; },
     {"key_dtype is uint8", "fp32, fp16, bf16, fp8_e4m3 or fp8_e5m2"}},
    {"BoolValues",
     [](AttendCall& c) { c.key.value_dtype = DType::kBool; },
     {"value_dtype is bool"}},
    {"DtypeOutsideTheEnum",
     [](AttendCall& c) { c.key.value_dtype = static_cast<DType>(77); },
     {"value_dtype is an unknown dtype"}},
    {"ChunkWithPrefixWindow",
     [](AttendCall& c) { c.key.mask.chunk_size = 16, c.key.mask.prefix_window = 8; },
     {"chunk_size 16", "prefix_window 8", "at most one"}},
    {"NegativeLookback",
     [](AttendCall& c) { c.key.mask.chunk_size = 16, c.key.mask.chunk_lookback = -1; },
     {"chunk_lookback -1", "0 or more"}},
    {"ClampWithoutRanges",
     [](AttendCall& c) { c.key.mask.clamp_mm_ranges = true; },
     {"clamp_mm_ranges", "expected mm_ranges"}},
    {"UnknownPolicy",
     [](AttendCall& c) { c.key.policy = static_cast<SchedulePolicy>(9); },
     {"policy is 9"}},
};

const std::vector<Row> kMaximaRows = {
    {"NegativeTokens",
     [](AttendCall& c) { c.maxima.max_tokens = -1; },
     {"max_tokens is -1", "expected 0 to"}},
    {"RowsBeyondInt32",
     [](AttendCall& c) { c.maxima.max_tokens = std::int64_t{1} << 29; },
     {"max_tokens is 536870912", "0 to 536870911"}},
    {"NegativeSeqs", [](AttendCall& c) { c.maxima.max_seqs = -3; }, {"max_seqs is -3"}},
    {"SeqsBeyondInt32",
     [](AttendCall& c) { c.maxima.max_seqs = kMax32; },
     {"max_seqs is 2147483647", "0 to 2147483646"}},
    {"SeqLenBeyondLimit",
     [](AttendCall& c) { c.maxima.max_seq_len = (1 << 30) + 1; },
     {"max_seq_len is 1073741825", "0 to 1073741824"}},
    {"NegativeRanges", [](AttendCall& c) { c.maxima.max_mm_ranges = -1; }, {"max_mm_ranges is -1"}},
    {"SequencesExceeded",
     [](AttendCall& c) { c.maxima.max_seqs = 2; },
     {"num_seqs is 3", "max_seqs 2"}},
    {"ActualTokensExceeded",
     [](AttendCall& c) { c.args.batch.num_actual_tokens = 7; },
     {"num_actual_tokens is 7", "max_tokens 6"}},
    {"QueryRowsExceeded",
     [](AttendCall& c) { c.query_start_loc[3] = 7; },
     {"query_start_loc[3] is 7", "max_tokens 6"}},
    {"SeqLenExceeded",
     [](AttendCall& c) { c.seq_lens[2] = 65; },
     {"seq_lens[2] is 65", "max_seq_len 64"}},
};

const std::vector<Row> kBatchRows = {
    {"NegativeNumSeqs",
     [](AttendCall& c) { c.args.batch.num_seqs = -1; },
     {"num_seqs is -1", "expected 0 to"}},
    {"AbsurdNumSeqs",
     [](AttendCall& c) { c.args.batch.num_seqs = std::numeric_limits<std::int64_t>::max(); },
     {"num_seqs is 9223372036854775807"}},
    {"NegativeActualTokens",
     [](AttendCall& c) { c.args.batch.num_actual_tokens = -5; },
     {"num_actual_tokens is -5"}},
    {"NegativeMaxQueryLen",
     [](AttendCall& c) { c.args.batch.max_query_len = -1; },
     {"max_query_len is -1", "expected 0 (not known) to"}},
    {"AbsurdMaxQueryLen",
     [](AttendCall& c) { c.args.batch.max_query_len = std::int64_t{1} << 31; },
     {"max_query_len is 2147483648"}},
    {"QueryBeyondMaxQueryLen",
     [](AttendCall& c) { c.args.batch.max_query_len = 1; },
     {"query_start_loc[1] - query_start_loc[0] is 2", "max_query_len 1"}},
    {"NoQueryStartLoc",
     [](AttendCall& c) { c.args.batch.query_start_loc = {}; },
     {"query_start_loc is not given"}},
    {"QueryStartLocTooShort",
     [](AttendCall& c) { c.args.batch.query_start_loc.shape[0] = 3; },
     {"query_start_loc has entries 3", "num_seqs + 1 = 4"}},
    {"QueryStartLocInt64",
     [](AttendCall& c) { c.args.batch.query_start_loc.dtype = DType::kI64; },
     {"query_start_loc is int64", "expected int32"}},
    {"QueryStartLocStrided",
     [](AttendCall& c) { c.args.batch.query_start_loc.strides[0] = 2; },
     {"query_start_loc has stride 2", "expected 1"}},
    {"QueryStartLocNull",
     [](AttendCall& c) { c.args.batch.query_start_loc.data = nullptr; },
     {"query_start_loc has no data", "[4]"}},
    {"QueryStartLocMisaligned",
     [](AttendCall& c) { c.args.batch.query_start_loc = moved(c.args.batch.query_start_loc, 2); },
     {"query_start_loc starts 2 bytes past a multiple of 4"}},
    {"QueryStartLocFirst",
     [](AttendCall& c) { c.query_start_loc[0] = 1; },
     {"query_start_loc[0] is 1", "expected 0"}},
    {"QueryStartLocFalls",
     [](AttendCall& c) { c.query_start_loc[2] = 1; },
     {"query_start_loc[2] is 1", "query_start_loc[1] = 2 or more"}},
    {"QueryStartLocFallsAtTheEnd",
     [](AttendCall& c) { c.query_start_loc[3] = kMin32; },
     {"query_start_loc[3] is -2147483648"}},
    {"NoSeqLens",
     [](AttendCall& c) { c.args.batch.seq_lens = {}; },
     {"seq_lens is not given", "[num_seqs]"}},
    {"SeqLensRank",
     [](AttendCall& c) {
       c.args.batch.seq_lens = view_of(c.seq_lens, {3, 1});
     },
     {"seq_lens has rank 2", "expected 1"}},
    {"SeqLensSize",
     [](AttendCall& c) { c.args.batch.seq_lens.shape[0] = 4; },
     {"seq_lens has num_seqs 4", "the batch has 3"}},
    {"NegativeExtent",
     [](AttendCall& c) { c.args.batch.seq_lens.shape[0] = -3; },
     {"seq_lens has num_seqs -3", "0 or more"}},
    {"NegativeSeqLen",
     [](AttendCall& c) { c.seq_lens[1] = -1; },
     {"seq_lens[1] is -1", "0 or more"}},
    {"OneTensorElsewhere",
     [](AttendCall& c) {
       c.args.batch.seq_lens.device = {DeviceType::kCuda, 1};
     },
     {"seq_lens is on cuda:1", "query_start_loc is on cpu", "one device"}},
    {"BlockTableRank",
     [](AttendCall& c) { c.args.batch.block_table = view_of(c.block_table, {12}); },
     {"block_table has rank 1", "[num_seqs, max_blocks]"}},
    {"BlockTableRows",
     [](AttendCall& c) {
       c.args.batch.block_table = view_of(c.block_table, {4, 3});
     },
     {"block_table has num_seqs 4", "the batch has 3"}},
    {"BlockTableTransposed",
     [](AttendCall& c) {
       c.args.batch.block_table.strides = {1, 3};
     },
     {"block_table has stride 3 in its last dimension"}},
    {"KvStartSize",
     [](AttendCall& c) { c.args.batch.kv_start = view_of(c.seq_lens, {2}); },
     {"kv_start has num_seqs 2", "the batch has 3"}},
    {"KvStartDtype",
     [](AttendCall& c) {
       c.args.batch.kv_start = with_dtype(view_of(c.seq_lens, {3}), DType::kF32);
     },
     {"kv_start is fp32", "expected int32"}},
};

// Optional tensors are there exactly where the key says so.
std::int32_t kZeros[12] = {};
const std::vector<Row> kOptionalRows = {
    {"CausalPerSeqMissing",
     [](AttendCall& c) { c.key.causal_per_seq = true; },
     {"causal_per_seq is not given"}},
    {"CausalPerSeqUnexpected",
     [](AttendCall& c) {
       c.args.batch.causal_per_seq = ConstTensorView(kZeros, DType::kBool, {3});
     },
     {"causal_per_seq is given"}},
    {"CausalPerSeqDtype",
     [](AttendCall& c) {
       c.key.causal_per_seq = true;
       c.args.batch.causal_per_seq = view_of(kZeros, {3});
     },
     {"causal_per_seq is int32", "expected bool"}},
    {"CausalPerSeqSize",
     [](AttendCall& c) {
       c.key.causal_per_seq = true;
       c.args.batch.causal_per_seq = ConstTensorView(kZeros, DType::kBool, {2});
     },
     {"causal_per_seq has num_seqs 2", "the batch has 3"}},
    {"PrefixLensMissing",
     [](AttendCall& c) { c.key.mask.prefix_window = 4; },
     {"prefix_lens is not given", "prefix_window"}},
    {"PrefixLensUnexpected",
     [](AttendCall& c) { c.args.batch.prefix_lens = view_of(kZeros, {3}); },
     {"prefix_lens is given", "prefix_window"}},
    {"PrefixLensSize",
     [](AttendCall& c) {
       c.key.mask.prefix_window = 4;
       c.args.batch.prefix_lens = view_of(kZeros, {1});
     },
     {"prefix_lens has num_seqs 1"}},
    {"RangesMissing", [](AttendCall& c) { c.key.mm_ranges = true; }, {"mm_ranges is not given"}},
    {"RangesUnexpected",
     [](AttendCall& c) {
       c.args.batch.mm_ranges = view_of(kZeros, {3, 1, 2});
     },
     {"mm_ranges is given"}},
    {"RangesLastDimension",
     [](AttendCall& c) {
       c.key.mm_ranges = true;
       c.args.batch.mm_ranges = view_of(kZeros, {3, 1, 3});
     },
     {"mm_ranges has bounds 3", "expected 2"}},
    {"RangesNotContiguous",
     [](AttendCall& c) {
       c.key.mm_ranges = true;
       c.args.batch.mm_ranges = with_stride(view_of(kZeros, {3, 2, 2}), 1, 4);
     },
     {"mm_ranges has stride 4 in dimension 1", "expected 2"}},
    {"RangesExceedMaxima",
     [](AttendCall& c) {
       c.key.mm_ranges = true;
       c.args.batch.mm_ranges =
           ConstTensorView(c.memory.take(3 * 3 * 2 * 4, 0), DType::kI32, {3, 3, 2});
     },
     {"mm_ranges has max_ranges 3", "max_mm_ranges 2"}},
    {"RangesOverlap",
     [](AttendCall& c) {
       c.key.mm_ranges = true;
       c.args.batch.mm_ranges = view_of(
           c.memory.take_values<std::int32_t>({0, 3, 9, 4, 1, 2, 3, 4, 5, 9, 2, 5}), {3, 2, 2});
     },
     {"mm_ranges[2]", "[2, 5]", "[5, 9]", "do not overlap"}},
};

const std::vector<Row> kWorkspaceRows = {
    {"WorkspaceTooSmall",
     [](AttendCall& c) { --c.workspace.shape[0]; },
     {"workspace has bytes", "the plan needs"}},
    {"WorkspaceNotGiven",
     [](AttendCall& c) { c.workspace = TensorView(nullptr, DType::kU8, {c.workspace.shape[0]}); },
     {"workspace has no data"}},
    {"WorkspaceDtype",
     [](AttendCall& c) { c.workspace.dtype = DType::kF32; },
     {"workspace is fp32", "expected uint8"}},
    {"WorkspaceMisaligned",
     [](AttendCall& c) { c.workspace = moved(c.workspace, 32); },
     {"workspace starts 32 bytes past a multiple of 64"}},
    {"WorkspaceStrided",
     [](AttendCall& c) { c.workspace.strides[0] = 0; },
     {"workspace has stride 0"}},
    {"WorkspaceElsewhere",
     [](AttendCall& c) {
       c.workspace.device = {DeviceType::kCuda, 0};
     },
     {"workspace is on cuda:0", "the batch is on cpu"}},
};

const auto kName = [](const testing::TestParamInfo<Row>& info) {
  return std::string(info.param.name);
};
INSTANTIATE_TEST_SUITE_P(Key, MakePlanRefuses, testing::ValuesIn(kKeyRows), kName);
INSTANTIATE_TEST_SUITE_P(Maxima, MakePlanRefuses, testing::ValuesIn(kMaximaRows), kName);
INSTANTIATE_TEST_SUITE_P(Batch, MakePlanRefuses, testing::ValuesIn(kBatchRows), kName);
INSTANTIATE_TEST_SUITE_P(Optional, MakePlanRefuses, testing::ValuesIn(kOptionalRows), kName);
INSTANTIATE_TEST_SUITE_P(Workspace, MakePlanRefuses, testing::ValuesIn(kWorkspaceRows), kName);

TEST(WorkspaceBytes, RefusesWhatMakePlanRefuses) {
  AttendCall call;
  call.key.head_size_v = 12;
  expect_refused(call.memory, call.backend, ErrorCode::kInvalidArgument, {"head_size_v is 12"},
                 [&] { workspace_bytes(call.backend, call.key, call.maxima); });
  call.key.head_size_v = 16;
  call.maxima.max_seqs = -1;
  expect_refused(call.memory, call.backend, ErrorCode::kInvalidArgument, {"max_seqs is -1"},
                 [&] { workspace_bytes(call.backend, call.key, call.maxima); });
}

}  // namespace
}  // namespace diffkv::test
