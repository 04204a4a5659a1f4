// The CPU kernels behind run-time dispatch: plain pointers and sizes, one call per share of work.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/processor.h"
#include "diffkv/attention.h"
#include "diffkv/plan.h"
#include "plan/schedule.h"

namespace diffkv::cpu {

// Rows of a decode tile: a group of heads of one token, or a few tokens of a smaller group.
inline constexpr std::int32_t kDecodeRows = 16;
// Tiles of at most so many rows take the narrow path.
inline constexpr std::int32_t kNarrowRows = 8;
// KV heads of a decode tile at most. Its heads' rows of a key are neighbours in an NHD cache, and
// longer runs are read faster where memory limits (group 4 and 1), while a head's queries and sums
// leave the first-level cache whenever another's turn comes. Seen on Zen 4, two threads, 8 x 4096:
// group 16 4.43 ms with 1 head a tile, 4.60 with 4; group 8 5.8 with 1, 5.9 with 2, 6.3 with 4;
// group 4 10.4 with 1, 9.8 with 4, 10.8 with 16; group 1 9.1 with 1 and 4, 9.5 with 16. Where
// memory limits wide tiles, too, these have four: with a matrix unit (group 16 1.5 ms with 1, 1.3
// with 4, by 16 threads of a Xeon), and bf16 pairs on Zen 5: 2.75 ms with 1, 2.74 with 2, 2.55 with
// 4, contiguous keys 2.69, 2.65 and 2.37, fp8 2.60, 2.60 and 2.46; but with a window 1.37, 1.29 and
// 1.40, fp16 3.97 and 3.89, fp32 4.9 and 5.2.
inline constexpr std::int32_t kMostTileHeads = 4;
// Rows of a prefill tile: two register blocks of 3 vectors at 16 lanes, four at 8.
inline constexpr std::int32_t kPrefillRows = 96;
// Keys that are converted, scored and summed at a time.
inline constexpr std::int64_t kBlockKeys = 64;
// Bytes that a prefetch brings.
inline constexpr std::int64_t kCacheLine = 64;

// A sum is folded into an outer one after so many blocks: rounding grows with the number of terms,
// so a million keys are 128 terms of 128 blocks.
inline constexpr std::int32_t kFoldBlocks = 128;

// What all workers of one call of attend share.
struct AttendCall {
  const AttentionParams* params = nullptr;
  const AttendArgs* args = nullptr;
  plan::ScheduleView schedule;
  Tuning tuning;
  bool bf16_dot = false;  // pairs of bf16 may be multiplied
  bool amx = false;       // multiply in the matrix unit where many rows share keys
};

// Bytes of scratch that one thread needs for tiles of `rows` rows of each of `tile_heads` KV heads.
std::int64_t attend_scratch_bytes(std::int64_t rows, std::int64_t tile_heads,
                                  std::int64_t head_size_qk, std::int64_t head_size_v);

// Runs one worker's share of a tile class. `scratch` is 64-byte aligned.
void attend_share(const AttendCall& call, std::int32_t tile_class, std::int32_t worker,
                  std::byte* scratch);

// Merges and writes the cut tiles whose first piece is in that share, of each every `parts`-th KV
// head from `part` on.
void combine_share(const AttendCall& call, std::int32_t tile_class, std::int32_t worker,
                   std::int32_t part, std::int32_t parts, std::byte* scratch);

// Writes the tokens whose page falls to `part` of `parts` by page number.
struct UpdateCall {
  ConstTensorView key;
  ConstTensorView value;
  KvCacheView cache;
  ConstTensorView slot_mapping;
};
void update_cache_part(const UpdateCall& call, std::int64_t part, std::int64_t parts);

}  // namespace diffkv::cpu
