// A block's shared memory: its parts, and the rings that producer and consumers walk it in.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/generic/ptx.cuh"
#include "cuda/generic/racecheck.h"
#include "cuda/generic/tile.h"

namespace diffkv::cuda::mma {

// Barriers of warps, by number; 0 is __syncthreads'.
enum NamedBarrier : int {
  kConsumerBarrier = 1,                // all consumers
  kTogetherBarrier,                    // and the next one, of a warpgroup each
  kMetBarrier = kTogetherBarrier + 2,  // consumers, and the describer: others' partials are there
  kRingsBarrier,  // producers, and a warp of consumers: the block's shared memory is ready for
                  // copies
};

// Arrivals at an mbarrier that a warp makes for all its lanes, behind a __syncwarp, and whether a
// lane makes one.
inline constexpr int kWarpArrivals = kForRacecheck ? kWarp : 1;
__device__ inline bool arrives(int lane) { return kForRacecheck || lane == 0; }

// A block's shared memory, as pointers.
template <class T>
struct Shared {
  using Piece = PieceInfo<T::Grid::kRows, T::kHeads>;

  __device__ Shared(std::byte* base, Depth depth) {
    const SharedLayout<T> layout(depth);
    stages = base;
    converted = base + layout.converted;
    queries = base + layout.queries;
    merge = reinterpret_cast<float*>(base + layout.merge);
    pieces = reinterpret_cast<Piece*>(base + layout.pieces);
    row_max = reinterpret_cast<float*>(base + layout.row_max);
    row_sum = reinterpret_cast<float*>(base + layout.row_sum);
    stage_infos = reinterpret_cast<StageInfo*>(base + layout.stage_infos);
    auto* barriers = reinterpret_cast<ptx::Barrier*>(base + layout.barriers);
    stage_full = barriers;
    stage_empty = stage_full + SharedLayout<T>::kSlices;
    query_full = stage_empty + SharedLayout<T>::kSlices;
    query_empty = query_full + kMaxQueryBuffers;
    described = query_empty + kMaxQueryBuffers;
    counted = reinterpret_cast<ptx::Barrier*>(base + layout.counted);
    written = counted + 1;
    racecheck = kForRacecheck ? reinterpret_cast<RacecheckMemory*>(written + 2) : nullptr;
    cut_pieces = reinterpret_cast<CutPiece*>(base + layout.cut_pieces);
    part_slots = reinterpret_cast<std::uint16_t*>(base + layout.part_slots);
    began = reinterpret_cast<long long*>(base + layout.began);
  }

  std::byte* stages;       // [stages, boxes of a block, kGroupBytes], see chunk_at()
  std::byte* converted;    // [kKeyWarps, Operands::kGroupBytes], if T::kConverts
  std::byte* queries;      // [query buffers, kRows, kQueryPitch]
  float* merge;            // [consumers, kKeyWarps - 1, kMergeTiles, lanes, 4], see Finish::merge
  Piece* pieces;           // [query buffers]
  float* row_max;          // [kKeyWarps, kRows]
  float* row_sum;          // [kKeyWarps, kRows]
  StageInfo* stage_infos;  // [stages, kKeyWarps], as the barriers of stages
  // Full: the producers' copies have landed. Empty: the consumers are done with them.
  ptx::Barrier* stage_full;
  ptx::Barrier* stage_empty;
  ptx::Barrier* query_full;
  ptx::Barrier* query_empty;
  ptx::Barrier* described;     // a piece, with what its end needs
  ptx::Barrier* counted;       // the parts of the cut pieces' tiles
  ptx::Barrier* written;       // [2]: the partials of the cut pieces
  RacecheckMemory* racecheck;  // null in all other builds
  CutPiece* cut_pieces;        // [2]: one that the share starts with, one that it ends with
  // [2, kMostParts]: of those pieces' tiles, the slots of the parts, counted from the class's
  // first.
  std::uint16_t* part_slots;
  long long* began;  // the clock when the block started
};

// A place in a ring, and the parity of the round it is in.
struct RingPosition {
  std::int32_t index = 0;
  std::uint32_t parity = 0;

  __device__ void advance(std::int32_t size) {
    if (++index == size) {
      index = 0;
      parity ^= 1U;
    }
  }
};

}  // namespace diffkv::cuda::mma
