// How the blocks of a cut tile find out when all its partials are there, and which of them merge
// it.
//
// Of a tile that begins in one block's share and ends in another's, all blocks but the last have
// nothing to do behind it, and end at about the same time. The last one mostly goes on with other
// tiles; unless these are many it has said by then that its partial is there. So the others merge
// the tile, and wait for each other if they divide its rows. Of tiles that are not divided, and of
// those whose blocks did not want to wait any longer, the block that was missing last merges all
// rows.
#pragma once

#include <cstdint>

#include "cuda/generic/ptx.cuh"
#include "cuda/generic/racecheck.h"
#include "cuda/generic/shared.cuh"
#include "cuda/generic/tile.h"
#include "cuda/params.h"
#include "plan/schedule.h"

namespace diffkv::cuda::mma {

// What warps merge of a tile at a time. A lane has kColumns neighbouring columns of a row.
template <class T>
struct MergeUnits {
  static constexpr int kColumns = 4;
  // Of a tile of so many parts and more a warp has one row, or columns of it, and its lanes the
  // parts, so many each at a time.
  static constexpr int kManyParts = 8;
  static constexpr int kRowLanes = T::kHeadSizeV / kColumns;
  static constexpr int kMostLanes =
      (kRowLanes & -kRowLanes) < kWarp ? kRowLanes & -kRowLanes : kWarp;
  // Of fewer it has several rows, of so many lanes each.
  static constexpr int kFewLanes = kWarp / kColumns;
  static constexpr int kFewRows = kWarp / kFewLanes;

  static __device__ std::int32_t rows_of(const CutPiece& piece) {
    return T::kHeads * piece.num_rows;
  }
};

template <class T>
class Meeting {
 public:
  using Grid = typename T::Grid;

  __device__ Meeting(const AttendKernelParams& params, const Shared<T>& shared,
                     std::int32_t tile_class)
      : params_(params),
        shared_(shared),
        tile_class_(tile_class),
        lane_(static_cast<std::int32_t>(threadIdx.x) % kWarp) {}

  // The warp that describes the pieces, when it has described all: how many parts their tiles have,
  // which slots these are in, and which is this block's.
  __device__ void count_parts() const {
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      CutPiece& piece = shared_.cut_pieces[i];
      std::int32_t all = 0;
      std::int32_t before = 0;
      bool goes_on = false;  // the block of the last part, behind the tile
      bool inside = piece.blocks > 0;
#pragma unroll 1
      for (std::int32_t first = 0; __all_sync(kAllLanes, inside); first += kRounds * kWarp) {
        std::int32_t slots[kRounds];
        bool more[kRounds];
#pragma unroll
        for (int r = 0; r < kRounds; ++r) {
          slots[r] = slot_of_share(piece, first + r * kWarp + lane_, inside, more[r]);
        }
#pragma unroll
        for (int r = 0; r < kRounds; ++r) {
          const std::uint32_t there = __ballot_sync(kAllLanes, slots[r] >= 0);
          const std::int32_t index = all + __popc(there & ((1U << lane_) - 1U));
          if (slots[r] >= 0) {
            shared_.part_slots[i * kMostParts + index] =
                static_cast<std::uint16_t>(slots[r] - first_slot());
          }
          all += __popc(there);
          const std::uint32_t going_on = __ballot_sync(kAllLanes, more[r]);
          if (there != 0) goes_on = (going_on >> ptx::log2(there) & 1U) != 0;
          before += __popc(__ballot_sync(kAllLanes, slots[r] >= 0 && slots[r] < piece.slot));
        }
      }
      if (lane_ == 0) {
        piece.parts = all;
        piece.part = before;
        piece.mergers = goes_on && all > 1 ? all - 1 : all;
        piece.waits = waits_for_others(piece);
        piece.lanes = all >= Units::kManyParts ? lanes_for(piece) : 0;
      }
      __syncwarp();
    }
    if (arrives(lane_)) ptx::arrive(shared_.counted);
  }

