// Products of tiles of bf16 with sums in fp32, by the matrix unit of x86-64 (AMX_BF16): 16 times as
// many a cycle as AVX512_BF16's. For the same tiles of many rows, and in the same memory, as those
// (bf16_dot.h), which do all else.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/fetch.h"

namespace diffkv::cpu {

// Whether this build has them, this machine runs them and the system lets this process do so, which
// is asked once.
bool amx_available();

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

// As bf16_scores, but for num_keys rounded up to 16. `copies`: room for kBlockKeys keys, for those
// that do not lie a step apart in sixteens.
void amx_scores(std::int64_t width, const std::uint32_t* query, const std::byte* const* keys,
                std::uint16_t* copies, Fetch& fetch, std::int64_t num_keys,
                std::int64_t head_size_qk, float scale, float* scores);

// As bf16_accumulate. Pairs of weights past the last key's up to kBlockKeys / 2 are overwritten;
// `turned`: room for as many bf16 as kBlockKeys values have.
void amx_accumulate(std::int64_t width, std::uint32_t* weights, const std::uint32_t* values,
                    std::uint16_t* turned, Fetch& fetch, std::int64_t num_keys,
                    std::int64_t head_size_v, const float* keep, float* acc);

}  // namespace diffkv::cpu
