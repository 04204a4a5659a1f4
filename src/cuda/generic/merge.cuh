// Cut tiles are merged by the blocks that had their parts, in an order that depends on the plan
// alone. The block that leaves the last partial merges all rows; of a tile in many parts, whose
// blocks all end at about the same time, or of more rows than a block merges at once, each merges
// some rows, or columns of some, as soon as the last partial is there. Another kernel would wait
// for the slowest block, and then for its own instructions and for what says which tiles are cut.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "core/softmax.h"
#include "cuda/generic/ptx.cuh"
#include "cuda/generic/scores.cuh"
#include "cuda/generic/shared.cuh"
#include "cuda/generic/tile.h"
#include "cuda/kv_codec.cuh"
#include "cuda/params.h"
#include "cuda/row_io.cuh"
#include "plan/schedule.h"

namespace diffkv::cuda::mma {

template <class T>
class TileMerge {
 public:
  using Grid = typename T::Grid;

  __device__ TileMerge(const AttendKernelParams& params, const Shared<T>& shared,
                       std::int32_t tile_class)
      : params_(params),
        cut_pieces_(shared.cut_pieces),
        part_shares_(shared.part_shares),
        counted_(shared.counted),
        racecheck_(shared.racecheck),
        began_(shared.began),
        tile_class_(tile_class),
        lane_(static_cast<std::int32_t>(threadIdx.x) % kWarp),
        warp_(static_cast<std::int32_t>(threadIdx.x) / kWarp) {}

  // The warp that describes the pieces, when it has described all: how many parts their tiles have,
  // which shares these are, and which is this block's.
  __device__ void count_parts() const {
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      CutPiece& piece = cut_pieces_[i];
      std::int32_t all = 0;
      std::int32_t before = 0;
      bool inside = piece.blocks > 0;
#pragma unroll 1
      for (std::int32_t first = 0; __all_sync(kAllLanes, inside); first += kRounds * kWarp) {
        std::int32_t slots[kRounds];
#pragma unroll
        for (int r = 0; r < kRounds; ++r) {
          slots[r] = slot_of_share(piece, first + r * kWarp + lane_, inside);
        }
#pragma unroll
        for (int r = 0; r < kRounds; ++r) {
          const std::uint32_t there = __ballot_sync(kAllLanes, slots[r] >= 0);
          const std::int32_t index = all + __popc(there & ((1U << lane_) - 1U));
          if (slots[r] >= 0) {
            part_shares_[i * kMostParts + index] =
                static_cast<std::uint16_t>(first + r * kWarp + lane_);
          }
          all += __popc(there);
          before += __popc(__ballot_sync(kAllLanes, slots[r] >= 0 && slots[r] < piece.slot));
        }
      }
      if (lane_ == 0) {
        piece.parts = all;
        piece.part = before;
        piece.waits = waits_for_others(piece);
        piece.lanes = all >= kManyParts ? lanes_for(piece) : 0;
      }
      __syncwarp();
    }
    if (arrives(lane_)) ptx::arrive(counted_);
  }

  // The warp that described the pieces, when it has counted: waits until this block has written
  // all, says so, and finds out who merges its tiles. The consumers meanwhile get ready to merge.
  __device__ void meet() const {
    ptx::sync(kWrittenBarrier, kMeeting);
    if (!has_cut_pieces()) return;
    if (lane_ < 2) meet(cut_pieces_[lane_]);
    __syncwarp();
    say_met();
    leave();
  }