  // The warp that described the pieces, when it has counted: says of each partial that it is there
  // when the consumers have written it, and finds out who merges its tile. They meanwhile go on, or
  // get ready to merge.
  __device__ void run() const {
    if (!has_cut_pieces()) return;
    if (lane_ == 0) {
#pragma unroll 1
      for (int i = 0; i < 2; ++i) {
        CutPiece& piece = shared_.cut_pieces[i];
        if (piece.blocks == 0) continue;
        ptx::Barrier* written = shared_.written + i;
        if (only_own_is_missing(piece, written)) piece.merger = CutPiece::kAllBlocks;
        ptx::wait(written, 0);
        if (piece.merger == CutPiece::kNobody) say_written(piece);
      }
#pragma unroll 1
      for (int i = 0; i < 2; ++i) await_others(shared_.cut_pieces[i]);
    }
    __syncwarp();
    say_met();
    if (lane_ == 0) {
#pragma unroll 1
      for (int i = 0; i < 2; ++i) leave(shared_.cut_pieces[i]);
    }
  }

  // A consumer warp: until this block knows who merges its tiles.
  static __device__ void wait(const Shared<T>& shared) {
    if constexpr (kForRacecheck) {
      ptx::wait(&shared.racecheck->met, 0);
    } else {
      ptx::sync(kMetBarrier, kMeeting);
    }
  }

 private:
  using Units = MergeUnits<T>;
  static constexpr int kRounds = 2;  // shares of a lane that are looked at together
  static constexpr int kMeeting = (Grid::kConsumers + 1) * kWarp;

  // A tile's word of PlanTables::arrivals: blocks of keys whose partials are there; workers that
  // did not want to wait for the others any longer; workers that need the word no more.
  using Word = unsigned long long;
  static constexpr Word kOneTired = 1ULL << 32;
  static constexpr Word kOneGone = 1ULL << 48;
  static __device__ std::int32_t blocks_of(Word word) { return static_cast<std::int32_t>(word); }
  static __device__ bool any_tired(Word word) { return (word >> 32 & 0xffffU) != 0; }
  static __device__ std::int32_t gone_of(Word word) {
    return static_cast<std::int32_t>(word >> 48);
  }
  // Clock cycles, some 50 us, or as long as it has worked: a block waits no longer for the others,
  // which may need its SM to start.
  static constexpr long long kPatience = 100'000;

  // Whether this block, or it too, merges the tile if blocks divide it.
  static __device__ bool merges(const CutPiece& piece) { return piece.part < piece.mergers; }

  // Whether all partials but this one are there already, of a tile that this block merges alone. It
  // need not say that its own is, then. Looks until it is `written`.
  __device__ bool only_own_is_missing(const CutPiece& piece, ptx::Barrier* written) const {
    if (!piece.waits || piece.mergers != 1 || !merges(piece)) return false;
    while (blocks_of(ptx::look_at(word_of(piece))) + piece.blocks < piece.blocks_of_tile) {
      if (ptx::has_ended(written, 0)) return false;
      ptx::pause();
    }
    return true;
  }

  // Says that this block's partial is there. Whose it is that was missing does also the work of
  // those who left, and so that of all; who still waits does its own as well, to the same bits.
  __device__ void say_written(CutPiece& piece) const {
    const bool leaves_merge = piece.waits && !merges(piece);
    const Word before = ptx::add_and_meet(
        word_of(piece), static_cast<Word>(piece.blocks) + (leaves_merge ? kOneGone : 0));
    if (blocks_of(before) + piece.blocks >= piece.blocks_of_tile) {
      if (!piece.waits || any_tired(before)) {
        piece.merger = CutPiece::kThisBlock;
      } else if (!leaves_merge) {
        piece.merger = CutPiece::kAllBlocks;
      }
    }
    if (leaves_merge && gone_of(before) + 1 == piece.parts) *word_of(piece) = 0;
  }

  // Of a tile that blocks divide: until all its partials are there, or too long.
  __device__ void await_others(CutPiece& piece) const {
    if (piece.blocks == 0 || !piece.waits || !merges(piece)) return;
    Word* word = word_of(piece);
    const long long begin = clock64();
    const long long patience = max(kPatience, begin - *shared_.began);
    while (piece.merger == CutPiece::kNobody) {
      Word now = ptx::look_at(word);
      const bool tired = blocks_of(now) < piece.blocks_of_tile && clock64() - begin > patience;
      if (tired) now = ptx::add_and_meet(word, kOneTired);
      if (blocks_of(now) >= piece.blocks_of_tile) {
        piece.merger = CutPiece::kAllBlocks;
      } else if (tired) {
        return;
      }
    }
  }

