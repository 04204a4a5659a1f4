// Warps that walk the block's share of the plan ahead of the others and copy queries, keys and
// values to shared memory. They run across tiles and sequences, so that the stream of copies never
// dries up where a tile ends. The first one copies keys and values where boxes can be (sm_90 and
// later), the others queries; elsewhere all copy rows of keys and values too, 16 bytes a lane.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/mask.h"
#include "cuda/generic/ptx.cuh"
#include "cuda/generic/scores.cuh"
#include "cuda/generic/shared.cuh"
#include "cuda/generic/tile.h"
#include "cuda/params.h"
#include "cuda/row_io.cuh"
#include "cuda/tensor_maps.h"
#include "plan/schedule.h"
#include "plan/walk.h"

namespace diffkv::cuda::mma {

template <class T>
class Producer {
 public:
  using Grid = typename T::Grid;
  using Piece = typename Shared<T>::Piece;
  // A warp that copies rows arrives with one lane at first, of queries as a warp, and with all when
  // its copies have landed.
  static constexpr std::uint32_t kRowArrivals = Grid::kProducers * (kWarp + 1);
  static constexpr std::int32_t kQueryWarps = Grid::kProducers - 1;
  static constexpr std::uint32_t kQueryArrivals = kQueryWarps * (kWarp + kWarpArrivals);
  static constexpr int kQueryRows = Grid::kRows < kWarp ? Grid::kRows : kWarp;  // of a warp at once

  // The warp that says what the pieces are. Of four producers it has no queries to copy for tiles
  // of up to 64 rows.
  static constexpr int kDescriber = Grid::kProducers - 1;

  static __device__ bool by_boxes(const KvMaps& maps) { return ptx::kTensorCopies && maps.usable; }

  // Threads that meet at kRingsBarrier: the producers, and a warp of consumers.
  static constexpr int kStarting = (Grid::kProducers + 1) * kWarp;

  // Descriptions of tensors come from memory, too.
  static __device__ void prefetch(const KvMaps& maps) {
    if (!by_boxes(maps)) return;
    ptx::prefetch_map(&maps.key.map);
    ptx::prefetch_map(&maps.value.map);
  }

  __device__ Producer(const AttendKernelParams& params, const KvMaps& maps, const Shared<T>& shared,
                      Depth depth, std::int32_t tile_class)
      : params_(params),
        maps_(maps),
        shared_(shared),
        depth_(depth),
        tile_class_(tile_class),
        lane_(static_cast<std::int32_t>(threadIdx.x) % kWarp),
        warp_(static_cast<std::int32_t>(threadIdx.x) / kWarp - Grid::kConsumers),
        boxes_(by_boxes(maps)),
        box_keys_(boxes_ ? maps.box_keys : 1),
        key_in_block_(boxes_ ? lane_ * box_keys_
                             : lane_ / Grid::kProducerKeys * Grid::kWarpKeys +
                                   warp_ * Grid::kProducerKeys + lane_ % Grid::kProducerKeys) {}

  // Returns whether consumers will be busy for a while yet.
  __device__ bool run(std::int32_t worker) {
    const bool copies_keys = !boxes_ || warp_ == 0;
    const plan::ScheduleView& schedule = params_.schedule;
    plan::Share share(schedule, tile_class_, worker);
    plan::Piece piece;
    std::int32_t v = 0;  // the block of the piece that comes next
    bool more = share.first(piece);
    if (more) v = piece.begin_block;
    if constexpr (Grid::kEvictsFirst) keep_blocks(share.cost());
    Load pending;
    while (pending.flags != kNoMoreWork) {
      Load next;
      next.flags = more ? 0 : kNoMoreWork;
      if (more && copies_keys) {
        next = block_at(piece, v);
        // Its page ids are on their way while the one before it waits for its stage.
        find_page(next);
      }
      if (pending.flags == kNothingYet) {
        ptx::sync(kRingsBarrier, kStarting);  // what comes first is on its way
      } else if (copies_keys) {
        load(pending);
      }
      // Not before the last block of the piece before, for which the only buffer of queries may be
      // in use.
      if (more && warp_ > 0 && v == piece.begin_block) start_piece(piece);
      pending = next;
      if (!more) continue;
      // A piece without keys is one empty block, so that its rows are written.
      if (!copies_keys || ++v >= piece.end_block) {
        more = share.next(piece);
        v = piece.begin_block;
      }
    }
    if (copies_keys) load(pending);
    // Who copies keys is done when the last block is on its way.
    return !copies_keys && piece.end_block - piece.begin_block >= kLongPiece;
  }

