// Cut tiles are merged by the blocks that had their parts, in an order that depends on the plan
// alone: which blocks, and when, is said in meeting.cuh. Another kernel would wait for the slowest
// block, and then for its own instructions and for what says which tiles are cut. A merge runs once
// or twice a block, so what costs is one after another: its instructions, most of which come from
// memory, and one round of loads.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "core/softmax.h"
#include "cuda/generic/meeting.cuh"
#include "cuda/generic/ptx.cuh"
#include "cuda/generic/scores.cuh"
#include "cuda/generic/shared.cuh"
#include "cuda/generic/tile.h"
#include "cuda/merged_row.cuh"
#include "cuda/params.h"
#include "cuda/warp.cuh"
#include "plan/schedule.h"

namespace diffkv::cuda::mma {

template <class T>
class TileMerge {
 public:
  using Grid = typename T::Grid;

  __device__ TileMerge(const AttendKernelParams& params, const Shared<T>& shared,
                       std::int32_t tile_class)
      : params_(params),
        shared_(shared),
        tile_class_(tile_class),
        lane_(static_cast<std::int32_t>(threadIdx.x) % kWarp),
        warp_(static_cast<std::int32_t>(threadIdx.x) / kWarp) {}

  // All consumer warps, when they have written everything. Also, before, the warp that described
  // the pieces, which `rehearses`: it goes through the instructions that will merge, so that they
  // need not come from memory when everything waits for them, but reads no global memory and writes
  // nothing.
  __device__ void run(bool rehearses) const {
    if (!rehearses) ptx::wait(shared_.counted, 0);
    bool met = rehearses;
    // The last one first: mostly the other is left to others, which is known then.
#pragma unroll 1
    for (int i = 1; i >= 0; --i) {
      const CutPiece& piece = shared_.cut_pieces[i];
      if (piece.blocks == 0) continue;
      const Parts parts(*this, piece, i, rehearses);
      if (piece.lanes > 0) {
        merge(parts, ManyParts(parts), met);
      } else {
        merge(parts, FewParts(parts), met);
      }
    }
  }

 private:
  using Units = MergeUnits<T>;
  static constexpr int kColumns = Units::kColumns;
  static constexpr int kManyParts = Units::kManyParts;

  // What a block merges of a tile, of which it got ready as much as it has if all wait for each
  // other.
  enum class Turn { kNone, kAsGuessed, kAll };

  // Waits, the first time, until this block knows who merges its tiles.
  __device__ Turn turn_of(const CutPiece& piece, bool& met) const {
    if (!met) Meeting<T>::wait(shared_);
    met = true;
    const auto merger = piece.known_merger();
    if (merger == CutPiece::kNobody) return Turn::kNone;
    // Who merges a tile that is not waited for has guessed that it has all.
    return merger == CutPiece::kThisBlock && piece.waits ? Turn::kAll : Turn::kAsGuessed;
  }

  // What both kinds of tiles need. Who rehearses has no parts, and reads shared memory.
  struct Parts {
    __device__ Parts(const TileMerge& owner, const CutPiece& cut, int list, bool rehearsal)
        : merge(owner),
          piece(cut),
          count(rehearsal ? 0 : cut.parts),
          rehearses(rehearsal),
          slots_(owner.shared_.part_slots + list * kMostParts) {
      const detail::PlanTables& tables = merge.params_.schedule.tables;
      acc_ = rehearses ? reinterpret_cast<const std::byte*>(merge.shared_.part_slots)
                       : reinterpret_cast<const std::byte*>(tables.partial_acc);
      states_ = rehearses ? reinterpret_cast<const core::SoftmaxState*>(merge.shared_.part_slots)
                          : tables.partial_state;
      last_column_ = rehearses ? 0 : merge.params_.head_size_v - kColumns;
      row_bytes_ = static_cast<std::uint32_t>(tables.partial_stride * sizeof(float));
    }

    // Of a row of the tile: its row of the class's first slot.
    __device__ std::int32_t row_of_class(const plan::Tile::Row& place) const {
      const plan::ScheduleView& schedule = merge.params_.schedule;
      const std::int32_t slot = schedule.tables.first_slot[merge.tile_class_];
      return static_cast<std::int32_t>(
          plan::partial_row(schedule, merge.tile_class_, slot, place.row, place.head));
    }
    // The row of the partials that holds it in a part, and in the last one if there is no such.
    __device__ std::int32_t row_of_part(std::int32_t row_of_class, std::int32_t part) const {
      if (rehearses) return 0;
      return row_of_class + slots_[min(part, count - 1)] * (T::kHeads * T::kHeadRows);
    }
    // Of such a row. All are loaded before one is looked at, and no load has a condition: of those
    // that have, the compiler moves the results one by one, waiting for each.
    __device__ const core::SoftmaxState& state_at(std::int32_t row) const { return states_[row]; }
    // Columns that are not there are read from others, and not written.
    __device__ const float4& columns_at(std::int32_t row, std::int32_t column) const {
      return *reinterpret_cast<const float4*>(acc_ + std::int64_t{min(column, last_column_)} * 4 +
                                              std::uint64_t{static_cast<std::uint32_t>(row)} *
                                                  row_bytes_);
    }
    // What was loaded for a part, nothing if it is not there.
    __device__ core::SoftmaxState if_there(const core::SoftmaxState& state,
                                           std::int32_t part) const {
      return part < count ? state : core::SoftmaxState();
    }

