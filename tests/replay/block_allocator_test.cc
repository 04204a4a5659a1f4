#include "replay/block_allocator.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>

#include "diffkv/error.h"

namespace diffkv::replay {
namespace {

TEST(BlockAllocator, NeverHandsOutABlockTwiceNorTheNullBlock) {
  std::mt19937 random(7);
  BlockAllocator pool(50);
  std::vector<std::int32_t> held;
  for (int i = 0; i < 20000; ++i) {
    if (random() % 2 == 0) {
      const std::int64_t count = random() % 6;
      const std::size_t before = held.size();
      const bool fits = count <= 49 - static_cast<std::int64_t>(before);
      ASSERT_EQ(pool.allocate(count, held), fits);
      ASSERT_EQ(held.size(), before + static_cast<std::size_t>(fits ? count : 0));
    } else if (!held.empty()) {
      std::swap(held[random() % held.size()], held.back());
      pool.free(held.back());
      held.pop_back();
    }
    const std::set<std::int32_t> distinct(held.begin(), held.end());
    ASSERT_EQ(distinct.size(), held.size());
    ASSERT_TRUE(distinct.empty() || (*distinct.begin() >= 1 && *distinct.rbegin() < 50));
    ASSERT_EQ(pool.num_used(), static_cast<std::int64_t>(held.size()));
    ASSERT_EQ(pool.num_used() + pool.num_free(), 49);
  }
}

TEST(BlockAllocator, HandsOutEveryBlockButTheNullBlock) {
  BlockAllocator pool(9);
  std::vector<std::int32_t> held;
  ASSERT_TRUE(pool.allocate(8, held));
  std::sort(held.begin(), held.end());
  EXPECT_EQ(held, (std::vector<std::int32_t>{1, 2, 3, 4, 5, 6, 7, 8}));
  EXPECT_FALSE(pool.allocate(1, held));
}

TEST(BlockAllocator, LastFreedFirst) {
  BlockAllocator pool(9);
  std::vector<std::int32_t> held;
  ASSERT_TRUE(pool.allocate(5, held));
  pool.free(held[1]);
  pool.free(held[3]);
  std::vector<std::int32_t> again;
  ASSERT_TRUE(pool.allocate(2, again));
  EXPECT_EQ(again, (std::vector<std::int32_t>{held[3], held[1]}));
}

TEST(BlockAllocator, RefusesWhatIsNotHandedOut) {
  BlockAllocator pool(4);
  std::vector<std::int32_t> held;
  ASSERT_TRUE(pool.allocate(1, held));
  pool.free(held[0]);
  EXPECT_THROW(pool.free(held[0]), Error);  // twice
  EXPECT_THROW(pool.free(BlockAllocator::kNullBlock), Error);
  EXPECT_THROW(pool.free(4), Error);
  EXPECT_THROW(pool.free(-1), Error);
  EXPECT_EQ(pool.num_free(), 3);
  EXPECT_THROW(BlockAllocator(1), Error);
}

}  // namespace
}  // namespace diffkv::replay
