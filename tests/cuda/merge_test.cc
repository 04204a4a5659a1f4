// Cut tiles that blocks merge themselves, or combine those of batch-invariant plans: right whatever
// the partials held before, also a second time, and nothing is left behind for the next attend.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "core/softmax.h"
#include "cuda/device.h"
#include "diffkv/plan.h"
#include "plan/schedule.h"
#include "plan/shares.h"
#include "tests/cuda/rig.h"
#include "verify/cases.h"
#include "verify/codec.h"
#include "verify/compare.h"
#include "verify/generate.h"
#include "verify/placed.h"
#include "verify/rows.h"
#include "verify/run_flow.h"

namespace diffkv::cuda {
namespace {

struct Shape {
  std::string name;
  std::int64_t heads;
  std::int64_t kv_heads;
  std::int64_t head_size_v;
  std::vector<verify::SeqShape> seqs;
  bool mixed;  // whether shares end a cut tile and begin another
  DType stored = DType::kBF16;
  std::int32_t window = 0;
  SchedulePolicy policy = SchedulePolicy::kBalanced;
  std::int32_t prefix_window = 0;
};

// Sequences that shares begin and end in, some within one share, some across many.
std::vector<verify::SeqShape> mixed(int count, std::int64_t query_len, std::int64_t longest) {
  std::mt19937 rng(7);
  std::vector<verify::SeqShape> seqs;
  for (int s = 0; s < count; ++s) {
    const std::int64_t most = s % 5 < 2 ? longest : longest / 20;
    seqs.push_back({query_len, std::uniform_int_distribution<std::int64_t>(query_len, most)(rng)});
  }
  return seqs;
}

// Sequences that are each cut once, some of several tiles, some without a query.
std::vector<verify::SeqShape> many(int count) {
  std::vector<verify::SeqShape> seqs;
  for (int s = 0; s < count; ++s) {
    seqs.push_back({s % 50 == 10 ? 0 : s % 7 == 3 ? 3 : 1, 2100 + 37 * s % 500});
  }
  return seqs;
}

std::vector<Shape> shapes() {
  constexpr auto kInvariant = SchedulePolicy::kBatchInvariant;
  return {
      {"one_of_four_lanes", 64, 4, 128, {{1, 12000}}, false},
      {"mixed_of_four_lanes", 64, 4, 128, mixed(60, 1, 3000), true},
      {"one_of_four_heads", 64, 4, 128, {{1, 12000}}, false, DType::kE4M3},
      {"mixed_of_four_heads", 64, 4, 128, mixed(60, 1, 6000), true, DType::kE4M3},
      {"window_of_four_heads", 64, 4, 128, mixed(60, 1, 9000), false, DType::kBF16, 4096},
      {"mixed_of_one_head", 16, 1, 128, mixed(60, 1, 6000), true},
      {"mixed_of_small_heads", 32, 2, 64, mixed(50, 1, 20000), true},
      {"mixed_of_four_tokens", 16, 1, 128, mixed(40, 4, 30000), true},
      {"mixed_prefills", 8, 1, 128, mixed(6, 100, 6000), false},
      {"invariant", 64, 4, 128, mixed(60, 1, 9000), false, DType::kBF16, 0, kInvariant},
      {"invariant_of_heads", 64, 4, 128, mixed(60, 1, 9000), false, DType::kE4M3, 0, kInvariant},
      {"invariant_of_four_tokens", 16, 1, 128, mixed(40, 4, 30000), false, DType::kBF16, 0,
       kInvariant},
      {"invariant_of_64_parts",
       16,
       1,
       128,
       {{1, 65000}, {1, 20000}},
       false,
       DType::kBF16,
       0,
       kInvariant},
      {"invariant_of_wide_values", 16, 1, 256, mixed(40, 1, 6000), false, DType::kBF16, 0,
       kInvariant},
      {"invariant_of_prefixes", 16, 1, 128, mixed(40, 1, 12000), false, DType::kBF16, 0, kInvariant,
       2500},
      // More than a block of combine finds at a time, of sequences and of rows.
      {"invariant_of_many", 48, 3, 16, many(300), false, DType::kBF16, 0, kInvariant}};
}

// Shares of the plan that end a tile that they do not begin, and begin one that they do not end.
int shares_with_two_cuts(const Plan& plan) {
  int found = 0;
  for (int k = 0; k < plan.limits().num_classes; ++k) {
    const TileClass& cls = plan.limits().classes[k];
    std::vector<detail::WorkStart> starts(static_cast<std::size_t>(plan::num_shares(cls) + 1));
    DIFFKV_CUDA_CALL(cudaMemcpy(starts.data(), plan.tables().starts[k],
                                starts.size() * sizeof(detail::WorkStart), cudaMemcpyDeviceToHost));
    for (std::size_t s = 0; s + 1 < starts.size(); ++s) {
      if (plan::same_tile(starts[s], starts[s + 1])) continue;
      if (starts[s].block > 0 && starts[s + 1].block > 0) ++found;
    }
  }
  return found;
}

// Of all rows that the problem has.
std::vector<double> values_of(const TensorView& output, std::int64_t tokens) {
  std::vector<double> values;
  for (std::int64_t token = 0; token < tokens; ++token) {
    for (std::int64_t head = 0; head < output.shape[1]; ++head) {
      for (std::int64_t d = 0; d < output.shape[2]; ++d) {
        values.push_back(verify::load(output.data, output.dtype,
                                      token * output.strides[0] + head * output.strides[1] + d));
      }
    }
  }
  return values;
}

class CudaMerges : public testing::TestWithParam<Shape> {};

INSTANTIATE_TEST_SUITE_P(Every, CudaMerges, testing::ValuesIn(shapes()),
                         [](const auto& shape) { return shape.param.name; });

TEST_P(CudaMerges, EveryAttendOfAPlanIsRight) {
  DIFFKV_NEED_GPU();
  const Shape& shape = GetParam();
  verify::Case c;
  c.key.num_heads = shape.heads;
  c.key.num_kv_heads = shape.kv_heads;
  c.key.head_size_qk = shape.head_size_v < 128 ? shape.head_size_v : 192;
  c.key.head_size_v = shape.head_size_v;
  c.key.key_dtype = c.key.value_dtype = shape.stored;
  c.key.mask.window = shape.window;
  c.key.mask.prefix_window = shape.prefix_window;
  c.key.policy = shape.policy;
  c.seqs = shape.seqs;
  c.block_size = 64;
  c.sinks = DType::kF32;
  c.lse = true;
  const Device device{DeviceType::kCuda, 0};
  verify::GeneratedProblem problem(c, 5);
  verify::PlacedProblem placed(backend(), problem, device);
  update_cache(backend(), placed.new_key(), placed.new_value(), placed.args().cache,
               placed.slot_mapping());
  const verify::PlanMemory memory(backend(), problem.key(), problem.maxima(), device);
  const Plan plan =
      make_plan(backend(), problem.key(), problem.maxima(), placed.args().batch, memory.view());
  const detail::PlanTables& tables = plan.tables();
  backend().synchronize(device, {});
  EXPECT_TRUE(!shape.mixed || shares_with_two_cuts(plan) > 0);
  std::int64_t tokens = 0;
  for (const verify::SeqShape& seq : c.seqs) tokens += seq.query_len;
  std::vector<double> first;
  // partial_state comes behind partial_acc.
  const std::int64_t partial_rows = (reinterpret_cast<const std::byte*>(tables.partial_state) -
                                     reinterpret_cast<const std::byte*>(tables.partial_acc)) /
                                    (tables.partial_stride * std::int64_t{sizeof(float)});
  ASSERT_GT(partial_rows, 0);
  for (int round = 0; round < 3; ++round) {
    SCOPED_TRACE("round " + std::to_string(round));
    // NaN where a partial would be read that is not there yet.
    DIFFKV_CUDA_CALL(
        cudaMemset(tables.partial_acc, 0xff,
                   static_cast<std::size_t>(partial_rows * tables.partial_stride) * sizeof(float)));
    DIFFKV_CUDA_CALL(
        cudaMemset(tables.partial_state, 0xff,
                   static_cast<std::size_t>(partial_rows) * sizeof(core::SoftmaxState)));
    placed.poison_outputs();
    attend(backend(), placed.params(), placed.args(), plan);
    backend().synchronize(device, {});
    placed.fetch();
    const std::vector<double> values = values_of(problem.args().output, tokens);
    const auto missing =
        std::count_if(values.begin(), values.end(), [](double x) { return std::isnan(x); });
    EXPECT_EQ(missing, 0) << "of " << values.size();
    if (round == 0) first = values;
    EXPECT_TRUE(missing > 0 || values == first) << "other bits than in the first round";
    constexpr std::int64_t kSampledWork = 60'000'000;
    const verify::RowsCheck rows =
        verify::check_rows(problem.key(), problem.params(), problem.args(),
                           verify::tolerance(problem.key(), c.output_dtype), kSampledWork,
                           5U + static_cast<unsigned>(round));
    EXPECT_GT(rows.rows, 0);
    EXPECT_EQ(rows.wrong, 0) << rows.what;
    for (int k = 0; k < plan.limits().num_classes; ++k) {
      std::vector<std::uint64_t> words(static_cast<std::size_t>(plan.limits().classes[k].workers));
      DIFFKV_CUDA_CALL(cudaMemcpy(words.data(), tables.arrivals[k],
                                  words.size() * sizeof(std::uint64_t), cudaMemcpyDeviceToHost));
      for (std::size_t w = 0; w < words.size(); ++w) {
        EXPECT_EQ(words[w], 0U) << "class " << k << ", worker " << w;
      }
    }
  }
  EXPECT_EQ(memory.guard_damage(), "");
  EXPECT_EQ(problem.damage(), "");
}

}  // namespace
}  // namespace diffkv::cuda
