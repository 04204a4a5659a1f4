#include "cpu/amx.h"

#ifdef DIFFKV_HAS_AMX

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "cpu/amx_tiles.h"
#include "cpu/bf16_dot.h"
#include "cpu/bf16_vectors.h"

namespace diffkv::cpu {
namespace {

// 16 keys, a step apart.
struct KeyTile {
  const std::byte* first = nullptr;
  std::int64_t step = 0;  // bytes
};

KeyTile key_tile(const std::byte* const* keys, std::int64_t bytes, std::byte* copies) {
  const std::int64_t step = keys[1] - keys[0];
  bool even = true;
  for (std::int64_t i = 2; i < kTile; ++i) even = even && keys[i] - keys[i - 1] == step;
  if (even) return {keys[0], step};
  for (std::int64_t i = 0; i < kTile; ++i) {
    std::memcpy(copies + i * bytes, keys[i], static_cast<std::size_t>(bytes));
  }
  return {copies, bytes};
}

// The sums of kTiles x 16 keys by 16 rows of queries, `width` apart.
template <int kTiles>
void multiply_keys(const KeyTile* keys, std::int64_t head_size_qk, const std::uint32_t* query,
                   std::int64_t width, Fetch& fetch) {
  constexpr int kQuery = 4;
  constexpr int kKeys = 5;  // and 6
  for_each_sum<kTiles>([&]<int kSum>() { zero_tile<kSum>(); });
  for (std::int64_t i = 0; i < head_size_qk; i += kTileDims) {
    load_tile<kQuery>(query + i / 2 * width, 4 * width);
    for_each_sum<kTiles>([&]<int kSum>() {
      constexpr int kOperand = kKeys + kSum % 2;
      load_tile<kOperand>(keys[kSum].first + 2 * i, keys[kSum].step);
      multiply_tiles<kSum, kOperand, kQuery>();
      fetch_tile(fetch);
    });
  }
}

// Adds the products of 16 rows of weights by kTiles x 16 columns of pairs of values to the sums.
template <int kTiles>
void multiply_values(const std::uint32_t* weights, const std::uint32_t* values,
                     std::int64_t head_size_v, std::int64_t steps, Fetch& fetch) {
  constexpr int kWeights = 4;
  constexpr int kValues = 5;  // and 6
  for (std::int64_t i = 0; i < steps; ++i, values += kTile * head_size_v) {
    load_tile<kWeights>(weights + i * kTile, 4 * kMostPairs);
    for_each_sum<kTiles>([&]<int kSum>() {
      constexpr int kOperand = kValues + kSum % 2;
      load_tile<kOperand>(values + kSum * kTile, 4 * head_size_v);
      multiply_tiles<kSum, kWeights, kOperand>();
      fetch_tile(fetch);
    });
  }
}

bool has_instructions() {
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  constexpr unsigned kBf16 = 1U << 22;
  constexpr unsigned kTiles = 1U << 24;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kBf16) != 0 && (d & kTiles) != 0;
}

// Linux saves the registers only for processes that asked.
constexpr int kTileData = 18;  // XFEATURE_XTILEDATA

bool system_knows_registers() {
  constexpr int kSupported = 0x1021;  // ARCH_GET_XCOMP_SUPP
  std::uint64_t supported = 0;
  return syscall(SYS_arch_prctl, kSupported, &supported) == 0 && (supported >> kTileData & 1) != 0;
}

}  // namespace

bool amx_available() {
  static const bool available =
      bf16_dot_available() && (kEmulatesAmx || (has_instructions() && system_knows_registers()));
  return available;
}

bool amx_permitted() {
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  static const bool permitted =
      amx_available() &&
      (kEmulatesAmx || syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0);
  return permitted;
}

AmxRegisters::AmxRegisters() {
  struct alignas(64) Config {
    std::uint8_t palette = 1;
    std::uint8_t start_row = 0;
    std::uint8_t reserved[14] = {};
    std::uint16_t row_bytes[16] = {};
    std::uint8_t rows[16] = {};
  } config;
  static_assert(sizeof(Config) == 64);
  std::fill_n(config.row_bytes, 8, std::uint16_t{64});
  std::fill_n(config.rows, 8, std::uint8_t{kTile});
  configure_tiles(&config);
}

AmxRegisters::~AmxRegisters() { release_tiles(); }

DIFFKV_BF16_DOT void amx_scores(std::int64_t width, const std::uint32_t* query,
                                const std::byte* const* keys, std::uint16_t* copies, Fetch& fetch,
                                std::int64_t num_keys, std::int64_t head_size_qk, float scale,
                                float* scores) {
  const std::int64_t tiles = (num_keys + kTile - 1) / kTile;
  KeyTile tile[kMostSums];
  for (std::int64_t t = 0; t < tiles; ++t) {
    auto* room = reinterpret_cast<std::byte*>(copies + t * kTile * head_size_qk);
    tile[t] = key_tile(keys + t * kTile, 2 * head_size_qk, room);
  }
  with_sums(tiles, [&]<int kTiles>() {
    for (std::int64_t row = 0; row < width; row += kTile) {
      multiply_keys<kTiles>(tile, head_size_qk, query + row, width, fetch);
      store_sums<kTiles>(scores + row, width, kTile * width);
    }
  });
  scale_scores(num_keys * width, scale, scores);
}

DIFFKV_BF16_DOT void amx_weights(std::int64_t width, const float* p, std::int64_t num_keys,
                                 std::uint32_t* words) {
  const __m512i order = pair_indices(0, 16);
  for (std::int64_t row = 0; row < width; row += kTile) {
    for (std::int64_t k = 0; k < padded_pairs(num_keys); k += kTile) {
      __m512i x[kTile];
#pragma GCC unroll 16
      for (std::int64_t i = 0; i < kTile; ++i) {
        const WeightsOfPair pair(p + row, width, num_keys, 2 * (k + i));
        x[i] = _mm512_permutexvar_epi16(order, round_to_bf16(pair.first, pair.second));
      }
      turn_words(x, words + row * kMostPairs + k, kMostPairs);
    }
  }
}

void amx_accumulate(std::int64_t width, const std::uint32_t* weights, std::uint32_t* values,
                    Fetch& fetch, std::int64_t num_keys, std::int64_t head_size_v,
                    const float* keep, float* acc) {
  pad_values(num_keys, head_size_v, values);
  keep_rows(width, keep, head_size_v, acc);
  for_each_accumulated(head_size_v, width, [&]<int kTiles>(std::int64_t c, std::int64_t row) {
    float* const sums = acc + row * head_size_v + c;
    load_sums<kTiles>(sums, head_size_v, kTile);
    multiply_values<kTiles>(weights + row * kMostPairs, values + c, head_size_v,
                            padded_pairs(num_keys) / kTile, fetch);
    store_sums<kTiles>(sums, head_size_v, kTile);
  });
}

}  // namespace diffkv::cpu

#else  // no such instructions, or no system and compiler that are known to have them

namespace diffkv::cpu {

bool amx_available() { return false; }
bool amx_permitted() { return false; }

}  // namespace diffkv::cpu

#endif
