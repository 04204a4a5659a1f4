// The plan that a device made, as `diffkv plan` shows it.
#include <gtest/gtest.h>

#include <vector>

#include "cli/planned_batch.h"
#include "tests/device/separate_memory.h"

namespace diffkv::testing {
namespace {

bool same(const WorkItem& a, const WorkItem& b) {
  return a.tile_class == b.tile_class && a.worker == b.worker && a.seq == b.seq &&
         a.kv_head == b.kv_head && a.first_row == b.first_row && a.num_rows == b.num_rows &&
         a.keys == b.keys && a.slot == b.slot;
}

TEST(Plan, OfADeviceIsShownOnTheHost) {
  const SeparateMemoryBackend backend;
  const std::vector<cli::SeqLengths> seqs{{1, 9000}, {70, 700}, {0, 0}, {3, 40}};
  const cli::MaskSpec mask{.prefix_len = 0, .causal = {true, false}, .mm_ranges = {{10, 60}}};
  for (const SchedulePolicy policy : {SchedulePolicy::kBalanced, SchedulePolicy::kBatchInvariant}) {
    PlanKey key;
    key.num_heads = 8;
    key.num_kv_heads = 2;
    key.head_size_qk = 48;
    key.head_size_v = 32;
    key.mask.window = 500;
    key.causal_per_seq = true;
    key.mm_ranges = true;
    key.policy = policy;
    const cli::PlannedBatch on_device(backend, key, seqs, mask);
    const cli::PlannedBatch on_host(find_backend("cpu"), key, seqs, mask);
    EXPECT_EQ(on_device.workspace_bytes(), on_host.workspace_bytes());
    const std::vector<WorkItem> items = on_device.plan().work_items(on_device.batch());
    const std::vector<WorkItem> expected = on_host.plan().work_items(on_host.batch());
    ASSERT_EQ(items.size(), expected.size());
    EXPECT_GT(items.size(), 4U);
    for (std::size_t i = 0; i < items.size(); ++i) EXPECT_TRUE(same(items[i], expected[i])) << i;
  }
  EXPECT_EQ(backend.stages(), 2);
  EXPECT_EQ(backend.allocations(), 0);
}

}  // namespace
}  // namespace diffkv::testing
