// The planner on the device against the host's, table by table.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "core/layout.h"
#include "cuda/device.h"
#include "device/memory.h"
#include "diffkv/plan.h"
#include "plan/classes.h"
#include "plan/host_plan.h"
#include "tests/cuda/rig.h"

namespace diffkv::cuda {
namespace {

constexpr Device kDevice{DeviceType::kCuda, 0};
constexpr std::int32_t kMostTokens = 20000;
constexpr std::int32_t kMostKeys = 40000;

// A batch's host arrays, and where each lies in one piece of memory.
struct Inputs {
  PlanKey key;
  ScheduleLimits limits;
  std::int64_t max_query_len = 0;  // of some batches; queries may be longer
  std::vector<std::int32_t> query_start_loc{0};
  std::vector<std::int32_t> seq_lens;
  std::vector<std::int32_t> prefix_lens;
  std::vector<std::int32_t> mm_ranges;  // two a sequence
  std::vector<std::uint8_t> causal;

  std::int64_t num_seqs() const { return static_cast<std::int64_t>(seq_lens.size()); }
};

Inputs random_inputs(std::mt19937& rng, std::int64_t num_seqs) {
  const auto uniform = [&](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(rng);
  };
  Inputs in;
  PlanKey& key = in.key;
  key.num_kv_heads = uniform(1, 4);
  key.num_heads = key.num_kv_heads * uniform(1, 16);
  key.head_size_qk = key.head_size_v = 8;
  key.policy = uniform(0, 1) == 0 ? SchedulePolicy::kBalanced : SchedulePolicy::kBatchInvariant;
  key.mask.causal = uniform(0, 3) != 0;
  const int kind = uniform(0, 4);
  if (kind == 1) key.mask.window = uniform(1, 500);
  if (kind == 2) {
    key.mask.chunk_size = uniform(1, 500);
    key.mask.chunk_lookback = uniform(0, 2);
  }
  if (kind == 3) key.mask.prefix_window = uniform(1, 400);
  key.causal_per_seq = uniform(0, 3) == 0;
  key.mm_ranges = uniform(0, 3) == 0;
  in.limits.num_classes = uniform(1, kMaxTileClasses);
  for (int c = 0; c < in.limits.num_classes; ++c) {
    TileClass& cls = in.limits.classes[c];
    cls.tile_heads = key.num_kv_heads % 2 == 0 ? uniform(1, 2) : 1;
    cls.tile_rows = 16 << (2 * c);
    cls.max_seq_rows = 16 << (2 * c);
    cls.takes_smaller = uniform(0, 1) == 0;
    const std::int64_t head_groups = key.num_kv_heads / cls.tile_heads;
    cls.head_lanes = head_groups % 2 == 0 ? uniform(1, 2) : 1;
    // At times more starts than the planner keeps in shared memory.
    cls.workers = cls.head_lanes * (uniform(0, 9) == 0 ? uniform(301, 1200) : uniform(1, 300));
    cls.tile_cost = uniform(1, 20);
    cls.block_cost = uniform(1, 10);
    cls.least_cut = uniform(1, 4);
    cls.uncut_per_share = uniform(1, 32);
    cls.least_share_cost = uniform(0, 1) * uniform(1, 500);
    cls.invariant_max_tiles = uniform(1, 4);
    cls.invariant_max_pieces = uniform(2, 16);
    cls.invariant_least_keys = 512 << uniform(0, 2);
  }
  if (uniform(0, 1) == 0) in.max_query_len = uniform(1, 20);
  const int long_queries = uniform(0, 20);
  for (std::int64_t s = 0; s < num_seqs; ++s) {
    const int left = kMostTokens - in.query_start_loc.back();
    const int wanted = uniform(0, 20) < long_queries ? uniform(0, 900) : uniform(0, 4);
    const int query_len = std::min(left, wanted);
    const int seq_len = uniform(0, 4) == 0 ? uniform(0, 5) : uniform(0, kMostKeys);
    in.query_start_loc.push_back(in.query_start_loc.back() + query_len);
    in.seq_lens.push_back(seq_len);
    in.prefix_lens.push_back(uniform(0, seq_len + 5));
    in.causal.push_back(static_cast<std::uint8_t>(uniform(0, 1)));
    const int first = uniform(0, seq_len + 1);
    const int middle = first + uniform(0, 300);
    for (int x : {first, middle, middle + 1, middle + uniform(0, 300)}) in.mm_ranges.push_back(x);
  }
  Batch bound;
  bound.max_query_len = in.max_query_len;
  bound.num_actual_tokens = in.query_start_loc.back();
  in.limits = plan::bounded(in.limits, key, bound);
  return in;
}

// Of sequences that each have at most a tile a head, which the planner has code of its own for, or
// all but one.
Inputs random_decode(std::mt19937& rng, std::int64_t num_seqs, bool but_one) {
  const auto uniform = [&](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(rng);
  };
  Inputs in = random_inputs(rng, 0);
  in.key.policy = SchedulePolicy::kBalanced;
  in.key.mask = {};
  if (uniform(0, 1) == 0) in.key.mask.window = uniform(1, 2000);
  in.key.causal_per_seq = in.key.mm_ranges = false;
  in.limits.num_classes = 1;
  const auto group = static_cast<int>(in.key.group());
  TileClass& cls = in.limits.classes[0];
  cls.tile_rows = cls.max_seq_rows = group * uniform(1, 4);
  const int most = cls.tile_rows / group;
  const int long_one = but_one ? uniform(0, static_cast<int>(num_seqs) - 1) : -1;
  const bool empty_ones = uniform(0, 1) == 0;
  for (int s = 0; s < num_seqs; ++s) {
    const int query_len = s == long_one ? most + uniform(1, 40) : uniform(empty_ones ? 0 : 1, most);
    in.query_start_loc.push_back(in.query_start_loc.back() + query_len);
    in.seq_lens.push_back(uniform(0, 9) == 0 ? uniform(0, 5) : uniform(0, kMostKeys));
  }
  return in;
}

// Takes the batch's tensors and the plan's tables from one piece of memory, host or device.
struct Placed {
  Batch batch;
  detail::PlanTables tables;
  std::int64_t inputs_bytes = 0;  // the tables come behind
  std::int64_t bytes = 0;