 private:
  static constexpr std::int32_t kNothingYet = -1;  // of Load::flags
  static constexpr std::int32_t kLongPiece = 8;    // blocks, that take longer than a rehearsal

  // A block of keys to copy; lane l knows the place of the first key of a box, or of a key.
  struct Load {
    std::int32_t flags = kNothingYet;
    std::int32_t first_key = 0;
    KeyRange range;
    std::int32_t seq = 0;
    std::int32_t kv_head = 0;
    std::int32_t page = 0;   // as read, not yet clamped; of a dense cache 0
    std::int32_t token = 0;  // within the page
  };

  __device__ static Load block_at(const plan::Piece& piece, std::int32_t v) {
    Load load;
    load.flags = v + 1 >= piece.end_block ? kLastOfPiece : 0;
    load.seq = piece.seq;
    load.kv_head = piece.tile.kv_head;
    if (v < piece.end_block) {
      load.first_key = piece.tile.block_at(v) * Grid::kBlockKeys;
      load.range = piece.tile.keys_at(v);
    }
    return load;
  }

  // Whether this lane's box, or row, has a key that is asked for.
  __device__ bool holds(const Load& load) const {
    const std::int32_t key = load.first_key + key_in_block_;
    return key_in_block_ < Grid::kBlockKeys && key + box_keys_ > load.range.begin &&
           key < load.range.end;
  }

  __device__ void find_page(Load& load) const {
    if (!holds(load)) return;
    const std::int32_t key = load.first_key + key_in_block_;
    if (params_.block_table == nullptr) {
      const std::int64_t token =
          std::int64_t{params_.kv_start[load.seq * params_.kv_start_stride]} + key;
      load.token = static_cast<std::int32_t>(
          max(std::int64_t{0}, min(token, std::int64_t{params_.block_size} - 1)));
      return;
    }
    const std::int32_t logical =
        params_.block_shift >= 0 ? key >> params_.block_shift : key / params_.block_size;
    load.token = key - logical * params_.block_size;
    load.page = params_.block_table[load.seq * params_.block_table_stride +
                                    min(logical, params_.max_blocks - 1)];
  }

  // Copies a block of keys into the next stage.
  __device__ void load(const Load& load) {
    if (boxes_) {
      load_boxes(load);
    } else {
      load_rows(load);
    }
    stage_.advance(depth_.stages);
    if constexpr (Grid::kEvictsFirst) {
      if (--kept_blocks_ == 0) policy_ = ptx::read_policy<true>();
    }
  }

  // Of a share that costs so much, which keys and values the second-level cache evicts first.
  __device__ void keep_blocks(std::int32_t share_cost) {
    kept_blocks_ =
        T::kept_blocks(share_cost, params_.schedule.limits.classes[tile_class_].block_cost);
    policy_ = kept_blocks_ == 0 ? ptx::read_policy<true>() : ptx::read_policy<false>();
  }

  __device__ std::int32_t page_of(const Load& load) const {
    return max(0, min(load.page, params_.num_blocks - 1));
  }

  // Waits until slice `slice` of the stage may be written, and says what comes.
  __device__ ptx::Barrier* open(const Load& load, int slice) {
    const std::int32_t index = stage_.index * Grid::kKeyWarps + slice;
    ptx::wait(shared_.stage_empty + index, stage_.parity ^ 1U);
    if (warp_ == 0 && lane_ == 0) {
      shared_.stage_infos[index] = {load.first_key, load.range.begin, load.range.end, load.flags};
    }
    return shared_.stage_full + index;
  }

  // Until fewer slices are under way than may be.
  __device__ void wait_for_copies() {
    const std::int32_t slices = depth_.stages * Grid::kKeyWarps;
    if (under_way_ < min(T::kSlicesUnderWay, slices)) {
      ++under_way_;
      return;
    }
    ptx::wait(shared_.stage_full + landing_.index, landing_.parity);
    landing_.advance(slices);
  }

