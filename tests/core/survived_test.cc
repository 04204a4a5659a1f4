// Inputs that look odd and are legal: padding, graph capture, empty steps, strides that mean
// nothing. Also what is only checked where the data is on the host.
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>

#include "calls.h"

namespace diffkv::test {
namespace {

constexpr std::int64_t kOdd = 12345677;

void expect_attended(AttendCall& call) {
  const int writes = call.backend.writes();
  EXPECT_NO_THROW(call.attend());
  EXPECT_GT(call.backend.writes(), writes);
}

void expect_updated(UpdateCall& call) {
  EXPECT_NO_THROW(call.update());
  EXPECT_EQ(call.backend.writes(), 1);
}

TEST(Survived, PlainCalls) {
  AttendCall attend;
  attend.replan();
  expect_attended(attend);
  UpdateCall update;
  expect_updated(update);
  MergeCall merge;
  EXPECT_NO_THROW(merge.merge());
  EXPECT_EQ(merge.backend.writes(), 1);
  merge.a.output.dtype = DType::kF16;
  merge.output.dtype = DType::kBF16;
  EXPECT_NO_THROW(merge.merge());
  merge.sinks = {};
  merge.lse = {};
  merge.output = {nullptr, DType::kBF16, {0, 4, 16}};
  merge.a.output = merge.b.output = merge.output;
  merge.a.lse = merge.b.lse = ConstTensorView(nullptr, DType::kF32, {4, 0});
  EXPECT_NO_THROW(merge.merge());
  EXPECT_NO_THROW(fill_zero(merge.backend, merge.output));
}

TEST(Survived, MergeInPlace) {
  MergeCall call;
  call.output = TensorView(const_cast<void*>(call.a.output.data), DType::kBF16, {5, 4, 16});
  call.lse = TensorView(const_cast<void*>(call.b.lse.data), DType::kF32, {4, 5});
  EXPECT_NO_THROW(call.merge());
}

TEST(Survived, SeqLenBelowQueryLen) {
  AttendCall call;
  call.seq_lens[0] = 1;
  call.seq_lens[2] = 0;
  call.replan();
  expect_attended(call);
}

TEST(Survived, QueriesBeyondTheActualTokensAndTheReverse) {
  AttendCall call;
  call.args.batch.num_actual_tokens = 3;
  call.replan();
  expect_attended(call);
  call.args.batch.num_actual_tokens = 6;
  call.replan();
  expect_attended(call);
}

TEST(Survived, NoSequences) {
  AttendCall call;
  call.args.batch.num_seqs = 0;
  call.args.batch.num_actual_tokens = 0;
  call.args.batch.query_start_loc = view_of(call.query_start_loc, {1});
  call.args.batch.seq_lens = ConstTensorView(nullptr, DType::kI32, {0});
  call.args.batch.block_table = ConstTensorView(nullptr, DType::kI32, {0, 0});
  call.replan();
  expect_attended(call);
  call.args.query = ConstTensorView(nullptr, DType::kBF16, {0, 4, 24});
  call.args.output = TensorView(nullptr, DType::kBF16, {0, 4, 16});
  call.args.lse = TensorView(nullptr, DType::kF32, {4, 0});
  expect_attended(call);
  call.args.lse = {};
  expect_attended(call);
}

TEST(Survived, NoPages) {
  AttendCall call;
  call.seq_lens[0] = call.seq_lens[2] = 0;
  call.args.cache.num_blocks = 0;
  call.args.cache.key.data = call.args.cache.value.data = nullptr;
  call.args.batch.block_table = ConstTensorView(nullptr, DType::kI32, {3, 0});
  call.replan();
  expect_attended(call);
}

TEST(Survived, BlocksNulledBelowAWindow) {
  AttendCall call;
  call.key.mask.window = 8;
  call.block_table[8] = 0;
  call.block_table[9] = 0;
  call.replan();
  expect_attended(call);
}

TEST(Survived, OddStridesOfDimensionsOfOne) {
  AttendCall call;
  call.key.num_heads = call.key.num_kv_heads = 1;
  call.args.batch.num_seqs = 1;
  call.args.batch.num_actual_tokens = 1;
  call.query_start_loc[1] = 1;
  call.args.batch.query_start_loc = view_of(call.query_start_loc, {2});
  call.args.batch.seq_lens = with_stride(view_of(call.seq_lens, {1}), 0, kOdd);
  call.args.batch.block_table = with_stride(view_of(call.block_table, {1, 2}), 0, kOdd);
  const auto odd = [](auto view) {
    view.strides[0] = view.strides[1] = kOdd;
    return view;
  };
  call.args.query = odd(ConstTensorView(call.args.query.data, DType::kBF16, {1, 1, 24}));
  call.args.output = odd(TensorView(call.args.output.data, DType::kBF16, {1, 1, 16}));
  call.args.lse = odd(TensorView(call.args.lse.data, DType::kF32, {1, 1}));
  call.args.cache.num_kv_heads = 1;
  call.args.cache.key.stride_head = kOdd;
  call.args.cache.value.stride_head = std::numeric_limits<std::int64_t>::min();
  call.replan();
  expect_attended(call);
}

TEST(Survived, OddStridesInUpdates) {
  UpdateCall call;
  call.slot_mapping = with_stride(with_shape(call.slot_mapping, 0, 1), 0, kOdd);
  call.key = with_stride(with_shape(call.key, 0, 1), 0, kOdd);
  call.value = with_stride(with_shape(call.value, 0, 1), 0, -kOdd);
  call.cache.num_blocks = 1;
  call.cache.key.stride_block = kOdd;
  expect_updated(call);
}

TEST(Survived, SlicesOfAFusedBuffer) {
  // Rows of a [token, q | k | v] buffer: the token stride spans all three.
  AttendCall call;
  const std::int64_t row = 4 * 24 + 2 * 24 + 2 * 16;
  call.args.query.data = call.memory.take(6 * row * 2, 0);
  call.args.query.strides[0] = row;
  call.replan();
  expect_attended(call);
}

TEST(Survived, EmptyUpdates) {
  UpdateCall call;
  call.slot_mapping = ConstTensorView(nullptr, DType::kI64, {0});
  call.key = ConstTensorView(nullptr, DType::kF32, {0, 2, 24});
  call.value = ConstTensorView(nullptr, DType::kF16, {0, 2, 16});
  call.cache.num_blocks = 0;
  call.cache.key.data = call.cache.value.data = nullptr;
  expect_updated(call);
}

TEST(Survived, MoreTokensThanSlots) {
  UpdateCall call;
  call.slot_mapping.shape[0] = 3;
  expect_updated(call);
}

TEST(Survived, NegativeSlots) {
  UpdateCall call;
  call.slots[0] = std::numeric_limits<std::int64_t>::min();
  call.slots[3] = -7;
  expect_updated(call);
}

TEST(Survived, Fp8IntoItsOwnKind) {
  UpdateCall call;
  call.cache.key.dtype = DType::kE4M3;
  call.cache.value.dtype = DType::kE5M2;
  call.key.dtype = DType::kE4M3;
  call.value.dtype = DType::kF32;
  float scales[2] = {0.5F, 2.0F};
  call.cache.k_scale = view_of(scales, {1});
  call.cache.v_scale = with_stride(view_of(scales, {2}), 0, -1);
  expect_updated(call);
}

TEST(Survived, ReadingExpandedKeys) {
  // A KV head expanded to all heads by a stride of 0 may be read, not written.
  AttendCall call;
  call.args.cache.key.stride_head = call.args.cache.value.stride_head = 0;
  call.replan();
  expect_attended(call);
}

TEST(Survived, EveryOption) {
  AttendCall call;
  float ones[16] = {1};
  const bool causal[3] = {true, false, true};
  const std::int32_t ranges[12] = {30, 20, -5, 4, 8, 8, 0, 0, 10, 20, 3, 9};
  call.key.causal_per_seq = true;
  call.key.mm_ranges = true;
  call.key.mask.window = 4;
  call.key.mask.clamp_mm_ranges = true;
  call.args.batch.causal_per_seq = view_of(causal, {3});
  call.args.batch.mm_ranges = view_of(ranges, {3, 2, 2});
  call.params.alibi_slopes = view_of(ones, {4});
  call.params.alibi_sqrt = true;
  call.params.qq_bias = ConstTensorView(ones, DType::kBF16, {3, 3});
  call.params.sinks = ConstTensorView(ones, DType::kF16, {4});
  call.params.soft_cap = -1.0F;
  call.params.output_scale = view_of(ones, {1});
  call.args.output.dtype = DType::kE4M3;
  call.key.key_dtype = call.args.cache.key.dtype = DType::kE4M3;
  call.args.cache.k_scale = view_of(ones, {2});
  call.replan();
  expect_attended(call);
  call.args.output.dtype = DType::kBF16;
  call.params.output_scale = {};
  call.params.qq_bias = ConstTensorView(nullptr, DType::kF32, {0, 0});
  expect_attended(call);
}

TEST(Survived, PrefixLensOfAnySize) {
  AttendCall call;
  const std::int32_t prefix_lens[3] = {-4, 1000, 0};
  call.key.mask.prefix_window = 4;
  call.args.batch.prefix_lens = view_of(prefix_lens, {3});
  call.replan();
  expect_attended(call);
}

// On a device neither lengths nor ids are read: these pointers lead nowhere.
TEST(OnADevice, IndicesAreNotRead) {
  const Device device{DeviceType::kCuda, 1};
  std::uintptr_t nowhere = 0;
  AttendCall call;
  RecordingBackend backend(DeviceType::kCuda);
  const auto there = [&](DType dtype, std::initializer_list<std::int64_t> shape) {
    nowhere += std::uintptr_t{1} << 32;  // each of its own memory
    return TensorView(reinterpret_cast<void*>(nowhere), dtype, shape, device);
  };
  call.args.batch.query_start_loc = there(DType::kI32, {4});
  call.args.batch.seq_lens = there(DType::kI32, {3});
  call.args.batch.block_table = there(DType::kI32, {3, 4});
  call.args.query = there(DType::kBF16, {6, 4, 24});
  call.args.output = there(DType::kBF16, {6, 4, 16});
  call.args.lse = there(DType::kF32, {4, 6});
  call.args.cache = KvCacheView::packed(there(DType::kBF16, {8, 16, 2, 40}), 24);
  const std::int64_t bytes = workspace_bytes(backend, call.key, call.maxima);
  const Plan plan =
      make_plan(backend, call.key, call.maxima, call.args.batch, there(DType::kU8, {bytes}));
  EXPECT_NO_THROW(attend(backend, call.params, call.args, plan));
  EXPECT_NO_THROW(update_cache(backend, there(DType::kF16, {2, 2, 24}),
                               there(DType::kF16, {2, 2, 16}), call.args.cache,
                               there(DType::kI64, {2})));
  EXPECT_EQ(backend.writes(), 3);
}

// Tensors of another device than the backend's are refused, for the backend would follow their
// addresses.
TEST(OnADevice, NotByAnotherBackend) {
  const Device device{DeviceType::kCuda, 0};
  UpdateCall update;
  update.cache.device = update.key.device = update.value.device = update.slot_mapping.device =
      device;
  expect_refused(update.memory, update.backend, ErrorCode::kInvalidArgument, {"cuda:0"},
                 [&] { update.update(); });
  MergeCall merge;
  for (ConstTensorView* view :
       {&merge.a.output, &merge.a.lse, &merge.b.output, &merge.b.lse, &merge.sinks}) {
    view->device = device;
  }
  merge.output.device = merge.lse.device = device;
  expect_refused(merge.memory, merge.backend, ErrorCode::kInvalidArgument, {"cuda:0"},
                 [&] { merge.merge(); });
  expect_refused(merge.memory, merge.backend, ErrorCode::kInvalidArgument, {"cuda:0"},
                 [&] { fill_zero(merge.backend, merge.output); });
  AttendCall attend;
  for (ConstTensorView* view : {&attend.args.batch.query_start_loc, &attend.args.batch.seq_lens,
                                &attend.args.batch.block_table}) {
    view->device = device;
  }
  expect_refused(attend.memory, attend.backend, ErrorCode::kInvalidArgument, {"cuda:0"},
                 [&] { attend.make_plan_now(); });
}

}  // namespace
}  // namespace diffkv::test
