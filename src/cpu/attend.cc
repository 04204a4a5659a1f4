// Attention of one worker's share: pieces of tiles to output rows or partials. One source for
// decode and prefill tiles; they differ in the number of vectors of rows that share a converted
// key.
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "core/layout.h"
#include "cpu/kernels.h"
#include "cpu/simd_targets.h"
#include "cpu/tile_base.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/attend.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// Highway's headers must come after foreach_target.h.
#include "cpu/narrow_tile-inl.h"
#include "cpu/wide_tile-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace diffkv::cpu::HWY_NAMESPACE {
namespace {

void run_share(const AttendCall& call, std::int32_t tile_class, std::int32_t worker,
               std::byte* scratch) {
  plan::for_each_piece(call.schedule, tile_class, worker, [&](const plan::Piece& piece) {
    const std::int32_t rows = piece.tile.num_rows;
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
    if (call.bf16_dot) {
      WideTile<Bf16Products>(call, piece, scratch).run();
      return;
    }
#endif
    if (rows > kNarrowRows) {
      WideTile<Fp32Products>(call, piece, scratch).run();
    } else if (rows > 4) {
      NarrowTile<8>(call, piece, core::Layout(scratch)).run();
    } else if (rows > 2) {
      NarrowTile<4>(call, piece, core::Layout(scratch)).run();
    } else if (rows > 1) {
      NarrowTile<2>(call, piece, core::Layout(scratch)).run();
    } else {
      NarrowTile<1>(call, piece, core::Layout(scratch)).run();
    }
  });
}

}  // namespace
// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace diffkv::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace diffkv::cpu {

HWY_EXPORT(run_share);

void attend_share(const AttendCall& call, std::int32_t tile_class, std::int32_t worker,
                  std::byte* scratch) {
  HWY_DYNAMIC_DISPATCH(run_share)(call, tile_class, worker, scratch);
}

std::int64_t attend_scratch_bytes(std::int64_t rows, std::int64_t head_size_qk,
                                  std::int64_t head_size_v) {
  // What the widest target takes: a group of 3 vectors of 16 lanes, head sizes padded to 16.
  constexpr std::int64_t kMostGroupWidth = 48;
  core::Layout wide(nullptr);
  WideScratch(wide, rows, kMostGroupWidth, head_size_qk, head_size_v);
  core::Layout narrow(nullptr);
  NarrowScratch(narrow, kNarrowRows, head_size_qk + 8, head_size_v + 8);
  return std::max(wide.bytes(), narrow.bytes());
}

}  // namespace diffkv::cpu
#endif  // HWY_ONCE
