// Cut tiles are merged by the blocks that had their parts, in an order that depends on the plan
// alone. The block that leaves the last partial merges all rows; of a tile in many parts, whose
// blocks all end at about the same time, or of more rows than a block merges at once, each merges
// some rows as soon as the last partial is there. Another kernel would wait for the slowest block,
// and then for its own instructions and for what says which tiles are cut.
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
      for (std::int32_t first = 0; __all_sync(kAllLanes, inside); first += kWarp) {
        const std::int32_t share = first + lane_;
        const std::int32_t slot = slot_of_share(piece, share, inside);
        const std::uint32_t there = __ballot_sync(kAllLanes, slot >= 0);
        const std::int32_t index = all + __popc(there & ((1U << lane_) - 1U));
        if (slot >= 0) part_shares_[i * kMostParts + index] = static_cast<std::uint16_t>(share);
        all += __popc(there);
        before += __popc(__ballot_sync(kAllLanes, slot >= 0 && slot < piece.slot));
      }
      if (lane_ == 0) {
        piece.parts = all;
        piece.part = before;
      }
      __syncwarp();
    }
    ptx::arrive_at(kPartsBarrier, kMeeting);
  }

  // All consumer warps, when they have written everything. Returns whether there may be something
  // to merge.
  __device__ bool meet() const {
    __threadfence();
    ptx::sync(kPartsBarrier, kMeeting);
    if (!has_cut_pieces()) return false;
    if (threadIdx.x < 2) meet(cut_pieces_[threadIdx.x]);
    Finish<T>::sync();
    ptx::arrive_at(kMetBarrier, kMeeting);
    __threadfence();
    return true;
  }

  // The warp that described the pieces, meanwhile: this block needs the tiles' words no more. The
  // last of a tile's blocks clears its word for the next attend.
  __device__ void leave() const {
    if (!has_cut_pieces()) return;
    ptx::sync(kMetBarrier, kMeeting);
    if (lane_ >= 2 || cut_pieces_[lane_].blocks == 0) return;
    const CutPiece& piece = cut_pieces_[lane_];
    Word* word = word_of(piece);
    const bool last = is_waited_for(piece) ? gone_of(atomicAdd(word, kOneGone)) + 1 == piece.parts
                                           : piece.merger == CutPiece::kThisBlock;
    if (last) *word = 0;
  }

  // All consumer warps.
  __device__ void run() const {
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      const CutPiece& piece = cut_pieces_[i];
      if (piece.merger != CutPiece::kNobody) merge_tile(piece, i);
    }
  }

 private:
  static constexpr int kColumns = 4;  // neighbouring ones of a lane
  static constexpr int kLanes = 8;    // of a group, which has one row at a time
  static constexpr int kGroups = kWarp / kLanes;
  static constexpr int kVectors = T::kHeadSizeV / (kLanes * kColumns);  // of a lane in a group
  static constexpr int kBatch = kVectors > 4 ? 1 : 2;  // parts that a group loads at a time
  // Of rows that all warps of a block share, what each leaves for the first.
  struct alignas(16) WarpSums {
    float acc[T::kHeadSizeV];
    float max;
    float sum;
  };
  static_assert(Grid::kConsumers * sizeof(WarpSums) <= 2 * T::kStageBytes);
  // A tile is merged row by row, each by a whole block, where no block has more rows than that.
  static constexpr std::int32_t kMostRowsOfBlock = 2;
  // Groups of lanes of a block, each of which else has a row at a time.
  static constexpr std::int32_t kAllGroups = Grid::kConsumers * kGroups;
  static constexpr int kPartsBarrier = 2;
  static constexpr int kMetBarrier = 6;  // after those of warpgroups
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
      __threadfence();  // what the other threads left before the barrier, too
      const Word before = atomicAdd(word, static_cast<Word>(piece.blocks));
      complete = blocks_of(before) + piece.blocks >= piece.blocks_of_tile;
      // The last one also does the work of those who left.
      if (complete) {
        piece.merger = together && !any_tired(before) ? CutPiece::kAllBlocks : CutPiece::kThisBlock;
      }
    }
    const long long begin = clock64();
    const long long patience = max(kPatience, begin - *began_);
    for (bool waits = cut && together && !complete; __any_sync(0x3U, waits);) {
      if (!waits) continue;
      Word now = *static_cast<volatile Word*>(word);
      if (blocks_of(now) < piece.blocks_of_tile && clock64() - begin > patience) {
        waits = false;
        now = atomicAdd(word, kOneTired);
      }
      if (blocks_of(now) >= piece.blocks_of_tile) {
        waits = false;
        piece.merger = CutPiece::kAllBlocks;
      }
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

  // Whether a row of the tile is merged by all warps of a block.
  static __device__ bool has_many_parts(const CutPiece& piece) {
    return kMostRowsOfBlock * piece.parts >= rows_of(piece);
  }
  // Whether the blocks of a tile wait for each other and divide its rows.
  static __device__ bool is_waited_for(const CutPiece& piece) {
    return has_many_parts(piece) || (Grid::kRows <= 64 && rows_of(piece) > kAllGroups);
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
    inside = share == 0;
    if (inside) return slot_of(piece, share);
    if (first_share + share >= shares) return -1;
    const plan::WorkStart start = starts[first_share + share];
    const plan::WorkStart stop = starts[first_share + share + 1];
    inside = plan::starts_inside(start, {piece.seq, piece.line_index, 0});
    return inside && plan::before(start, stop) ? slot_of(piece, share) : -1;
  }
  __device__ std::int32_t slot_of(const CutPiece& piece, std::int32_t share) const {
    const std::int32_t lanes = params_.schedule.limits.classes[tile_class_].head_lanes;
    return params_.schedule.tables.first_slot[tile_class_] +
           2 * (piece.first_worker + share * lanes) + (share == 0 ? 1 : 0);
  }

  // This block's rows of a tile, of all its KV heads. Where there are many parts, it has one row at
  // a time, whose parts its groups of lanes divide; else a warp has kGroups rows, each for one
  // group.
  __device__ void merge_tile(const CutPiece& piece, int list) const {
    const std::int32_t parts = piece.parts;
    const bool together = has_many_parts(piece);
    const bool shared = piece.merger == CutPiece::kAllBlocks;
    const std::int32_t at_once = together ? 1 : kAllGroups;
    std::int32_t row = (shared ? piece.part : 0) * at_once + (together ? 0 : warp_ * kGroups);
    const std::int32_t end = rows_of(piece);
    const std::int32_t step = (shared ? parts : 1) * at_once;
#pragma unroll 1
    for (; row < end; row += step) {
      const bool writes = !together || warp_ == 0;
      const RowOut out = row_out(piece, together ? row : row + lane_ / kLanes, writes);
      RowSums sums;
      if (together) {
        const std::int32_t member = warp_ * kGroups + lane_ / kLanes;
        add_parts(piece, list, parts, row, member, kAllGroups, sums);
        add_groups(sums);
        add_warps(sums);
      } else {
        add_parts(piece, list, parts, row + lane_ / kLanes, 0, 1, sums);
      }
      write_row(out, sums, together);
    }
  }

  // Of one row: the softmax, the same in all lanes of a group, and the columns of this lane.
  struct RowSums {
    core::SoftmaxState state;
    float4 acc[kVectors] = {};
  };

  // Of a group: adds the parts first, first + step, ... of its row.
  __device__ void add_parts(const CutPiece& piece, int list, std::int32_t parts, std::int32_t row,
                            std::int32_t first, std::int32_t step, RowSums& sums) const {
    const detail::PlanTables& tables = params_.schedule.tables;
    const std::int32_t in_group = lane_ % kLanes;
    const std::int32_t group = lane_ - in_group;
#pragma unroll 1
    for (std::int32_t begin = 0;; begin += kLanes * step) {
      // A lane knows one part.
      const std::int32_t part = begin + first + in_group * step;
      const bool has = part < parts && row < rows_of(piece);
      core::SoftmaxState own;
      std::int64_t at = 0;
      if (has) {
        const std::int32_t slot = slot_of(piece, part_shares_[list * kMostParts + part]);
        const plan::Tile::Row place = plan::Tile::row_of(T::kHeads, piece.num_rows, row);
        at = plan::partial_row(params_.schedule, tile_class_, slot, place.row, place.head);
        own.max = __ldcg(tables.partial_max + at);
        own.sum = __ldcg(tables.partial_sum + at);
      }
      const std::uint32_t there = __ballot_sync(kAllLanes, has);
      float4 loaded[kBatch][kVectors];
      const auto load = [&](int i) {
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const std::int64_t from = __shfl_sync(kAllLanes, at, group + i + j);
          if ((there >> (group + i + j) & 1U) == 0) continue;
          const float* acc = tables.partial_acc + from * tables.partial_stride;
#pragma unroll
          for (int v = 0; v < kVectors; ++v) {
            const std::int32_t column = column_of(v, false);
            if (column >= params_.head_size_v) continue;
            loaded[j][v] = __ldcg(reinterpret_cast<const float4*>(acc + column));
          }
        }
      };
      load(0);
      const float keep = add_state(sums.state, own);
      const float weight = core::exp_difference(own.max, sums.state.max);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) scale(sums.acc[v], keep);
      std::uint32_t rounds = there | there >> 16;  // those that some group has a part in
      rounds = (rounds | rounds >> 8) & 0xffU;
#pragma unroll 1
      for (int i = 0; i < kLanes; i += kBatch) {
        if (i > 0) load(i);
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const float add = __shfl_sync(kAllLanes, weight, group + i + j);
          if ((there >> (group + i + j) & 1U) == 0) continue;
#pragma unroll
          for (int v = 0; v < kVectors; ++v) add_scaled(sums.acc[v], add, loaded[j][v]);
        }
        if (rounds >> (i + kBatch) == 0) break;
      }
      if (begin + kLanes * step >= parts) break;
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
  __device__ void add_groups(RowSums& sums) const {
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

  // Into the first warp, the sums of all warps; there the columns are spread over all lanes.
  __device__ void add_warps(RowSums& sums) const {
    auto* of_warps = reinterpret_cast<WarpSums*>(memory_);
    WarpSums& own = of_warps[warp_];
    if (lane_ == 0) {
      own.max = sums.state.max;
      own.sum = sums.state.sum;
    }
    if (lane_ < kLanes) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        *reinterpret_cast<float4*>(own.acc + column_of(v, false)) = sums.acc[v];
      }
    }
    Finish<T>::sync();
    if (warp_ == 0) {
      sums = RowSums();
#pragma unroll
      for (int w = 0; w < Grid::kConsumers; ++w) {
        sums.state.max = fmaxf(sums.state.max, of_warps[w].max);
      }
#pragma unroll 1
      for (int w = 0; w < Grid::kConsumers; ++w) {
        const core::SoftmaxState other{of_warps[w].max, of_warps[w].sum};
        const float add = core::exp_difference(other.max, sums.state.max);
        sums.state.sum += scaled_sum(other, sums.state.max);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          const std::int32_t column = column_of(v, true);
          if (column >= T::kHeadSizeV) continue;
          add_scaled(sums.acc[v], add, *reinterpret_cast<const float4*>(of_warps[w].acc + column));
        }
      }
    }
    Finish<T>::sync();
  }

  // The first column of a lane's vector: of a group's lanes, or of all.
  __device__ std::int32_t column_of(int v, bool all_lanes) const {
    return (all_lanes ? v * kWarp + lane_ : v * kLanes + lane_ % kLanes) * kColumns;
  }

  // Where a row of the output is, and what its end needs; nowhere if it is not written.
  struct RowOut {
    std::byte* to = nullptr;
    RowPlace place{};
    RowScales scales{};
  };

  __device__ RowOut row_out(const CutPiece& piece, std::int32_t row, bool valid) const {
    RowOut out;
    if (!valid || row >= rows_of(piece)) return out;
    const plan::Tile::Row at = plan::Tile::row_of(T::kHeads, piece.num_rows, row);
    const std::int32_t kv_head = piece.kv_head + at.head;
    out.place =
        row_place(piece.first_token, kv_head, params_.schedule.group, piece.first_row + at.row);
    if (out.place.token >= params_.schedule.tables.num_tokens) return out;
    out.to = row_at(params_.output, out.place.token, out.place.head);
    out.scales = row_scales(params_, out.place.head, kv_head);
    return out;
  }

  __device__ void write_row(const RowOut& out, const RowSums& sums, bool all_lanes) const {
    if (out.to == nullptr) return;
    const bool first = (all_lanes ? lane_ : lane_ % kLanes) == 0;
    const RowEnd end =
        finish_row(params_, out.place.token, out.place.head, out.scales, sums.state, first);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const std::int32_t column = column_of(v, all_lanes);
      if (column >= params_.head_size_v) break;
      const float4& x = sums.acc[v];
      store(params_.output.dtype, make_float4(end(x.x), end(x.y), end(x.z), end(x.w)),
            out.to + column * size_of(params_.output.dtype));
    }
  }

  // A call: instructions come from memory.
  static __device__ __noinline__ void store(DType dtype, float4 x, std::byte* to) {
    store_four(dtype, x, to);
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
