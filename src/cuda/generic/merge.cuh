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
#include "cuda/generic/finish.cuh"
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
        memory_(shared.stages),
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
      }
      __syncwarp();
    }
  }

  // The warp that described the pieces, when it has counted: waits until this block has written
  // all, says so, and finds out who merges its tiles. The consumers meanwhile get ready to merge.
  __device__ void meet() const {
    ptx::sync(kPartsBarrier, kMeeting);
    if (!has_cut_pieces()) return;
    if (lane_ < 2) meet(cut_pieces_[lane_]);
    __syncwarp();
    ptx::arrive_at(kMetBarrier, kMeeting);
    leave();
  }

  // All consumer warps, when they have written everything. Also, before, the warp that described
  // the pieces, which `rehearses`: it goes through the instructions that will merge, so that they
  // need not come from memory when everything waits for them, but reads no global memory and writes
  // nothing.
  __device__ void run(bool rehearses) const {
    if (!rehearses) ptx::sync(kPartsBarrier, kMeeting);
    bool met = rehearses;
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      const CutPiece& piece = cut_pieces_[i];
      if (piece.blocks == 0) continue;
      if (has_many_parts(piece)) {
        merge_together(piece, i, rehearses, met);
      } else {
        merge_rows(piece, i, rehearses, met);
      }
    }
  }

 private:
  static constexpr int kColumns = 4;  // neighbouring ones of a lane
  static constexpr int kLanes = 8;    // of a group, which has one row at a time
  static constexpr int kGroups = kWarp / kLanes;
  // Columns of a row that all warps of a team merge at a time, and what each leaves of them for the
  // first.
  static constexpr int kShareColumns = 64;
  static constexpr int kShares = T::kHeadSizeV / kShareColumns;  // of a row
  struct alignas(16) WarpSums {
    float acc[kShareColumns];
    float max;
    float sum;
  };
  static_assert(2 * Grid::kConsumers * sizeof(WarpSums) <= 2 * T::kStageBytes);
  // Groups of lanes of a block, each of which else has a row at a time.
  static constexpr std::int32_t kAllGroups = Grid::kConsumers * kGroups;
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
    const bool together = is_waited_for(piece);
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
    ptx::acquire();  // for the other threads, too, behind the next barrier
  }

  // This block needs the tiles' words no more. The last of a tile's blocks clears its word for the
  // next attend.
  __device__ void leave() const {
    if (lane_ >= 2 || cut_pieces_[lane_].blocks == 0) return;
    const CutPiece& piece = cut_pieces_[lane_];
    Word* word = word_of(piece);
    const bool last = is_waited_for(piece) ? gone_of(atomicAdd(word, kOneGone)) + 1 == piece.parts
                                           : piece.merger == CutPiece::kThisBlock;
    if (last) *word = 0;
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

  // Whether a row of the tile is merged by all warps of a block: where each lane of a warp has one
  // to read, and where that leaves a block two shares at most.
  static __device__ bool has_many_parts(const CutPiece& piece) {
    return piece.parts >= kWarp && 2 * piece.parts >= kShares * rows_of(piece);
  }
  // Else, whether a row is merged by all groups of a warp, and not by one.
  static __device__ bool has_some_parts(const CutPiece& piece) {
    return Grid::kRows <= 64 && piece.parts >= 2 * kGroups;
  }
  // Whether the blocks of a tile wait for each other and divide its rows.
  static __device__ bool is_waited_for(const CutPiece& piece) {
    return has_many_parts(piece) || has_some_parts(piece) ||
           (Grid::kRows <= 64 && rows_of(piece) > kAllGroups);
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

  // Of one row: the softmax, the same in all lanes of a group, and columns of this lane.
  template <int kVectors>
  struct RowSums {
    core::SoftmaxState state;
    float4 acc[kVectors] = {};
  };

  // What a block merges of a tile, of which it got ready as much as it has if all wait for each
  // other.
  enum class Turn { kNone, kAsGuessed, kAll };

  // Waits, the first time, until this block knows who merges its tiles.
  __device__ Turn turn_of(const CutPiece& piece, bool& met) const {
    if (!met) ptx::sync(kMetBarrier, kMeeting);
    met = true;
    if (piece.merger == CutPiece::kNobody) return Turn::kNone;
    // Who merges a tile that is not waited for has guessed that it has all.
    return piece.merger == CutPiece::kThisBlock && is_waited_for(piece) ? Turn::kAll
                                                                        : Turn::kAsGuessed;
  }

  // This block's rows of a tile of not so many parts, of all its KV heads.
  __device__ void merge_rows(const CutPiece& piece, int list, bool rehearses, bool& met) const {
    const std::int32_t groups = has_some_parts(piece) ? kGroups : 1;  // of a row
    const std::int32_t rows = rows_of(piece);
    const std::int32_t parts = rehearses ? 0 : piece.parts;
    const std::int32_t group = (rehearses ? 0 : warp_ * kGroups) + lane_ / kLanes;
    const bool divided = !rehearses && is_waited_for(piece);
    std::int32_t first = divided ? piece.part * kAllGroups : 0;  // counted in groups
    std::int32_t step = divided ? piece.parts * kAllGroups : kAllGroups;
    Turn turn = Turn::kAsGuessed;
    bool known = rehearses;
#pragma unroll 1
    for (;;) {
      const std::int32_t row = (first + group) / groups;
      const RowOut out = row_out(piece, row, !rehearses && row < rows && group % groups == 0);
      RowSums<T::kHeadSizeV / (kLanes * kColumns)> sums;
      const bool done =
          add_parts(piece, list, parts, min(row, rows - 1), 0, group % groups, groups, sums, [&] {
            if (known) return true;
            known = true;
            turn = turn_of(piece, met);
            return turn == Turn::kAsGuessed && first < groups * rows;
          });
      if (done) {
        if (groups > 1) add_groups(sums);
        write(out, sums.state, sums.acc, lane_ % kLanes);
        first += step;
      } else if (turn == Turn::kAll) {
        first = 0;
        step = kAllGroups;
      } else {
        return;
      }
      if (rehearses || first >= groups * rows) return;
    }
  }

  // This block's rows of a tile of many parts, some columns of one at a time. The parts are divided
  // among all groups of lanes, or among those of each half of the warps, a team, so that two shares
  // of columns are merged at once.
  __device__ void merge_together(const CutPiece& piece, int list, bool rehearses, bool& met) const {
    const std::int32_t shares = rows_of(piece) * kShares;
    const std::int32_t teams = Grid::kConsumers > 2 && shares > piece.parts ? 2 : 1;
    const std::int32_t team_warps = Grid::kConsumers / teams;
    const std::int32_t team = warp_ / team_warps;
    const std::int32_t in_team = warp_ % team_warps;
    const std::int32_t parts = rehearses ? 0 : piece.parts;
    std::int32_t first = rehearses ? 0 : piece.part * teams;
    std::int32_t step = piece.parts * teams;
    Turn turn = Turn::kAsGuessed;
    bool known = rehearses;
    bool again = false;
#pragma unroll 1
    for (;;) {
      const std::int32_t share = min(first + team, shares - 1);
      const std::int32_t row = share / kShares;
      const std::int32_t column = share % kShares * kShareColumns;
      const bool writes = !rehearses && in_team == 0 && first + team < shares;
      RowOut out = row_out(piece, row, writes && lane_ * kColumns < kShareColumns);
      out.column = column;
      RowSums<kShareColumns / (kLanes * kColumns)> sums;
      const bool done =
          add_parts(piece, list, parts, row, column, in_team * kGroups + lane_ / kLanes,
                    team_warps * kGroups, sums, [&] {
                      if (known) return true;
                      known = true;
                      turn = turn_of(piece, met);
                      return turn == Turn::kAsGuessed && first < shares;
                    });
      if (done) {
        add_groups(sums);
        // Who gathers may still read what all left of the shares before.
        if (again) Finish<T>::sync();
        if (!rehearses) put_warp(list, sums);
        if (!rehearses) Finish<T>::sync();
        if (in_team == 0 || rehearses) {
          RowSums<1> all;
          add_warps(list, warp_, rehearses ? 0 : team_warps, all);
          write(out, all.state, all.acc, lane_);
        }
        again = true;
        first += step;
      } else if (turn == Turn::kAll) {
        first = 0;
        step = teams;
      } else {
        return;
      }
      if (rehearses || first >= shares) return;
    }
  }

  // Of a group: adds the parts first, first + step, ... of its row, columns from `column` on, if
  // ready() says so, which is called when all is known but what the parts are; false if not.
  // Without parts it reads shared memory.
  template <int kVectors, class Ready>
  __device__ bool add_parts(const CutPiece& piece, int list, std::int32_t parts, std::int32_t row,
                            std::int32_t column, std::int32_t first, std::int32_t step,
                            RowSums<kVectors>& sums, Ready&& ready) const {
    // Parts that a group loads at a time.
    constexpr int kBatch = kVectors <= 2 ? 8 : kVectors <= 4 ? 4 : kVectors <= 8 ? 2 : 1;
    static_assert(kLanes % kBatch == 0);
    const detail::PlanTables& tables = params_.schedule.tables;
    const std::int32_t in_group = lane_ % kLanes;
    const std::int32_t group = lane_ - in_group;
    const std::uint16_t* shares = part_shares_ + list * kMostParts;
    const auto* memory = !T::kRehearses || parts > 0
                             ? reinterpret_cast<const std::byte*>(tables.partial_acc)
                             : reinterpret_cast<const std::byte*>(part_shares_);
    // Columns that are not there are read from others, and not written.
    const std::int32_t last_column = parts > 0 ? params_.head_size_v - kColumns : 0;
    const std::byte* from[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      from[v] = memory + min(column + (v * kLanes + in_group) * kColumns, last_column) *
                             static_cast<std::int32_t>(sizeof(float));
    }
    const auto row_bytes = static_cast<std::uint32_t>(tables.partial_stride * sizeof(float));
    const plan::Tile::Row place = plan::Tile::row_of(T::kHeads, piece.num_rows, row);
    // Of slot 0; rows of other slots follow.
    const auto first_row = static_cast<std::int32_t>(
        plan::partial_row(params_.schedule, tile_class_, 0, place.row, place.head));
    const std::int32_t rows = T::kHeads * T::kHeadRows;  // of a slot
    // Of a part: its row of the partials. If there is none, that of the last one.
    const auto row_of_part = [&](std::int32_t part) {
      return parts > 0 ? first_row + slot_of(piece, shares[min(part, parts - 1)]) * rows : 0;
    };
    // A lane knows one part at a time.
    std::int32_t part = first + in_group * step;
    std::int32_t at = row_of_part(part);
    if (!ready()) return false;
#pragma unroll 1
    for (bool more = false;; more = true) {
      core::SoftmaxState own;
      if (part < parts) own = {__ldcg(tables.partial_max + at), __ldcg(tables.partial_sum + at)};
      // Of its sums, in bytes: at most 2 kMostParts tiles have some.
      const std::uint32_t offset = static_cast<std::uint32_t>(at) * row_bytes;
      const std::uint32_t there = __ballot_sync(kAllLanes, part < parts);
      std::uint32_t rounds = there | there >> 16;  // those that some group has a part in
      rounds = (rounds | rounds >> 8) & 0xffU;
      float weight = 0.0F;
#pragma unroll 1
      for (int i = 0;;) {
        float4 loaded[kBatch][kVectors];
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const std::uint32_t of_part = __shfl_sync(kAllLanes, offset, group + i + j);
#pragma unroll
          for (int v = 0; v < kVectors; ++v) {
            loaded[j][v] = *reinterpret_cast<const float4*>(from[v] + of_part);
          }
        }
        if (i == 0) {
          const float keep = add_state(sums.state, own);
          weight = core::exp_difference(own.max, sums.state.max);
          if (more) {
#pragma unroll
            for (int v = 0; v < kVectors; ++v) scale(sums.acc[v], keep);
          }
        }
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const float add = __shfl_sync(kAllLanes, weight, group + i + j);
          if ((there >> (group + i + j) & 1U) == 0) continue;
#pragma unroll
          for (int v = 0; v < kVectors; ++v) add_scaled(sums.acc[v], add, loaded[j][v]);
        }
        i += kBatch;
        if (rounds >> i == 0) break;
      }
      part += kLanes * step;
      if (__all_sync(kAllLanes, part - in_group * step >= parts)) return true;
      at = row_of_part(part);
    }
  }

  // Adds what the lanes of a group know of parts to their row's softmax; returns what the sums so
  // far are to be multiplied with.
  __device__ float add_state(core::SoftmaxState& state, const core::SoftmaxState& own) const {
    float max = fmaxf(state.max, own.max);
#pragma unroll
    for (int lanes = 1; lanes < kLanes; lanes *= 2) {
      max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, lanes));
    }
    float added = scaled_sum(own, max);
