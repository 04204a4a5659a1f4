// Which tile classes are left of a batch's bound on query lengths.
#include "plan/classes.h"

#include <gtest/gtest.h>

#include <cstdint>

namespace diffkv::plan {
namespace {

// Tiles of 16, 64 and 128 rows.
ScheduleLimits three_classes() {
  ScheduleLimits limits;
  limits.num_classes = 3;
  for (TileClass& cls : limits.classes) cls.invariant_max_tiles = 4;
  limits.classes[0].tile_rows = limits.classes[0].max_seq_rows = 16;
  limits.classes[1].tile_rows = 64;
  limits.classes[1].max_seq_rows = 128;
  limits.classes[2].tile_rows = 128;
  return limits;
}

// 16 heads share a KV head.
PlanKey usual_key() {
  PlanKey key;
  key.num_heads = 32;
  key.num_kv_heads = 2;
  return key;
}

std::int32_t classes_for(std::int64_t max_query_len, std::int64_t num_actual_tokens) {
  Batch batch;
  batch.max_query_len = max_query_len;
  batch.num_actual_tokens = num_actual_tokens;
  return bounded(three_classes(), usual_key(), batch).num_classes;
}

TEST(Classes, OnlyLongerQueriesNeedTheLast) {
  EXPECT_EQ(classes_for(1, 4096), 1);
  EXPECT_EQ(classes_for(2, 4096), 2);
  EXPECT_EQ(classes_for(8, 4096), 2);
  EXPECT_EQ(classes_for(9, 4096), 3);
  EXPECT_EQ(classes_for(std::int64_t{1} << 31, 4096), 3);
}

TEST(Classes, WithoutABoundTheTokensAreOne) {
  EXPECT_EQ(classes_for(0, 0), 1);
  EXPECT_EQ(classes_for(0, 1), 1);
  EXPECT_EQ(classes_for(0, 8), 2);
  EXPECT_EQ(classes_for(0, 4096), 3);
}

TEST(Classes, OneTakesTheSmallerOnesSequencesWhereItIsTheLast) {
  ScheduleLimits limits = three_classes();
  limits.classes[1].takes_smaller = true;
  PlanKey key = usual_key();
  Batch batch;
  const auto rows_of_first = [&](std::int64_t max_query_len) {
    batch.max_query_len = max_query_len;
    return bounded(limits, key, batch).classes[0].max_seq_rows;
  };
  EXPECT_EQ(rows_of_first(1), 16);
  EXPECT_EQ(rows_of_first(2), 0);
  EXPECT_EQ(rows_of_first(8), 0);
  EXPECT_EQ(rows_of_first(9), 16);
  // What computes a sequence follows from it alone.
  key.policy = SchedulePolicy::kBatchInvariant;
  EXPECT_EQ(rows_of_first(2), 16);
}

// Partials are laid out before the batch is known, for tiles of the class's own sequences.
TEST(Classes, TheLastCutsNoMoreTilesThanItHasPartialsFor) {
  Batch batch;
  batch.max_query_len = 1;
  EXPECT_EQ(bounded(three_classes(), usual_key(), batch).classes[0].invariant_max_tiles, 1);
  batch.max_query_len = 8;
  const ScheduleLimits two = bounded(three_classes(), usual_key(), batch);
  EXPECT_EQ(two.classes[0].invariant_max_tiles, 4);
  EXPECT_EQ(two.classes[1].invariant_max_tiles, 2);
  batch.max_query_len = 9;
  EXPECT_EQ(bounded(three_classes(), usual_key(), batch).classes[2].invariant_max_tiles, 4);
}

}  // namespace
}  // namespace diffkv::plan