  // All consumer warps, when they have written everything. Also, before, the warp that described
  // the pieces, which `rehearses`: it goes through the instructions that will merge, so that they
  // need not come from memory when everything waits for them, but reads no global memory and writes
  // nothing.
  __device__ void run(bool rehearses) const {
    if (!rehearses) {
      ptx::arrive_at(kWrittenBarrier, kMeeting);
      ptx::wait(counted_, 0);
    }
    bool met = rehearses;
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      const CutPiece& piece = cut_pieces_[i];
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
  static constexpr int kColumns = 4;  // neighbouring ones of a lane
  // Parts of which a lane loads one each at a time; a tile of as many is divided finely.
  static constexpr int kManyParts = 8;
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

  // Says that this block's partial is there, and finds out who is to merge the tile. By one thread
  // a piece, both at once.
  __device__ void meet(CutPiece& piece) const {
    Word* word = word_of(piece);
    const bool cut = piece.blocks > 0;
    const bool together = piece.waits;
    bool complete = false;
    if (cut) {
      const Word before = ptx::add_and_meet(word, static_cast<Word>(piece.blocks));
      complete = blocks_of(before) + piece.blocks >= piece.blocks_of_tile;
      // The last one also does the work of those who left, and so that of all; who still waits
      // does its own as well, to the same bits.
      if (complete) {
        piece.merger = together && !any_tired(before) ? CutPiece::kAllBlocks : CutPiece::kThisBlock;
      }
    }
    const long long begin = clock64();
    const long long patience = max(kPatience, begin - *began_);
    for (bool waits = cut && together && !complete; __any_sync(0x3U, waits);) {
      if (!waits) continue;
      Word now = ptx::look_at(word);
      if (blocks_of(now) < piece.blocks_of_tile && clock64() - begin > patience) {
        waits = false;
        now = ptx::add_and_meet(word, kOneTired);
      }
      if (blocks_of(now) >= piece.blocks_of_tile) {
        waits = false;
        piece.merger = CutPiece::kAllBlocks;
      }
    }
  }

  // This block needs the tiles' words no more. The last of a tile's blocks clears its word for the
  // next attend.
  __device__ void leave() const {
    if (lane_ >= 2 || cut_pieces_[lane_].blocks == 0) return;
    const CutPiece& piece = cut_pieces_[lane_];
    Word* word = word_of(piece);
    const bool last = piece.waits ? gone_of(atomicAdd(word, kOneGone)) + 1 == piece.parts
                                  : piece.merger == CutPiece::kThisBlock;
    if (last) *word = 0;
  }

  // The warp that described the pieces, and the consumers.
  __device__ void say_met() const {
    if constexpr (kForRacecheck) {
      ptx::arrive(&racecheck_->met);
    } else {
      ptx::arrive_at(kMetBarrier, kMeeting);
    }
  }
  __device__ void wait_met() const {
    if constexpr (kForRacecheck) {
      ptx::wait(&racecheck_->met, 0);
    } else {
      ptx::sync(kMetBarrier, kMeeting);
    }
  }

  __device__ bool has_cut_pieces() const {
    return cut_pieces_[0].blocks > 0 || cut_pieces_[1].blocks > 0;
  }
  __device__ Word* word_of(const CutPiece& piece) const {
    return reinterpret_cast<Word*>(params_.schedule.tables.arrivals[tile_class_] +
                                   piece.first_worker);
  }
  static __device__ std::int32_t rows_of(const CutPiece& piece) {
    return T::kHeads * piece.num_rows;
  }

  // Whether the blocks of a tile wait for each other and divide its rows. Those of a taller tile,
  // of prefill, end at different times unless there are many.
  static __device__ bool waits_for_others(const CutPiece& piece) {
    if (Grid::kRows > 64) return piece.parts >= kWarp;
    return piece.parts >= kManyParts || rows_of(piece) > Grid::kConsumers * FewParts::kGroups;
  }

  // Lanes that have a row's columns between them, or some of them, where each of a warp's groups of
  // so many has some parts: the fewest that do not make more units than the warps that merge, and
  // the most where there are more anyway.
  static __device__ std::int32_t lanes_for(const CutPiece& piece) {
    const std::int32_t warps = (piece.waits ? piece.parts : 1) * Grid::kConsumers;
    std::int32_t lanes = ManyParts::kMostLanes;
    while (lanes > 2 && 2 * rows_of(piece) * ManyParts::kRowLanes <= warps * lanes) lanes /= 2;
    return lanes;
  }

  // The partial of the share that is `share` after the tile's first, or -1: the first has one, each
  // that starts inside the tile has another, unless it is empty. `inside`: whether there may be
  // more behind it.
  __device__ std::int32_t slot_of_share(const CutPiece& piece, std::int32_t share,
                                        bool& inside) const {
    const plan::ScheduleView& schedule = params_.schedule;
    const std::int32_t lanes = schedule.limits.classes[tile_class_].head_lanes;
    const plan::WorkStart* starts = schedule.tables.starts[tile_class_];
    const std::int32_t first_share = plan::divide(piece.first_worker, lanes);
    const std::int32_t shares = plan::divide(schedule.limits.classes[tile_class_].workers, lanes);
    const std::int32_t at = min(first_share + share, shares - 1);
    const plan::WorkStart start = starts[at];
    const plan::WorkStart stop = starts[at + 1];
    const bool first = share == 0;
    inside = first || (first_share + share < shares &&
                       plan::starts_inside(start, {piece.seq, piece.line_index, 0}));
    return first || (inside && plan::before(start, stop)) ? slot_of(piece, share) : -1;
  }
  __device__ std::int32_t slot_of(const CutPiece& piece, std::int32_t share) const {
    const std::int32_t lanes = params_.schedule.limits.classes[tile_class_].head_lanes;
    return params_.schedule.tables.first_slot[tile_class_] +
           2 * (piece.first_worker + share * lanes) + (share == 0 ? 1 : 0);
  }

  // What a block merges of a tile, of which it got ready as much as it has if all wait for each
  // other.
  enum class Turn { kNone, kAsGuessed, kAll };

  // Waits, the first time, until this block knows who merges its tiles.
  __device__ Turn turn_of(const CutPiece& piece, bool& met) const {
    if (!met) wait_met();
    met = true;
    if (piece.merger == CutPiece::kNobody) return Turn::kNone;
    // Who merges a tile that is not waited for has guessed that it has all.
    return piece.merger == CutPiece::kThisBlock && piece.waits ? Turn::kAll : Turn::kAsGuessed;
  }

  // Where a row of the output is, and what its end needs; nowhere if it is not written.
  struct RowOut {
    std::byte* to = nullptr;
    RowPlace place{};
    RowScales scales{};
  };

  // What both kinds of tiles need. Who rehearses has no parts, and reads shared memory.
  struct Parts {
    __device__ Parts(const TileMerge& owner, const CutPiece& cut, int list, bool rehearsal)
        : merge(owner),
          piece(cut),
          count(rehearsal ? 0 : cut.parts),
          rehearses(rehearsal),
          shares_(owner.part_shares_ + list * kMostParts) {
      const detail::PlanTables& tables = merge.params_.schedule.tables;
      acc_ = rehearses ? reinterpret_cast<const float*>(merge.part_shares_) : tables.partial_acc;
      states_ = rehearses ? reinterpret_cast<const core::SoftmaxState*>(merge.part_shares_)
                          : tables.partial_state;
      last_column_ = rehearses ? 0 : merge.params_.head_size_v - kColumns;
      row_floats_ = static_cast<std::uint32_t>(tables.partial_stride);
    }

    // Of row `row` of the tile: its row of the class's first slot.
    __device__ std::int32_t row_of_class(std::int32_t row) const {
      const plan::ScheduleView& schedule = merge.params_.schedule;
      const plan::Tile::Row place = plan::Tile::row_of(T::kHeads, piece.num_rows, row);
      return static_cast<std::int32_t>(
          plan::partial_row(schedule, merge.tile_class_, 0, place.row, place.head));
    }
    // The row of the partials that holds it in a part, and in the last one if there is no such.
    __device__ std::int32_t row_of_part(std::int32_t row_of_class, std::int32_t part) const {
      if (rehearses) return 0;
      const std::int32_t slot = merge.slot_of(piece, shares_[min(part, count - 1)]);
      return row_of_class + slot * (T::kHeads * T::kHeadRows);
    }
    // Of a row, nothing if the part is not there. No load has a condition: of those that have, the
    // compiler moves the results one by one, waiting for each.
    __device__ core::SoftmaxState state_at(std::int32_t row, std::int32_t part) const {
      const core::SoftmaxState state = states_[row];
      return part < count ? state : core::SoftmaxState();
    }
    // Columns that are not there are read from others, and not written.
    __device__ const float4& columns_at(std::int32_t row, std::int32_t column) const {
      return *reinterpret_cast<const float4*>(acc_ + static_cast<std::uint32_t>(row) * row_floats_ +
                                              min(column, last_column_));
    }

    const TileMerge& merge;
    const CutPiece& piece;
    const std::int32_t count;
    const bool rehearses;

   private:
    const std::uint16_t* const shares_;
    const float* acc_;
    const core::SoftmaxState* states_;
    std::int32_t last_column_;
    std::uint32_t row_floats_;  // 2 kMostParts slots a class have fewer than 2^32
  };

  // What this block merges of a tile. Each warp has a unit of `work` at a time, and gets ready for
  // it while the block does not know yet whether the partials are there.
  template <class Work>
  __device__ void merge(const Parts& parts, Work&& work, bool& met) const {
    const CutPiece& piece = parts.piece;
    const std::int32_t warp = parts.rehearses ? 0 : warp_;
    const bool shares = !parts.rehearses && piece.waits;
    std::int32_t unit = (shares ? piece.part * Grid::kConsumers : 0) + warp;
    std::int32_t step = (shares ? piece.parts : 1) * Grid::kConsumers;
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
    static constexpr int kRowLanes = T::kHeadSizeV / kColumns;
    static constexpr int kMostLanes =
        (kRowLanes & -kRowLanes) < kWarp ? kRowLanes & -kRowLanes : kWarp;

    __device__ explicit ManyParts(const Parts& parts)
        : parts_(parts),
          lanes_(parts.rehearses ? kMostLanes / 2 : parts.piece.lanes),
          units_of_row_(plan::divide(kRowLanes, lanes_)),
          groups_(plan::divide(kWarp, lanes_)),
          group_(plan::divide(parts.merge.lane_, lanes_)) {}

    __device__ std::int32_t units() const { return rows_of(parts_.piece) * units_of_row_; }

    __device__ void prepare(std::int32_t unit) {
      const std::int32_t row = plan::divide(min(unit, units() - 1), units_of_row_);
      const std::int32_t in_group = parts_.merge.lane_ - group_ * lanes_;
      column_ = ((unit - row * units_of_row_) * lanes_ + in_group) * kColumns;
      out_ = parts_.merge.row_out(parts_.piece, row,
                                  !parts_.rehearses && unit < units() && group_ == 0);
      row_of_class_ = parts_.row_of_class(row);
      find_rows(0);
    }

    __device__ void finish() {
      core::SoftmaxState state;  // the sum is of this group's parts
      float4 acc[1] = {};
#pragma unroll 1
      for (std::int32_t first = 0;;) {
        core::SoftmaxState own[kManyParts];
        float4 loaded[kManyParts];
        float max = state.max;
#pragma unroll
        for (int j = 0; j < kManyParts; ++j) {
          own[j] = parts_.state_at(rows_[j], first + j * groups_ + group_);
        }
#pragma unroll
        for (int j = 0; j < kManyParts; ++j) loaded[j] = parts_.columns_at(rows_[j], column_);
#pragma unroll
        for (int j = 0; j < kManyParts; ++j) max = fmaxf(max, own[j].max);
#pragma unroll 1
        for (std::int32_t lanes = lanes_; lanes < kWarp; lanes *= 2) {
          max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, lanes));
        }
        const float keep = exp_difference(state.max, max);
        state = {max, scaled_sum(state, keep)};
        scale(acc[0], keep);
#pragma unroll
        for (int j = 0; j < kManyParts; ++j) {
          const float add = exp_difference(own[j].max, max);
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
      parts_.merge.write(out_, state, column_, acc);
    }

   private:
    // Of the parts from `first` on that this lane's group has.
    __device__ void find_rows(std::int32_t first) {
#pragma unroll
      for (int j = 0; j < kManyParts; ++j) {
        rows_[j] = parts_.row_of_part(row_of_class_, first + j * groups_ + group_);
      }
    }

    const Parts& parts_;
    const std::int32_t lanes_;
    const std::int32_t units_of_row_;
    const std::int32_t groups_;  // of a warp
    const std::int32_t group_;   // of this lane
    std::int32_t column_ = 0;
    RowOut out_;
    std::int32_t row_of_class_ = 0;
    std::int32_t rows_[kManyParts];
  };

  // A tile of few parts: a warp has some rows at a time.
  class FewParts {
   public:
    static constexpr int kLanes = kWarp / kColumns;  // of a row
    static constexpr int kGroups = kWarp / kLanes;

    __device__ explicit FewParts(const Parts& parts)
        : parts_(parts), in_group_(parts.merge.lane_ % kLanes) {}

    __device__ std::int32_t units() const {
      return (rows_of(parts_.piece) + kGroups - 1) / kGroups;
    }

    __device__ void prepare(std::int32_t unit) {
      const std::int32_t rows = rows_of(parts_.piece);
      const std::int32_t row = unit * kGroups + parts_.merge.lane_ / kLanes;
      out_ = parts_.merge.row_out(parts_.piece, row, !parts_.rehearses && row < rows);
      row_of_part_ = parts_.row_of_part(parts_.row_of_class(min(row, rows - 1)), in_group_);
    }

    // Lane i of a group knows part i.
    __device__ void finish() {
      const core::SoftmaxState own = parts_.state_at(row_of_part_, in_group_);
      core::SoftmaxState state;
      float4 acc[kVectors] = {};
      float add = 0.0F;
#pragma unroll 1
      for (int first = 0;;) {
        float4 loaded[kBatch][kVectors];
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const std::int32_t row = of_part(row_of_part_, first + j);
#pragma unroll
          for (int v = 0; v < kVectors; ++v) loaded[j][v] = parts_.columns_at(row, column(v));
        }
        if (first == 0) {
          state.max = own.max;
#pragma unroll
          for (int lanes = 1; lanes < kLanes; lanes *= 2) {
            state.max = fmaxf(state.max, __shfl_xor_sync(kAllLanes, state.max, lanes));
          }
          add = exp_difference(own.max, state.max);
          state.sum = scaled_sum(own, add);
#pragma unroll
          for (int lanes = 1; lanes < kLanes; lanes *= 2) {
            state.sum += __shfl_xor_sync(kAllLanes, state.sum, lanes);
          }
        }
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const float add_j = of_part(add, first + j);
          if (first + j >= parts_.count) continue;
#pragma unroll
          for (int v = 0; v < kVectors; ++v) add_scaled(acc[v], add_j, loaded[j][v]);
        }
        first += kBatch;
        if (first >= parts_.count) break;
      }
      parts_.merge.write(out_, state, column(0), acc);
    }