  Placed(const Inputs& in, std::byte* base, const Device& device) {
    core::Layout layout(base);
    const std::int64_t n = in.num_seqs();
    const auto tensor = [&](const auto& values, DType dtype,
                            std::initializer_list<std::int64_t> shape) {
      using T = typename std::decay_t<decltype(values)>::value_type;
      return ConstTensorView(layout.take<T>(static_cast<std::int64_t>(values.size())), dtype, shape,
                             device);
    };
    batch.num_seqs = n;
    batch.num_actual_tokens = in.query_start_loc.back();
    batch.max_query_len = in.max_query_len;
    batch.query_start_loc = tensor(in.query_start_loc, DType::kI32, {n + 1});
    batch.seq_lens = tensor(in.seq_lens, DType::kI32, {n});
    const ConstTensorView prefix = tensor(in.prefix_lens, DType::kI32, {n});
    const ConstTensorView ranges = tensor(in.mm_ranges, DType::kI32, {n, 2, 2});
    const ConstTensorView causal = tensor(in.causal, DType::kBool, {n});
    if (in.key.mask.prefix_window > 0) batch.prefix_lens = prefix;
    if (in.key.mm_ranges) batch.mm_ranges = ranges;
    if (in.key.causal_per_seq) batch.causal_per_seq = causal;
    inputs_bytes = layout.bytes();

    tables.max_tokens = kMostTokens;
    tables.max_seq_len = kMostKeys;
    tables.query_start_loc = layout.take<std::int32_t>(n + 1);
    tables.seq_lens = layout.take<std::int32_t>(n);
    for (int c = 0; c < in.limits.num_classes; ++c) {
      tables.cost_before[c] = layout.take<std::int64_t>(n + 1);
      tables.starts[c] = layout.take<detail::WorkStart>(in.limits.classes[c].workers + 1);
      tables.first_pieces[c] = layout.take<detail::FirstPiece>(in.limits.classes[c].workers);
      tables.arrivals[c] = layout.take<std::uint64_t>(in.limits.classes[c].workers);
      tables.first_slot[c] = 1000000 * c;
    }
    tables.slot_before = layout.take<std::int32_t>(n);
    if (in.key.policy == SchedulePolicy::kBalanced) tables.slot_before = nullptr;
    bytes = layout.bytes();
  }

