// Products of tiles of bf16 with sums in fp32, by the matrix unit of x86-64 (AMX_BF16): 16 times as
// many a cycle as AVX512_BF16's. For the same tiles of many rows as those (bf16_dot.h), with
// queries, keys and values as they have them; weights and sums are stored row by row.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/fetch.h"

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#define DIFFKV_HAS_AMX
#endif

namespace diffkv::cpu {

// Whether this build has them, and this machine and system run them.
bool amx_available();

// Whether the system lets this process use the registers. Asked once, by the first call: from then
// on every thread's registers are 8 KB larger, and so must its stack for signals be.
bool amx_permitted();

// Whether keys and values of these sizes fill whole tiles.
constexpr bool amx_multiplies(std::int64_t head_size_qk, std::int64_t head_size_v) {
  return head_size_qk % 32 == 0 && head_size_v % 16 == 0;
}

// The matrix unit's registers, for the thread that has one of these.
class AmxRegisters {
 public:
  AmxRegisters();
  ~AmxRegisters();
  AmxRegisters(const AmxRegisters&) = delete;
  AmxRegisters& operator=(const AmxRegisters&) = delete;
};

// As bf16_scores; scores of keys from num_keys up to the next multiple of 16 are written, too, and
// mean nothing. `copies`: room for kBlockKeys keys, for those that do not lie a step apart in
// sixteens.
void amx_scores(std::int64_t width, const std::uint32_t* query, const std::byte* const* keys,
                std::uint16_t* copies, Fetch& fetch, std::int64_t num_keys,
                std::int64_t head_size_qk, float scale, float* scores);

// words[row, pair] = (p[key, row], p[key + 1, row]), rounded to nearest even, [width, kBlockKeys /
// 2]; zeros past the last key up to a multiple of 16 pairs. p: [num_keys, width].
void amx_weights(std::int64_t width, const float* p, std::int64_t num_keys, std::uint32_t* words);

// acc[row, c] = acc[row, c] * keep[row] + sum over keys of weight[row, key] * value[key, c], of
// weights that amx_weights made and pairs of values as bf16_values makes them. Pairs of values past
// the last key's up to a multiple of 16 pairs are overwritten.
void amx_accumulate(std::int64_t width, const std::uint32_t* weights, std::uint32_t* values,
                    Fetch& fetch, std::int64_t num_keys, std::int64_t head_size_v,
                    const float* keep, float* acc);

}  // namespace diffkv::cpu