  __device__ void load_boxes(const Load& load) {
    const bool valid = holds(load);
    const std::uint32_t lanes = __ballot_sync(kAllLanes, valid);
    const std::int32_t page = page_of(load);
    const std::uint32_t to =
        ptx::shared_address(shared_.stages) +
        static_cast<std::uint32_t>(stage_.index * T::kStageBytes + row_of_key<T>(key_in_block_));
    constexpr int kRowBytes = T::kHeads * (T::kKeySlabs + T::kValueSlabs) * T::kSlabRowBytes;
    // Only groups of the least boxes are in several slices.
    constexpr bool kSlices = Grid::kKeyWarps > 1;
    static_assert(!kSlices || T::kGroupKeys == kLeastBoxKeys);
    constexpr int kBoxes = Grid::kWarpKeys / kLeastBoxKeys;  // of a slice
#pragma unroll 1
    for (int slice = 0; slice < Grid::kKeyWarps; ++slice) {
      if constexpr (Grid::kBytesUnderWay > 0) wait_for_copies();
      ptx::Barrier* full = open(load, slice);
      const std::uint32_t in_slice = lanes >> (slice * kBoxes) & ((1U << kBoxes) - 1U);
      if (lane_ == 0) {
        ptx::arrive_expecting(full,
                              static_cast<std::uint32_t>(__popc(in_slice) * box_keys_ * kRowBytes));
      }
      __syncwarp();
      if (!valid || (kSlices && lane_ / kBoxes != slice)) continue;
      copy(maps_.key, to, T::kKeyHeadBytes, load, page, full);
      copy(maps_.value, to + static_cast<std::uint32_t>(T::kValuesInGroup), T::kValueHeadBytes,
           load, page, full);
    }
  }

  // This lane's box of keys or of values.
  __device__ void copy(const PlaneMap& plane, std::uint32_t to, int head_bytes, const Load& load,
                       std::int32_t page, ptx::Barrier* full) const {
    for (std::int32_t head = 0; head < (T::kHeads > 1 ? plane.heads_apart : 1); ++head) {
      for (std::int32_t i = 0; i < plane.copies; ++i) {
        const auto copy_box = [&](auto... policy) {
          ptx::copy_box(to + static_cast<std::uint32_t>(head * head_bytes + i * T::kSlabBytes),
                        &plane.map, i * plane.column_step, load.token, i * plane.slab_step,
                        load.kv_head + head, page, full, policy...);
        };
        if constexpr (Grid::kEvictsFirst) {
          copy_box(policy_);
        } else {
          copy_box();
        }
      }
    }
  }

  __device__ const std::byte* row_of(const PlaneParams& plane, const Load& load, int head) const {
    return plane.data +
           (std::int64_t{page_of(load)} * plane.stride_block + load.token * plane.stride_token +
            (load.kv_head + head) * plane.stride_head) *
               T::kStoredBytes;
  }

  __device__ void load_rows(const Load& load) {
    const bool valid = holds(load);
    const std::uint32_t stage = ptx::shared_address(shared_.stages) +
                                static_cast<std::uint32_t>(stage_.index * T::kStageBytes);
#pragma unroll 1
    for (int slice = 0; slice < Grid::kKeyWarps; ++slice) {
      ptx::Barrier* full = open(load, slice);
      if (lane_ == 0) ptx::arrive(full);
      const std::int32_t first = slice * Grid::kWarpKeys + warp_ * Grid::kProducerKeys;
      const auto place = [&](int row, int chunk) {
        return stage + static_cast<std::uint32_t>(chunk_at<T>(first + row, chunk));
      };
      constexpr int kRows = Grid::kProducerKeys;
#pragma unroll 1
      for (int head = 0; head < T::kHeads; ++head) {
        copy_rows<kRows, T::kHeadSizeQk * T::kStoredBytes>(
            row_of(params_.key, load, head), params_.head_size_qk * T::kStoredBytes, valid,
            slice * kRows, [&](int row, int chunk) {
              return place(row, chunk) + static_cast<std::uint32_t>(head * T::kKeyHeadBytes);
            });
        copy_rows<kRows, T::kHeadSizeV * T::kStoredBytes>(
            row_of(params_.value, load, head), params_.head_size_v * T::kStoredBytes, valid,
            slice * kRows, [&](int row, int chunk) {
              return place(row, chunk) +
                     static_cast<std::uint32_t>(T::kValuesInGroup + head * T::kValueHeadBytes);
            });
      }
      ptx::arrive_after_copies(full);
    }
  }