    const TileMerge& merge;
    const CutPiece& piece;
    const std::int32_t count;
    const bool rehearses;

   private:
    const std::uint16_t* const slots_;
    const std::byte* acc_;
    const core::SoftmaxState* states_;
    std::int32_t last_column_;
    std::uint32_t row_bytes_;
  };

  // What this block merges of a tile. Each warp has a unit of `work` at a time, and gets ready for
  // it while the block does not know yet whether the partials are there.
  template <class Work>
  __device__ void merge(const Parts& parts, Work&& work, bool& met) const {
    const CutPiece& piece = parts.piece;
    if (!parts.rehearses && met && piece.known_merger() == CutPiece::kNobody) return;
    const std::int32_t warp = parts.rehearses ? 0 : warp_;
    const bool shares = !parts.rehearses && piece.waits;
    std::int32_t unit = (shares ? piece.part * Grid::kConsumers : 0) + warp;
    std::int32_t step = (shares ? piece.mergers : 1) * Grid::kConsumers;
    bool known = parts.rehearses;
#pragma unroll 1
    for (;;) {
      work.prepare(unit);
      if (!known) {
        known = true;
        const Turn turn = turn_of(piece, met);
        if (turn == Turn::kNone) return;
        if (turn == Turn::kAll) {
          unit = warp;
          step = Grid::kConsumers;
        }
        if (unit >= work.units()) return;
        if (turn == Turn::kAll) continue;
      }
      work.finish();
      unit += step;
      if (parts.rehearses || unit >= work.units()) return;
    }
  }

  // A tile of so many parts that the lanes of a warp have some of one row each, and of its columns.
  class ManyParts {
   public:
    __device__ explicit ManyParts(const Parts& parts)
        : parts_(parts),
          lanes_(parts.rehearses ? Units::kMostLanes / 2 : parts.piece.lanes),
          doublings_(ptx::log2(lanes_)),
          groups_(kWarp >> doublings_),
          group_(parts.merge.lane_ >> doublings_) {}

    __device__ std::int32_t units() const {
      return Units::rows_of(parts_.piece) * (kRowLanes >> doublings_);
    }

    __device__ void prepare(std::int32_t unit) {
      const std::int32_t first = min(unit, units() - 1) * lanes_;  // of all rows' lanes
      const std::int32_t row = first / kRowLanes;
      column_ = (first % kRowLanes + (parts_.merge.lane_ & (lanes_ - 1))) * kColumns;
      row_ = plan::Tile::row_of(T::kHeads, parts_.piece.num_rows, row);
      writes_ = !parts_.rehearses && unit < units() && group_ == 0;
      row_of_class_ = parts_.row_of_class(row_);
      find_rows(0);
    }

    __device__ void finish() {
      MergedRow out;
      core::SoftmaxState state;  // the sum is of this group's parts
      float4 acc[1] = {};
#pragma unroll 1
      for (std::int32_t first = 0;;) {
        core::SoftmaxState own[kManyParts];
        float4 loaded[kManyParts];
#pragma unroll
        for (int j = 0; j < kManyParts; ++j) own[j] = parts_.state_at(rows_[j]);
#pragma unroll
        for (int j = 0; j < kManyParts; ++j) loaded[j] = parts_.columns_at(rows_[j], column_);
        // While they are on their way.
        if (first == 0) out = parts_.merge.row_out(parts_.piece, row_, writes_);
        const float before = state.max;
#pragma unroll
        for (int j = 0; j < kManyParts; ++j) {
          own[j] = parts_.if_there(own[j], first + j * groups_ + group_);
          state.max = fmaxf(state.max, own[j].max);
        }
        state.max = max_of_warp(state.max);
        const float keep = exp_difference(before, state.max);
        state.sum = scaled_sum(state, keep);
        scale(acc[0], keep);
#pragma unroll
        for (int j = 0; j < kManyParts; ++j) {
          const float add = exp_difference(own[j].max, state.max);
          state.sum += scaled_sum(own[j], add);
          if (first + j * groups_ + group_ < parts_.count) add_scaled(acc[0], add, loaded[j]);
        }
        first += kManyParts * groups_;
        if (first >= parts_.count) break;
        find_rows(first);
      }
#pragma unroll 1
      for (std::int32_t lanes = lanes_; lanes < kWarp; lanes *= 2) {
        state.sum += __shfl_xor_sync(kAllLanes, state.sum, lanes);
        acc[0].x += __shfl_xor_sync(kAllLanes, acc[0].x, lanes);
        acc[0].y += __shfl_xor_sync(kAllLanes, acc[0].y, lanes);
        acc[0].z += __shfl_xor_sync(kAllLanes, acc[0].z, lanes);
        acc[0].w += __shfl_xor_sync(kAllLanes, acc[0].w, lanes);
      }
      out.write<kWarp>(parts_.merge.params_, state, column_, acc);
    }

