// What the CPU's cache update writes, on every SIMD target.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "cpu/targets.h"
#include "diffkv/layer.h"

namespace diffkv {
namespace {

// fp16 signalling NaNs become the same quiet ones on every target.
TEST(CpuUpdateCache, BytesOfSignallingNans) {
  std::vector<std::uint16_t> from(8, 0x7c01);
  std::vector<float> cache(16);
  const KvCacheSpec spec{.block_size = 1,
                         .num_kv_heads = 1,
                         .head_size_qk = 8,
                         .head_size_v = 8,
                         .dtype = DType::kF32};
  const std::vector<std::int64_t> slots{0};
  const ConstTensorView rows(from.data(), DType::kF16, {1, 1, 8});
  for (const std::string& target : cpu::supported_targets()) {
    cpu::set_target(target);
    std::fill(cache.begin(), cache.end(), 0.0F);
    update_cache(find_backend("cpu"), rows, rows, spec.view(cache.data(), 1),
                 view_of(slots.data(), {1}));
    for (float x : cache) EXPECT_EQ(core::bits_of(x), 0x7fc02000U) << target;
  }
  cpu::set_target("");
}

}  // namespace
}  // namespace diffkv
