// Attention of one worker's share: pieces of tiles to output rows or partials. One source for
// decode and prefill tiles; they differ in the number of vectors of rows that share a converted
// key.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <type_traits>

#include "core/layout.h"
#include "cpu/amx.h"
#include "cpu/bf16_dot.h"
#include "cpu/fetch.h"
#include "cpu/kernels.h"
#include "cpu/simd_targets.h"
#include "cpu/tile_base.h"
#include "plan/walk.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/attend.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// Highway's headers must come after foreach_target.h.
#include "cpu/narrow_tile-inl.h"
#include "cpu/row_products-inl.h"
#include "cpu/wide_tile-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace diffkv::cpu::HWY_NAMESPACE {
namespace {

// The rows of a piece's first block, of the tile's `head`-th KV head.
BlockRows first_rows(const AttendCall& call, const plan::Piece& piece, std::int32_t head) {
  BlockRows rows;
  KeySource(*call.args, piece.seq, piece.tile.kv_head + head)
      .locate(piece.tile.keys_at(piece.begin_block), rows);
  return rows;
}

// Walks the blocks of a piece, all KV heads of the tile at each: their rows of a key are neighbours
// in most caches. During the last block the first one of `next` is fetched, the share's next piece
// or null: windows and short sequences have little more.
template <class Tile>
void run_piece(const AttendCall& call, const plan::Piece& piece, const plan::Piece* next,
               std::byte* scratch) {
  const KvCacheView& cache = call.args->cache;
  const bool near = call.tuning.near_fetch;
  core::Layout take(scratch);
  const typename Tile::Block block = Tile::block(take, cache);
  std::array<std::optional<Tile>, kMostTileHeads> heads;
  const auto each = [&](auto&& fn) {
    for (std::int32_t h = 0; h < piece.tile.num_heads; ++h) fn(heads[h]);
  };
  each([&](std::optional<Tile>& tile) {
    tile.emplace(call, piece, &tile - heads.data(), block, take);
  });
  const auto find = [&](std::int32_t v) {
    if (v >= piece.end_block) return;
    heads[0]->find(v);
    for (std::int32_t h = 1; h < piece.tile.num_heads; ++h) heads[h]->find_as(*heads[0], v);
  };
  find(piece.begin_block);
  BlockRows first;  // of the next piece: the first head's rows, and those of the head at hand
  BlockRows own;
  for (std::int32_t v = piece.begin_block; v < piece.end_block; ++v) {
    const bool folds = v > piece.begin_block && (v - piece.begin_block) % kFoldBlocks == 0;
    find(v + 1);
    each([&](std::optional<Tile>& tile) {
      if (folds) tile->fold();
      Fetch fetch;
      if (v + 1 < piece.end_block) {
        fetch = fetch_of(near, cache, heads[0]->rows(v + 1), tile->rows(v + 1),
                         &tile - heads.data(), piece.tile.num_heads);
      } else if (next != nullptr && next->begin_block < next->end_block) {
        const auto head = static_cast<std::int32_t>(&tile - heads.data());
        if (head == 0) first = first_rows(call, *next, 0);
        own = head == 0 ? first : first_rows(call, *next, head);
        fetch = fetch_of(near, cache, first, own, head, piece.tile.num_heads);
      }
      tile->run_block(tile->rows(v), fetch);
    });
  }
  each([](std::optional<Tile>& tile) { tile->finish(); });
}

// Prefill: how tiles of more rows than a decode tile's multiply.
template <class Prefill, class Decode, template <int> class NarrowProducts>
void run_piece_of(const AttendCall& call, const plan::Piece& piece, const plan::Piece* next,
                  std::byte* scratch) {
  const std::int32_t rows = piece.tile.num_rows;
  auto* const fn = rows > kDecodeRows   ? run_piece<WideTile<Prefill>>
                   : rows > kNarrowRows ? run_piece<WideTile<Decode>>
                   : rows > 4           ? run_piece<NarrowTile<8, NarrowProducts<8>>>
                   : rows > 2           ? run_piece<NarrowTile<4, NarrowProducts<4>>>
                   : rows > 1           ? run_piece<NarrowTile<2, NarrowProducts<2>>>
                                        : run_piece<NarrowTile<1, NarrowProducts<1>>>;
  fn(call, piece, next, scratch);
}

#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
// Where pairs of bf16 are slow.
template <int kRows>
using NarrowMixedProducts =
    std::conditional_t<(kRows > 4), NarrowFp32Products<kRows>, NarrowBf16Products<kRows>>;

// How pieces run of what pairs of bf16 may multiply; `Prefill` and `Decode`: how tiles of many rows
// do.
template <class Prefill, class Decode>
auto* bf16_piece_runner(const AttendCall& call) {
  return bf16_dot_is_fast() || call.args->cache.key.dtype != DType::kBF16
             ? run_piece_of<Prefill, Decode, NarrowBf16Products>
             : run_piece_of<Prefill, Decode, NarrowMixedProducts>;
}
#endif

void run_share(const AttendCall& call, std::int32_t tile_class, std::int32_t worker,
               std::byte* scratch) {
  auto* fn = run_piece_of<Fp32Products, Fp32Products, NarrowFp32Products>;
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
  if (call.tuning.row_blocks) fn = run_piece_of<Fp32Products, Fp32RowProducts, NarrowFp32Products>;
  if (call.bf16_dot) {
    using Pairs = Bf16Products<false>;
    fn = !bf16_dot_is_fast()      ? bf16_piece_runner<Fp32Products, Fp32Products>(call)
         : call.tuning.row_blocks ? bf16_piece_runner<Pairs, Bf16RowProducts>(call)
                                  : bf16_piece_runner<Pairs, Pairs>(call);
  }
#ifdef DIFFKV_HAS_AMX
  std::optional<AmxRegisters> registers;
  if (call.amx) {
    registers.emplace();
    fn = call.bf16_dot ? bf16_piece_runner<Bf16Products<true>, Bf16Products<true>>(call)
                       : run_piece_of<SplitProducts, Fp32Products, NarrowFp32Products>;
  }
#endif
#endif
  std::optional<plan::Piece> piece;
  plan::for_each_piece(call.schedule, tile_class, worker, [&](const plan::Piece& next) {
    if (piece) fn(call, *piece, &next, scratch);
    piece = next;
  });
  if (piece) fn(call, *piece, nullptr, scratch);
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

std::int64_t attend_scratch_bytes(std::int64_t rows, std::int64_t tile_heads,
                                  std::int64_t head_size_qk, std::int64_t head_size_v) {
  // What the widest target takes: a group of 3 vectors of 16 lanes, head sizes padded to 32.
  constexpr std::int64_t kMostPadding = kBf16Padding - 8;
  constexpr std::int64_t kMostGroupWidth = 48;
  core::Layout wide(nullptr);
  WideBlock(wide, kMostGroupWidth, head_size_qk, head_size_v);
  core::Layout narrow(nullptr);
  NarrowBlock(narrow, kNarrowRows, head_size_v + kMostPadding);
  for (std::int64_t head = 0; head < tile_heads; ++head) {
    WideState(wide, rows, head_size_qk, head_size_v);
    NarrowState(narrow, kNarrowRows, head_size_qk + kMostPadding, head_size_v + kMostPadding);
  }
  return std::max(wide.bytes(), narrow.bytes());
}

}  // namespace diffkv::cpu
#endif  // HWY_ONCE