  // This block needs the tile's word no more. The last of a tile's blocks clears it for the next
  // attend.
  __device__ void leave(const CutPiece& piece) const {
    if (piece.blocks == 0) return;
    bool last = piece.merger == CutPiece::kThisBlock;
    if (piece.waits) {
      if (!merges(piece)) return;
      last = gone_of(atomicAdd(word_of(piece), kOneGone)) + 1 == piece.parts;
    }
    if (last) *word_of(piece) = 0;
  }

  __device__ void say_met() const {
    if constexpr (kForRacecheck) {
      ptx::arrive(&shared_.racecheck->met);
    } else {
      ptx::arrive_at(kMetBarrier, kMeeting);
    }
  }

  __device__ bool has_cut_pieces() const {
    return shared_.cut_pieces[0].blocks > 0 || shared_.cut_pieces[1].blocks > 0;
  }
  __device__ Word* word_of(const CutPiece& piece) const {
    return reinterpret_cast<Word*>(params_.schedule.tables.arrivals[tile_class_] +
                                   piece.first_worker);
  }

  // Whether the blocks of a tile wait for each other and divide its rows. Those of a taller tile,
  // of prefill, end at different times unless there are many.
  static __device__ bool waits_for_others(const CutPiece& piece) {
    if (Grid::kRows > 64) return piece.parts >= kWarp;
    return piece.parts >= Units::kManyParts ||
           Units::rows_of(piece) > Grid::kConsumers * Units::kFewRows;
  }

  // Lanes that have a row's columns between them, or some of them, where each of a warp's groups of
  // so many has some parts: the fewest that do not make more units than the warps that merge, and
  // the most where there are more anyway.
  static __device__ std::int32_t lanes_for(const CutPiece& piece) {
    const std::int32_t warps = (piece.waits ? piece.mergers : 1) * Grid::kConsumers;
    std::int32_t lanes = Units::kMostLanes;
    while (lanes > 2 && 2 * Units::rows_of(piece) * Units::kRowLanes <= warps * lanes) lanes /= 2;
    return lanes;
  }

  // The partial of the share that is `share` after the tile's first, or -1: the first has one, each
  // that starts inside the tile has another, unless it is empty. `inside`: whether there may be
  // more behind it. `goes_on`: whether the share goes on behind the tile if that ends in it; by
  // what all blocks know alike, and so taken for true where only empty sequences follow.
  __device__ std::int32_t slot_of_share(const CutPiece& piece, std::int32_t share, bool& inside,
                                        bool& goes_on) const {
    const plan::ScheduleView& schedule = params_.schedule;
    const std::int32_t lanes = schedule.limits.classes[tile_class_].head_lanes;
    const plan::WorkStart* starts = schedule.tables.starts[tile_class_];
    const std::int32_t first_share = plan::divide(piece.first_worker, lanes);
    const std::int32_t shares = plan::divide(schedule.limits.classes[tile_class_].workers, lanes);
    const std::int32_t at = min(first_share + share, shares - 1);
    const plan::WorkStart start = starts[at];
    const plan::WorkStart stop = starts[at + 1];
    const bool first = share == 0;
    const bool at_next_tile = plan::same_tile(stop, {piece.seq, piece.line_index + 1, 0}) ||
                              plan::same_tile(stop, {piece.seq + 1, 0, 0});
    goes_on = stop.block > 0 || !at_next_tile;
    inside = first || (first_share + share < shares &&
                       plan::starts_inside(start, {piece.seq, piece.line_index, 0}));
    return first || (inside && plan::before(start, stop)) ? slot_of(piece, share) : -1;
  }
  __device__ std::int32_t first_slot() const {
    return params_.schedule.tables.first_slot[tile_class_];
  }
  __device__ std::int32_t slot_of(const CutPiece& piece, std::int32_t share) const {
    const std::int32_t lanes = params_.schedule.limits.classes[tile_class_].head_lanes;
    return first_slot() + 2 * (piece.first_worker + share * lanes) + (share == 0 ? 1 : 0);
  }

  const AttendKernelParams& params_;
  const Shared<T>& shared_;
  const std::int32_t tile_class_;
  const std::int32_t lane_;
};

}  // namespace diffkv::cuda::mma
