// The matrix unit's instructions by software, for builds that test what is made of them on machines
// that have none (DIFFKV_EMULATE_AMX).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace diffkv::cpu {

inline constexpr bool kEmulatesAmx = true;

inline void configure_tiles(const void* /*config*/) {}
inline void release_tiles() {}

struct EmulatedTile {
  std::uint32_t words[16][16];
};
inline thread_local EmulatedTile emulated_tiles[8];

template <int kRegister>
void load_tile(const void* from, std::int64_t stride_bytes) {
  const auto* row = static_cast<const std::byte*>(from);
  for (auto& words : emulated_tiles[kRegister].words) {
    std::memcpy(words, row, sizeof(words));
    row += stride_bytes;
  }
}
template <int kRegister>
void store_tile(void* to, std::int64_t stride_bytes) {
  auto* row = static_cast<std::byte*>(to);
  for (const auto& words : emulated_tiles[kRegister].words) {
    std::memcpy(row, words, sizeof(words));
    row += stride_bytes;
  }
}
template <int kRegister>
void zero_tile() {
  emulated_tiles[kRegister] = {};
}
// sums += a * b, where the products of 16 pairs are summed before they are added. Without the
// sanitizers, whose checks of each element would take minutes.
template <int kSums, int kA, int kB>
[[gnu::optimize("O3"), gnu::no_sanitize("address", "undefined")]] void multiply_tiles() {
  const EmulatedTile& a = emulated_tiles[kA];
  const EmulatedTile& b = emulated_tiles[kB];
  float first[16][16];
  float second[16][16];
  for (int pair = 0; pair < 16; ++pair) {
    for (int column = 0; column < 16; ++column) {
      first[pair][column] = __builtin_bit_cast(float, b.words[pair][column] << 16);
      second[pair][column] = __builtin_bit_cast(float, b.words[pair][column] & 0xffff0000U);
    }
  }
  for (int row = 0; row < 16; ++row) {
    float sums[16] = {};
    for (int pair = 0; pair < 16; ++pair) {
      const float x = __builtin_bit_cast(float, a.words[row][pair] << 16);
      const float y = __builtin_bit_cast(float, a.words[row][pair] & 0xffff0000U);
      for (int column = 0; column < 16; ++column) {
        sums[column] += x * first[pair][column] + y * second[pair][column];
      }
    }
    for (int column = 0; column < 16; ++column) {
      std::uint32_t& word = emulated_tiles[kSums].words[row][column];
      const float sum = __builtin_bit_cast(float, word) + sums[column];
      word = __builtin_bit_cast(std::uint32_t, sum);
    }
  }
}

}  // namespace diffkv::cpu