  void fill(const Inputs& in) const {
    const auto copy = [](const ConstTensorView& to, const auto& from) {
      if (to.given() && !from.empty()) {
        std::memcpy(const_cast<void*>(to.data), from.data(), from.size() * sizeof(from[0]));
      }
    };
    copy(batch.query_start_loc, in.query_start_loc);
    copy(batch.seq_lens, in.seq_lens);
    copy(batch.prefix_lens, in.prefix_lens);
    copy(batch.mm_ranges, in.mm_ranges);
    copy(batch.causal_per_seq, in.causal);
  }
};

// Plans on both sides, of inputs that may differ from what the host is given.
void expect_same_tables(const Inputs& on_host, const Inputs& on_device) {
  const Placed count(on_host, nullptr, {});
  std::vector<std::uint64_t> host_memory(static_cast<std::size_t>(count.bytes / 8 + 8));
  auto* host_base = reinterpret_cast<std::byte*>(host_memory.data());
  Placed host(on_host, host_base, {});
  // The device's inputs, then tables of nonsense.
  std::vector<std::byte> image(static_cast<std::size_t>(count.bytes), std::byte{0xa5});
  Placed(on_device, image.data(), {}).fill(on_device);
  const device::Memory memory(backend(), count.bytes);
  memory.upload(image.data(), count.bytes);
  Placed placed(on_device, memory.data(), kDevice);
  backend().plan(on_device.key, on_device.limits, placed.batch, placed.tables, {});
  memory.download(image.data(), count.bytes);
  backend().synchronize(kDevice, {});

  std::fill(host_memory.begin(), host_memory.end(), 0xa5a5a5a5a5a5a5a5ULL);
  host.fill(on_host);
  plan::plan_on_host(on_host.key, on_host.limits, host.batch, host.tables);
  for (std::int64_t i = host.inputs_bytes; i < host.bytes; ++i) {
    ASSERT_EQ(host_base[i], image[static_cast<std::size_t>(i)])
        << "byte " << i - host.inputs_bytes << " of the tables, " << to_string(on_host.key) << ", "
        << on_host.num_seqs() << " sequences";
  }
}

// Where tensor copies read them as one stretch of memory, and tiles are short or keys small.
TEST(CudaPlan, FourKvHeadsShareADecodeTileOfAWindowOrFp8) {
  DIFFKV_NEED_GPU();
  if (current_gpu().capability() < 90) GTEST_SKIP() << "this GPU has no tensor copies";
  PlanKey key;
  key.head_size_qk = 192;
  key.head_size_v = 128;
  for (const DType stored : {DType::kBF16, DType::kE4M3}) {
    key.key_dtype = key.value_dtype = stored;
    for (const SchedulePolicy policy :
         {SchedulePolicy::kBalanced, SchedulePolicy::kBatchInvariant}) {
      key.policy = policy;
      for (const std::int64_t kv_heads : {1, 2, 3, 4, 6, 8, 12}) {
        key.num_kv_heads = kv_heads;
        key.num_heads = 16 * kv_heads;
        for (const std::int32_t window : {0, 128}) {
          key.mask.window = window;
          const TileClass decode = backend().limits(key).classes[0];
          const bool four = kv_heads % 4 == 0 && (window > 0 || is_fp8(stored));
          EXPECT_EQ(decode.tile_heads, four ? 4 : 1) << kv_heads << ", window " << window;
          EXPECT_EQ(kv_heads / decode.tile_heads % decode.head_lanes, 0) << kv_heads;
        }
      }
    }
  }
}

TEST(CudaPlan, TablesEqualTheHosts) {
  DIFFKV_NEED_GPU();
  std::mt19937 rng(3);
  for (int i = 0; i < 400; ++i) {
    SCOPED_TRACE("batch " + std::to_string(i));
    const int most = i % 10 == 0 ? 4500 : i % 3 == 0 ? 300 : 12;
    const Inputs in = random_inputs(rng, std::uniform_int_distribution<int>(0, most)(rng));
    expect_same_tables(in, in);
    if (HasFatalFailure()) return;
  }
}

TEST(CudaPlan, TablesOfDecodeEqualTheHosts) {
  DIFFKV_NEED_GPU();
  std::mt19937 rng(5);
  for (int i = 0; i < 400; ++i) {
    SCOPED_TRACE("batch " + std::to_string(i));
    const int most = i % 10 == 0 ? 4500 : i % 3 == 0 ? 300 : 12;
    const int num_seqs = std::uniform_int_distribution<int>(i % 4 == 0 ? 1 : 0, most)(rng);
    const Inputs in = random_decode(rng, num_seqs, i % 4 == 0);
    expect_same_tables(in, in);
    if (HasFatalFailure()) return;
  }
}

// Lengths that make no sense are planned as the nearest that do.
TEST(CudaPlan, LengthsAreMadeSafe) {
  DIFFKV_NEED_GPU();
  std::mt19937 rng(4);
  std::uniform_int_distribution<std::int32_t> any(-2000000000, 2000000000);
  for (int i = 0; i < 300; ++i) {
    SCOPED_TRACE("batch " + std::to_string(i));
    const int most = i % 10 < 2 ? 4500 : 40;
    const int num_seqs = std::uniform_int_distribution<int>(1, most)(rng);
    Inputs spoilt =
        i % 2 == 0 ? random_inputs(rng, num_seqs) : random_decode(rng, num_seqs, i % 8 == 1);
    Inputs safe = spoilt;
    // Of some, the starts of late sequences only, or none.
    const int first = i % 3 == 0 ? 0 : i % 3 == 1 ? std::min(num_seqs, 1500) : num_seqs + 1;
    for (std::size_t k = static_cast<std::size_t>(first); k < spoilt.query_start_loc.size(); ++k) {
      if (any(rng) > 1000000000) spoilt.query_start_loc[k] = any(rng) / (i % 2 == 0 ? 1 : 100000);
    }
    for (std::int32_t& length : spoilt.seq_lens) {
      if (any(rng) > 1000000000) length = any(rng);
    }
    safe.query_start_loc[0] = 0;
    for (std::size_t k = 1; k < safe.query_start_loc.size(); ++k) {
      safe.query_start_loc[k] =
          std::max(safe.query_start_loc[k - 1], std::min(spoilt.query_start_loc[k], kMostTokens));
    }
    for (std::size_t k = 0; k < safe.seq_lens.size(); ++k) {
      safe.seq_lens[k] = std::clamp(spoilt.seq_lens[k], 0, kMostKeys);
    }
    expect_same_tables(safe, spoilt);
    if (HasFatalFailure()) return;
  }
}

}  // namespace
}  // namespace diffkv::cuda
