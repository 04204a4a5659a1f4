// Which caches the copy engine can copy boxes of: the others take the way of rows.
#include "cuda/tensor_maps.h"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

#include "cuda/device.h"
#include "device/memory.h"
#include "tests/cuda/rig.h"

namespace diffkv::cuda {
namespace {

constexpr BoxShape kShape{16, 16, 64, 3, 2};       // of head sizes up to 192/128
constexpr BoxShape kGroupShape{16, 64, 64, 3, 2};  // the same, of groups of 64 keys

// A packed cache in NHD order, 4 heads of 192/128, in pages of `block_size`; nobody reads it.
AttendKernelParams packed(const device::Memory& memory, std::int32_t block_size, DType dtype) {
  static constexpr std::int32_t kTable = 0;
  AttendKernelParams params{};
  params.schedule.num_kv_heads = 4;
  params.head_size_qk = 192;
  params.head_size_v = 128;
  params.num_blocks = 10;
  params.block_size = block_size;
  params.block_table = &kTable;
  params.key = {static_cast<const std::byte*>(memory.data()), std::int64_t{block_size} * 4 * 320,
                4 * 320, 320, dtype};
  params.value = params.key;
  params.value.data += 192 * static_cast<std::int64_t>(size_of(dtype));
  return params;
}

class CudaTensorMaps : public testing::Test {
 protected:
  void SetUp() override {
    DIFFKV_NEED_GPU();
    if (current_gpu().capability() < 90) GTEST_SKIP() << "this GPU has no tensor copies";
    memory_ = std::make_unique<device::Memory>(backend(), 1 << 20);
  }

  AttendKernelParams with_pages_of(std::int32_t block_size, DType dtype = DType::kBF16) const {
    return packed(*memory_, block_size, dtype);
  }

  std::unique_ptr<device::Memory> memory_;
};

TEST_F(CudaTensorMaps, PagesOfWholeBoxes) {
  for (const std::int32_t block_size : {16, 32, 48, 64, 128}) {
    for (const DType dtype : {DType::kBF16, DType::kF16, DType::kE4M3, DType::kE5M2}) {
      const KvMaps maps = kv_maps(with_pages_of(block_size, dtype), kShape);
      EXPECT_TRUE(maps.usable) << block_size;
      EXPECT_EQ(maps.key.copies, 1);
      EXPECT_EQ(maps.value.copies, 1);
    }
  }
}

// As many keys as lie in a page; boxes that are not a whole group take a copy a slab.
TEST_F(CudaTensorMaps, BoxesOfGroups) {
  for (const auto& [block_size, keys] :
       {std::pair{16, 16}, {32, 32}, {48, 16}, {64, 64}, {96, 32}, {128, 64}}) {
    const KvMaps maps = kv_maps(with_pages_of(block_size), kGroupShape);
    EXPECT_TRUE(maps.usable) << block_size;
    EXPECT_EQ(maps.box_keys, keys) << block_size;
    EXPECT_EQ(maps.key.copies, keys == 64 ? 1 : 3);
    EXPECT_EQ(maps.value.copies, keys == 64 ? 1 : 2);
    EXPECT_EQ(maps.key.slab_step, 1);
    EXPECT_EQ(maps.key.column_step, 0);
  }
  EXPECT_FALSE(kv_maps(with_pages_of(24), kGroupShape).usable);
}

// Heads of a tile come with one copy, unless slabs are copied one by one.
TEST_F(CudaTensorMaps, BoxesOfHeads) {
  BoxShape shape = kShape;
  shape.heads = 4;
  const KvMaps whole = kv_maps(with_pages_of(16), shape);
  EXPECT_TRUE(whole.usable);
  EXPECT_EQ(whole.key.copies, 1);
  EXPECT_EQ(whole.key.heads_apart, 1);
  AttendKernelParams params = with_pages_of(16);
  params.head_size_qk = 96;
  const KvMaps slabs = kv_maps(params, shape);
  EXPECT_TRUE(slabs.usable);
  EXPECT_EQ(slabs.key.copies, kShape.key_slabs);
  EXPECT_EQ(slabs.key.heads_apart, 4);
  EXPECT_EQ(slabs.value.heads_apart, 1);
}

TEST_F(CudaTensorMaps, OtherPagesAreCopiedByRows) {
  for (const std::int32_t block_size : {1, 8, 24, 40}) {
    EXPECT_FALSE(kv_maps(with_pages_of(block_size), kShape).usable) << block_size;
  }
}

// A dense cache is one page; boxes may start at any token and end behind the last.
TEST_F(CudaTensorMaps, DenseCaches) {
  AttendKernelParams params = with_pages_of(1001);
  params.block_table = nullptr;
  params.num_blocks = 1;
  EXPECT_TRUE(kv_maps(params, kShape).usable);
}

TEST_F(CudaTensorMaps, HeadSizesThatEndWithinASlabTakeACopyASlab) {
  AttendKernelParams params = with_pages_of(16);
  params.head_size_qk = 96;
  params.head_size_v = 64;
  const KvMaps maps = kv_maps(params, kShape);
  EXPECT_TRUE(maps.usable);
  EXPECT_EQ(maps.key.copies, kShape.key_slabs);
  EXPECT_EQ(maps.key.column_step, 64);
  EXPECT_EQ(maps.key.slab_step, 0);
  EXPECT_EQ(maps.value.copies, 1);
}

TEST_F(CudaTensorMaps, StridesOfSingleEntriesMeanNothing) {
  AttendKernelParams params = with_pages_of(16);
  params.schedule.num_kv_heads = 1;
  params.key.stride_head = params.value.stride_head = 3;
  EXPECT_TRUE(kv_maps(params, kShape).usable);
}

TEST_F(CudaTensorMaps, StridesThatTheEngineDoesNotTake) {
  AttendKernelParams params = with_pages_of(16);
  params.key.stride_token += 4;  // 8 bytes
  EXPECT_FALSE(kv_maps(params, kShape).usable);
  params = with_pages_of(16);
  params.value.stride_block = -params.value.stride_block;
  EXPECT_FALSE(kv_maps(params, kShape).usable);
  params = with_pages_of(16);
  params.key.stride_block = std::int64_t{1} << 40;
  EXPECT_FALSE(kv_maps(params, kShape).usable);
}

}  // namespace
}  // namespace diffkv::cuda