  // Copies kRows rows that the warp's lanes from `first_lane` on hold the addresses of: 8 lanes a
  // row, 16 bytes each, chunk c of row r to place(r, c).
  template <int kRows, int kMostBytes, class Place>
  __device__ void copy_rows(const std::byte* from, std::int32_t bytes, bool valid,
                            std::int32_t first_lane, Place&& place) const {
    const auto address = reinterpret_cast<std::uint64_t>(valid ? from : nullptr);
#pragma unroll 1
    for (std::int32_t first = 0; first < kRows; first += 4) {
      const std::int32_t row = first + lane_ / 8;
      const std::uint64_t source = __shfl_sync(kAllLanes, address, first_lane + row);
#pragma unroll
      for (std::int32_t at = 0; at < kMostBytes; at += 128) {
        const std::int32_t chunk = at / 16 + lane_ % 8;
        if (source != 0 && chunk * 16 < bytes) {
          ptx::copy_async(place(row, chunk),
                          reinterpret_cast<const std::byte*>(source) + chunk * 16);
        }
      }
    }
  }

  // Loads a piece's queries and tells the consumers what it is: first what its first block needs.
  __device__ void start_piece(const plan::Piece& piece) {
    const std::int32_t buffer = query_.index;
    ptx::Barrier* full = shared_.query_full + buffer;
    ptx::wait(shared_.query_empty + buffer, query_.parity ^ 1U);
    if ((warp_ - 1) * kQueryRows < Grid::kRows) copy_queries(piece, buffer);
    ptx::arrive_after_copies(full);
    Piece& info = shared_.pieces[buffer];
    if (warp_ == kDescriber) describe_keys(piece, info);
    __syncwarp();
    if (arrives(lane_)) ptx::arrive(full);
    if (warp_ == kDescriber) {
      describe_end(piece, info);
      __syncwarp();
      if (arrives(lane_)) ptx::arrive(shared_.described + buffer);
    }
    query_.advance(depth_.query_buffers);
  }

  __device__ void copy_queries(const plan::Piece& piece, std::int32_t buffer) const {
    const std::int32_t first_token = params_.schedule.tables.query_start_loc[piece.seq];
    const std::int32_t group = params_.schedule.group;
    // Rows of tokens that are not computed are the sequence's last ones.
    const std::int32_t tokens = params_.schedule.tables.num_tokens - first_token;
    const std::int64_t rows_left = std::int64_t{tokens} * group - piece.tile.first_row;
    const std::int32_t rows = static_cast<std::int32_t>(
        max(std::int64_t{0}, min(std::int64_t{piece.tile.num_rows}, rows_left)));
    const std::int32_t element = T::kFp8 && params_.query.dtype == DType::kE4M3 ? 1 : 2;
    const std::uint32_t to =
        ptx::shared_address(shared_.queries) + static_cast<std::uint32_t>(buffer * T::kQueryBytes);
    const std::int32_t end = T::kHeads > 1 ? Grid::kRows : rows;
    for (std::int32_t first = (warp_ - 1) * kQueryRows; first < end;
         first += kQueryWarps * kQueryRows) {
      const std::int32_t row = first + lane_;
      const std::int32_t index = piece.tile.first_row + Piece::row_in_head(row);
      const std::int64_t token = std::int64_t{first_token} + index / group;
      const std::int64_t head =
          (std::int64_t{piece.tile.kv_head} + Piece::head_of(row)) * group + index % group;
      const std::byte* from =
          params_.query.data +
          (token * params_.query.stride_token + head * params_.query.stride_head) * element;
      copy_rows<kQueryRows, T::kHeadSizeQk * 2>(
          from, params_.head_size_qk * element, row < Grid::kRows && Piece::row_in_head(row) < rows,
          0, [&](int at, int chunk) {
            return to + static_cast<std::uint32_t>((first + at) * T::kQueryPitch + chunk * 16);
          });
    }
  }