   private:
    static constexpr int kRowLanes = Units::kRowLanes;

    // Of the parts from `first` on that this lane's group has.
    __device__ void find_rows(std::int32_t first) {
#pragma unroll
      for (int j = 0; j < kManyParts; ++j) {
        rows_[j] = parts_.row_of_part(row_of_class_, first + j * groups_ + group_);
      }
    }

    const Parts& parts_;
    const std::int32_t lanes_;
    const std::int32_t doublings_;  // as many lanes
    const std::int32_t groups_;     // of a warp
    const std::int32_t group_;      // of this lane
    plan::Tile::Row row_{};
    std::int32_t column_ = 0;
    bool writes_ = false;
    std::int32_t row_of_class_ = 0;
    std::int32_t rows_[kManyParts];
  };

  // A tile of few parts: a warp has some rows at a time.
  class FewParts {
   public:
    __device__ explicit FewParts(const Parts& parts)
        : parts_(parts), in_group_(parts.merge.lane_ % kLanes) {}

    __device__ std::int32_t units() const {
      return (Units::rows_of(parts_.piece) + kGroups - 1) / kGroups;
    }

    __device__ void prepare(std::int32_t unit) {
      const std::int32_t rows = Units::rows_of(parts_.piece);
      const std::int32_t row = unit * kGroups + parts_.merge.lane_ / kLanes;
      row_ = plan::Tile::row_of(T::kHeads, parts_.piece.num_rows, min(row, rows - 1));
      writes_ = !parts_.rehearses && row < rows;
      row_of_class_ = parts_.row_of_class(row_);
      find_rows(0);
    }

    __device__ void finish() {
      MergedRow out;
      core::SoftmaxState state;
      float4 acc[kVectors] = {};
#pragma unroll 1
      for (std::int32_t first = 0;;) {
        core::SoftmaxState own[kBatch];
        float4 loaded[kBatch][kVectors];
#pragma unroll
        for (int j = 0; j < kBatch; ++j) own[j] = parts_.state_at(rows_[j]);
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
#pragma unroll
          for (int v = 0; v < kVectors; ++v) loaded[j][v] = parts_.columns_at(rows_[j], column(v));
        }
        // While they are on their way.
        if (first == 0) out = parts_.merge.row_out(parts_.piece, row_, writes_);
        const float before = state.max;
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          own[j] = parts_.if_there(own[j], first + j);
          state.max = fmaxf(state.max, own[j].max);
        }
        if (first > 0) {
          const float keep = exp_difference(before, state.max);
          state.sum = scaled_sum(state, keep);
#pragma unroll
          for (int v = 0; v < kVectors; ++v) scale(acc[v], keep);
        }
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const float add = exp_difference(own[j].max, state.max);
          state.sum += scaled_sum(own[j], add);
          if (first + j >= parts_.count) continue;
#pragma unroll
          for (int v = 0; v < kVectors; ++v) add_scaled(acc[v], add, loaded[j][v]);
        }
        first += kBatch;
        if (first >= parts_.count) break;
        find_rows(first);
      }
      out.write<kWarp>(parts_.merge.params_, state, column(0), acc);
    }

   private:
    static constexpr int kLanes = Units::kFewLanes;  // of a row
    static constexpr int kGroups = Units::kFewRows;
    static constexpr int kVectors = T::kHeadSizeV / (kLanes * kColumns);
    // Parts that a group loads at a time.
    static constexpr int kBatch = kVectors <= 2 ? 8 : kVectors <= 4 ? 4 : kVectors <= 8 ? 2 : 1;

    __device__ std::int32_t column(int vector) const {
      return vector * kWarp + in_group_ * kColumns;
    }
    __device__ void find_rows(std::int32_t first) {
#pragma unroll
      for (int j = 0; j < kBatch; ++j) rows_[j] = parts_.row_of_part(row_of_class_, first + j);
    }

    const Parts& parts_;
    const std::int32_t in_group_;
    plan::Tile::Row row_{};
    bool writes_ = false;
    std::int32_t row_of_class_ = 0;
    std::int32_t rows_[kBatch];
  };

  // Nowhere unless this lane `writes`.
  __device__ MergedRow row_out(const CutPiece& piece, const plan::Tile::Row& at,
                               bool writes) const {
    if (!writes) return {};
    return {params_, piece.first_token, piece.kv_head + at.head, piece.first_row + at.row};
  }

  const AttendKernelParams& params_;
  const Shared<T>& shared_;
  const std::int32_t tile_class_;
  const std::int32_t lane_;
  const std::int32_t warp_;
};

}  // namespace diffkv::cuda::mma
