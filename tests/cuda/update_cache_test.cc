// update_cache on the device: the same bytes as the CPU's, in every slot.
#include <gtest/gtest.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "device/memory.h"
#include "diffkv/attention.h"
#include "tests/cuda/rig.h"

namespace diffkv::cuda {
namespace {

constexpr Device kDevice{DeviceType::kCuda, 0};
constexpr std::array kInputs = {DType::kF32, DType::kF16, DType::kBF16, DType::kE4M3, DType::kE5M2};
constexpr std::array kStored = kInputs;

struct Sizes {
  std::int64_t tokens;
  std::int64_t heads;
  std::int64_t size_qk;
  std::int64_t size_v;
  std::int64_t block_size;
};

// Random bits, NaN and infinities included; every third fp32 of an everyday magnitude.
std::vector<std::byte> random_bits(std::mt19937& rng, DType dtype, std::int64_t count) {
  std::vector<std::byte> bytes(static_cast<std::size_t>(count * size_of(dtype)));
  std::uniform_int_distribution<int> byte(0, 255);
  for (std::byte& b : bytes) b = static_cast<std::byte>(byte(rng));
  if (dtype == DType::kF32) {
    std::normal_distribution<float> normal(0.0F, 100.0F);
    auto* numbers = reinterpret_cast<float*>(bytes.data());
    for (std::int64_t i = 0; i < count; ++i) {
      if (i % 3 != 0) numbers[i] = normal(rng);
    }
  }
  return bytes;
}

// The cache of 8-aligned fp8 rows or of packed rows, after update_cache on both backends.
void expect_same_bytes(std::mt19937& rng, const Sizes& sizes, DType input, DType stored,
                       bool scaled, bool strided) {
  SCOPED_TRACE(std::string(to_string(input)) + " into " + std::string(to_string(stored)) +
               (scaled ? ", scaled" : "") + (strided ? ", strided" : ""));
  constexpr std::int64_t kBlocks = 40;
  KvCacheSpec spec;
  spec.block_size = sizes.block_size;
  spec.num_kv_heads = sizes.heads;
  spec.head_size_qk = sizes.size_qk;
  spec.head_size_v = sizes.size_v;
  spec.dtype = stored;
  spec.layout = strided ? KvCacheLayout::kHND : KvCacheLayout::kNHD;
  const std::int64_t cache_bytes = spec.page_stride_bytes() * kBlocks;

  // Key and value are slices of one fused row, with a gap where strided.
  const std::int64_t gap = strided ? 16 : 0;
  const std::int64_t row = sizes.heads * (sizes.size_qk + sizes.size_v) + gap;
  const std::vector<std::byte> fused = random_bits(rng, input, sizes.tokens * row);
  const auto view = [&](std::byte* base, std::int64_t first, std::int64_t size,
                        const Device& device) {
    ConstTensorView tensor(base + first * size_of(input), input, {sizes.tokens, sizes.heads, size},
                           device);
    tensor.strides[0] = row;
    return tensor;
  };
  std::vector<std::int64_t> slots(static_cast<std::size_t>(sizes.tokens));
  for (std::size_t i = 0; i < slots.size(); ++i) {
    slots[i] = static_cast<std::int64_t>(i * 7 % static_cast<std::size_t>(kBlocks) *
                                         static_cast<std::size_t>(sizes.block_size)) +
               static_cast<std::int64_t>(i) / kBlocks % sizes.block_size;
    if (i % 11 == 0) slots[i] = -1 - static_cast<std::int64_t>(i);
  }
  std::vector<float> scales(static_cast<std::size_t>(2 * sizes.heads));
  std::uniform_real_distribution<float> uniform(0.01F, 3.0F);
  for (float& x : scales) x = uniform(rng);

  std::vector<std::byte> expected(static_cast<std::size_t>(cache_bytes), std::byte{0x5a});
  const auto call = [&](const Backend& backend, std::byte* cache_data, std::byte* input_data,
                        std::int64_t* slot_data, float* scale_data, const Device& device) {
    KvCacheView cache = spec.view(cache_data, kBlocks, device);
    if (scaled) {
      cache.k_scale = ConstTensorView(scale_data, DType::kF32, {sizes.heads}, device);
      cache.v_scale = ConstTensorView(scale_data + sizes.heads, DType::kF32, {1}, device);
    }
    update_cache(backend, view(input_data, 0, sizes.size_qk, device),
                 view(input_data, sizes.heads * sizes.size_qk, sizes.size_v, device), cache,
                 ConstTensorView(slot_data, DType::kI64, {sizes.tokens}, device));
  };
  std::vector<std::byte> host_input = fused;
  call(find_backend("cpu"), expected.data(), host_input.data(), slots.data(), scales.data(), {});

  // On the device, slots past the pool are skipped as well.
  for (std::size_t i = 0; i < slots.size(); i += 11) {
    if (i % 2 == 0) slots[i] = kBlocks * sizes.block_size + static_cast<std::int64_t>(i);
  }
  const Backend& cuda = backend();
  const device::Memory cache(cuda, cache_bytes);
  const device::Memory inputs(cuda, static_cast<std::int64_t>(fused.size()));
  const device::Memory slot_mapping(cuda, 8 * sizes.tokens);
  const device::Memory scale_memory(cuda, 8 * sizes.heads);
  cache.fill(0x5a);
  inputs.upload(fused.data(), inputs.bytes());
  slot_mapping.upload(slots.data(), slot_mapping.bytes());
  scale_memory.upload(scales.data(), scale_memory.bytes());
  call(cuda, cache.data(), inputs.data(), reinterpret_cast<std::int64_t*>(slot_mapping.data()),
       reinterpret_cast<float*>(scale_memory.data()), kDevice);
  std::vector<std::byte> got(expected.size());
  cache.download(got.data(), cache_bytes);
  cuda.synchronize(kDevice, {});
  std::int64_t wrong = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    if (got[i] == expected[i]) continue;
    if (wrong++ == 0) {
      ADD_FAILURE() << "byte " << i << " is " << std::to_integer<int>(got[i]) << ", expected "
                    << std::to_integer<int>(expected[i]);
    }
  }
  EXPECT_EQ(wrong, 0) << "bytes of " << got.size();
}

TEST(CudaUpdateCache, BytesAreTheCpus) {
  DIFFKV_NEED_GPU();
  std::mt19937 rng(5);
  for (DType stored : kStored) {
    for (DType input : kInputs) {
      if (is_fp8(input) && input != stored) continue;
      for (const bool strided : {false, true}) {
        for (const bool scaled : {false, true}) {
          if (scaled && !is_fp8(stored)) continue;
          expect_same_bytes(rng, {300, 3, 192, 128, 16}, input, stored, scaled, strided);
          expect_same_bytes(rng, {37, 1, 72, 40, 7}, input, stored, scaled, strided);
        }
      }
      if (HasFailure()) return;
    }
  }
}

}  // namespace
}  // namespace diffkv::cuda