  // What each row sees, and what its scores are made with. Consumers wait for it.
  __device__ void describe_keys(const plan::Piece& piece, Piece& info) const {
    const plan::ScheduleView& schedule = params_.schedule;
    const plan::Tile& tile = piece.tile;
    const std::int32_t token = tile.first_row / schedule.group;
    // All that a row of one token sees is what its tile walks, but for ranges that overlap.
    const bool one_token = (tile.first_row + tile.num_rows - 1) / schedule.group == token &&
                           schedule.mm_ranges == nullptr;
    const bool has_slopes = params_.alibi_slopes.data != nullptr;
    core::SeqMask seq;
    if (!one_token || has_slopes || params_.qq_bias != nullptr) {
      seq = plan::seq_mask(schedule, piece.seq);
    }
#pragma unroll 1
    for (std::int32_t row = lane_; row < Grid::kRows; row += kWarp) {
      core::RowKeys keys;
      const std::int32_t in_head = Piece::row_in_head(row);
      if (in_head < tile.num_rows) {
        const std::int32_t index = tile.first_row + in_head;
        const std::int32_t query = index / schedule.group;
        keys = one_token ? tile.keys : core::row_keys(schedule.mask, seq, query);
        if (has_slopes) {
          info.slope[row] =
              scale_at(params_.alibi_slopes, (tile.kv_head + Piece::head_of(row)) * schedule.group +
                                                 (index - query * schedule.group));
        }
      }
      info.query_factor[row] = 1.0F;
      info.prefix_end[row] = keys.prefix_end;
      info.begin[row] = keys.begin;
      info.end[row] = keys.end;
    }
    if (lane_ < T::kHeads) {
      info.score_scale[lane_] = score_scale(params_, tile.kv_head + lane_);
    }
    if (lane_ == 0) {
      info.first_row = tile.first_row;
      info.num_rows = tile.num_rows;
      info.context_len = static_cast<std::int32_t>(seq.context_len());
    }
  }

  // What becomes of its rows at its end.
  __device__ void describe_end(const plan::Piece& piece, Piece& info) {
    const plan::ScheduleView& schedule = params_.schedule;
    const plan::Tile& tile = piece.tile;
    const std::int32_t first_token = schedule.tables.query_start_loc[piece.seq];
#pragma unroll 1
    for (std::int32_t row = lane_; row < Grid::kRows; row += kWarp) {
      std::int64_t output_at = -1;
      const std::int32_t in_head = Piece::row_in_head(row);
      if (in_head < tile.num_rows) {
        const std::int32_t index = tile.first_row + in_head;
        const std::int32_t query = index / schedule.group;
        const std::int32_t head = (tile.kv_head + Piece::head_of(row)) * schedule.group +
                                  (index - query * schedule.group);
        info.sink[row] = params_.sinks.data == nullptr
                             ? core::kNegInf
                             : core::load_element(params_.sinks.dtype, params_.sinks.data,
                                                  head * params_.sinks.stride);
        const std::int64_t token = std::int64_t{first_token} + query;
        if (token < schedule.tables.num_tokens) {
          output_at = row_at(params_.output, token, head) - params_.output.data;
        }
      }
      info.output_at[row] = output_at;
    }
    if (lane_ == 0) {
      if (piece.slot >= 0) {
        info.partial_row = plan::partial_row(schedule, tile_class_, piece.slot, 0);
        const std::int32_t lanes = schedule.limits.classes[tile_class_].head_lanes;
        info.cut = piece.first() ? 1 : 0;
        shared_.cut_pieces[info.cut] = {piece.end_block - piece.begin_block,
                                        tile.num_blocks,
                                        piece.seq,
                                        piece.line_index,
                                        piece.first_share * lanes + tile.head_group % lanes,
                                        piece.slot,
                                        first_token,
                                        tile.kv_head,
                                        tile.first_row,
                                        tile.num_rows,
                                        CutPiece::kNobody,
                                        0,
                                        0,
                                        0,
                                        0,
                                        false};
      }
      info.kv_head = tile.kv_head;
      info.slot = piece.slot;
      info.first_token = first_token;
    }
    if (lane_ < T::kHeads) {
      info.value_scale[lane_] = scale_at(params_.v_scale, tile.kv_head + lane_);
    }
  }

  const AttendKernelParams& params_;
  const KvMaps& maps_;
  const Shared<T>& shared_;
  const Depth depth_;
  const std::int32_t tile_class_;
  const std::int32_t lane_;
  const std::int32_t warp_;  // among the producers
  const bool boxes_;
  const std::int32_t box_keys_;      // 1 where rows are copied one by one
  const std::int32_t key_in_block_;  // of this lane
  RingPosition stage_;
  RingPosition query_;
  std::int32_t kept_blocks_ = 0;  // still to come; below 0 behind them
  std::uint64_t policy_ = 0;
  std::int32_t under_way_ = 0;
  RingPosition landing_;  // the slice that is under way longest, where copies are limited
};

}  // namespace diffkv::cuda::mma