#pragma unroll
    for (int lanes = 1; lanes < kLanes; lanes *= 2) {
      added += __shfl_xor_sync(kAllLanes, added, lanes);
    }
    const float keep = core::exp_difference(state.max, max);
    state = {max, scaled_sum(state, max) + added};
    return keep;
  }

  // A NaN score leaves the max alone but makes the sum NaN, also of a part whose max is -inf.
  static __device__ float scaled_sum(const core::SoftmaxState& state, float max) {
    return isnan(state.sum) ? state.sum : state.sum * core::exp_difference(state.max, max);
  }

  // Into all groups of a warp, which have parts of the same row, the sums of all.
  template <int kVectors>
  __device__ void add_groups(RowSums<kVectors>& sums) const {
    float max = sums.state.max;
#pragma unroll
    for (int lanes = kLanes; lanes < kWarp; lanes *= 2) {
      max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, lanes));
    }
    const float keep = core::exp_difference(sums.state.max, max);
    sums.state = {max, across_groups(scaled_sum(sums.state, max))};
#pragma unroll
    for (auto& x : sums.acc) {
      scale(x, keep);
      x = make_float4(across_groups(x.x), across_groups(x.y), across_groups(x.z),
                      across_groups(x.w));
    }
  }
  static __device__ float across_groups(float x) {
#pragma unroll
    for (int lanes = kLanes; lanes < kWarp; lanes *= 2) {
      x += __shfl_xor_sync(kAllLanes, x, lanes);
    }
    return x;
  }

  // Of the tile of a list; each has its own, because its first warps may still read those of the
  // first list when the others come to the second one.
  __device__ WarpSums* warp_sums(int list) const {
    return reinterpret_cast<WarpSums*>(memory_) + list * Grid::kConsumers;
  }

  // Leaves this warp's sums for its team's first.
  template <int kVectors>
  __device__ void put_warp(int list, const RowSums<kVectors>& sums) const {
    WarpSums& own = warp_sums(list)[warp_];
    if (lane_ >= kLanes) return;
    if (lane_ == 0) {
      own.max = sums.state.max;
      own.sum = sums.state.sum;
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      *reinterpret_cast<float4*>(own.acc + (v * kLanes + lane_) * kColumns) = sums.acc[v];
    }
  }

  // The sums of `warps` warps from `first` on; a lane of the lower half has four columns.
  __device__ void add_warps(int list, int first, int warps, RowSums<1>& sums) const {
    const WarpSums* of_warps = warp_sums(list) + first;
#pragma unroll
    for (int w = 0; w < Grid::kConsumers; ++w) {
      if (w >= warps) break;
      sums.state.max = fmaxf(sums.state.max, of_warps[w].max);
    }
    const int column = lane_ % (kShareColumns / kColumns) * kColumns;
#pragma unroll
    for (int w = 0; w < Grid::kConsumers; ++w) {
      if (w >= warps) break;
      const float sum = of_warps[w].sum;
      const float add = core::exp_difference(of_warps[w].max, sums.state.max);
      sums.state.sum += isnan(sum) ? sum : sum * add;
      add_scaled(sums.acc[0], add, *reinterpret_cast<const float4*>(of_warps[w].acc + column));
    }
  }

  // Where a row of the output is, and what its end needs; nowhere if it is not written.
  struct RowOut {
    std::byte* to = nullptr;
    std::int32_t column = 0;  // the first of those that are written
    RowPlace place{};
    RowScales scales{};
  };

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

  // Lane `lane` of those of a row writes its columns.
  template <int kVectors>
  __device__ void write(const RowOut& out, const core::SoftmaxState& state,
                        const float4 (&acc)[kVectors], std::int32_t lane) const {
    constexpr int kStep = kLanes * kColumns;
    const bool writes = out.to != nullptr;
    const RowEnd end = finish_row(params_, out.place.token, out.place.head, out.scales, state,
                                  writes && lane == 0 && out.column == 0);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const std::int32_t column = out.column + v * kStep + lane * kColumns;
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
  std::byte* const memory_;  // the stages', when nothing is left to come
  const long long* const began_;
  const std::int32_t tile_class_;
  const std::int32_t lane_;
  const std::int32_t warp_;
};

}  // namespace diffkv::cuda::mma