   private:
    static constexpr int kVectors = T::kHeadSizeV / (kLanes * kColumns);
    // Parts that a group loads at a time.
    static constexpr int kBatch = kVectors <= 2 ? 8 : kVectors <= 4 ? 4 : kVectors <= 8 ? 2 : 1;
    static_assert(kLanes % kBatch == 0 && kManyParts <= kLanes);

    __device__ std::int32_t column(int vector) const {
      return vector * kWarp + in_group_ * kColumns;
    }
    // What the lane says that knows the part.
    template <class X>
    __device__ X of_part(X x, int part) const {
      return __shfl_sync(kAllLanes, x, parts_.merge.lane_ - in_group_ + part);
    }

    const Parts& parts_;
    const std::int32_t in_group_;
    RowOut out_;
    std::int32_t row_of_part_ = 0;
  };

  // exp(a - b), 0 where nothing is there; quicker than core's, to 2^-22.
  static __device__ float exp_difference(float a, float b) {
    return ptx::exp2((a - (b == core::kNegInf ? 0.0F : b)) * kLog2E);
  }

  // A NaN score leaves the max alone but makes the sum NaN, also of a part whose max is -inf.
  static __device__ float scaled_sum(const core::SoftmaxState& state, float by) {
    return isnan(state.sum) ? state.sum : state.sum * by;
  }

  // Nowhere unless this lane `writes`.
  __device__ RowOut row_out(const CutPiece& piece, std::int32_t row, bool writes) const {
    RowOut out;
    if (!writes) return out;
    const plan::Tile::Row at = plan::Tile::row_of(T::kHeads, piece.num_rows, row);
    const std::int32_t kv_head = piece.kv_head + at.head;
    out.place =
        row_place(piece.first_token, kv_head, params_.schedule.group, piece.first_row + at.row);
    if (out.place.token >= params_.schedule.tables.num_tokens) return out;
    out.to = row_at(params_.output, out.place.token, out.place.head);
    out.scales = row_scales(params_, out.place.head, kv_head);
    return out;
  }

  // A lane writes its columns of a row: kColumns from `column` on, and so many of every kWarp.
  template <int kVectors>
  __device__ void write(const RowOut& out, const core::SoftmaxState& state, std::int32_t column,
                        const float4 (&acc)[kVectors]) const {
    const bool writes = out.to != nullptr;
    const RowEnd end = finish_row(params_, out.place.token, out.place.head, out.scales, state,
                                  writes && column == 0);
#pragma unroll
    for (int v = 0; v < kVectors; ++v, column += kWarp) {
      if (!writes || column >= params_.head_size_v) break;
      const float4 x = make_float4(end(acc[v].x), end(acc[v].y), end(acc[v].z), end(acc[v].w));
      std::byte* to = out.to + column * size_of(params_.output.dtype);
      if (is_fp8(params_.output.dtype)) {
        store_fp8(x, to);
      } else {
        store_four_wide(params_.output.dtype, x, to);
      }
    }
  }

  // A call: its instructions are many, and seldom needed.
  static __device__ __noinline__ void store_fp8(float4 x, std::byte* to) {
    store_four(DType::kE4M3, x, to);
  }

  static __device__ void scale(float4& x, float by) {
    x = make_float4(x.x * by, x.y * by, x.z * by, x.w * by);
  }
  static __device__ void add_scaled(float4& x, float by, const float4& other) {
    x.x = fmaf(other.x, by, x.x);
    x.y = fmaf(other.y, by, x.y);
    x.z = fmaf(other.z, by, x.z);
    x.w = fmaf(other.w, by, x.w);
  }

  const AttendKernelParams& params_;
  CutPiece* const cut_pieces_;
  std::uint16_t* const part_shares_;
  ptx::Barrier* const counted_;
  RacecheckMemory* const racecheck_;
  const long long* const began_;
  const std::int32_t tile_class_;
  const std::int32_t lane_;
  const std::int32_t warp_;
};

}  // namespace diffkv::cuda::mma
