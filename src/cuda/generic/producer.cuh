// Warps that walk the block's share of the plan ahead of the others and copy queries, keys and
// values to shared memory, each its rows of every block. They run across tiles and sequences, so
// that the stream of copies never dries up where a tile ends.
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
#include "plan/schedule.h"

namespace diffkv::cuda::mma {

template <class T>
class Producer {
 public:
  using Grid = typename T::Grid;
  static constexpr bool kBulk = Grid::kBulk && ptx::kBulkCopies;
  // Arrivals that fill a stage or a query buffer: bulk copies count bytes, others count lanes.
  static constexpr std::uint32_t kFullArrivals = Grid::kProducers * (kBulk ? 1 : kWarp + 1);

  __device__ Producer(const AttendKernelParams& params, const Shared<T>& shared, Depth depth,
                      std::int32_t tile_class)
      : params_(params),
        shared_(shared),
        depth_(depth),
        tile_class_(tile_class),
        lane_(static_cast<std::int32_t>(threadIdx.x) % kWarp),
        warp_(static_cast<std::int32_t>(threadIdx.x) / kWarp - Grid::kConsumers),
        key_bytes_(params.head_size_qk * T::kStoredBytes),
        value_bytes_(params.head_size_v * T::kStoredBytes),
        one_copy_(params.value.data == params.key.data + key_bytes_ && key_bytes_ == T::kKeyBytes &&
                  params.value.stride_block == params.key.stride_block &&
                  params.value.stride_token == params.key.stride_token &&
                  params.value.stride_head == params.key.stride_head) {}

  __device__ void run(std::int32_t worker) {
    plan::for_each_piece(params_.schedule, tile_class_, worker, [&](const plan::Piece& piece) {
      // A tile without keys is one empty block, so that its rows are written.
      std::int32_t v = piece.begin_block;
      do {
        Load next;
        next.flags = (v == piece.begin_block ? kFirstOfPiece : 0) |
                     (v + 1 >= piece.end_block ? kLastOfPiece : 0);
        if (v < piece.end_block) {
          next.first_key = piece.tile.block_at(v) * Grid::kBlockKeys;
          next.range = piece.tile.keys_at(v);
        }
        next.seq = piece.seq;
        next.kv_head = piece.tile.kv_head;
        find_page(next);
        // The page ids of the next block are on their way while the last one waits for its stage.
        if (pending_.flags >= 0) load(pending_);
        if ((next.flags & kFirstOfPiece) != 0) start_piece(piece);
        pending_ = next;
      } while (++v < piece.end_block);
    });
    if (pending_.flags >= 0) load(pending_);
    Load stop;
    stop.flags = kNoMoreWork;
    load(stop);
  }

 private:
  // A block of keys to copy; of this warp's, lane l knows the place of key l.
  struct Load {
    std::int32_t flags = -1;
    std::int32_t first_key = 0;
    KeyRange range;
    std::int32_t seq = 0;
    std::int32_t kv_head = 0;
    std::int32_t page = 0;   // as read, not yet clamped; of a dense cache 0
    std::int32_t token = 0;  // within the page
  };

  __device__ std::int32_t key_of(const Load& load) const {
    return load.first_key + warp_ * Grid::kProducerKeys + lane_;
  }

  __device__ bool holds(const Load& load) const {
    const std::int32_t key = key_of(load);
    return lane_ < Grid::kProducerKeys && key >= load.range.begin && key < load.range.end;
  }

  __device__ void find_page(Load& load) const {
    if (!holds(load)) return;
    const std::int32_t key = key_of(load);
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

  __device__ const std::byte* row_of(const PlaneParams& plane, const Load& load) const {
    const std::int64_t page = max(0, min(load.page, params_.num_blocks - 1));
    return plane.data + (page * plane.stride_block + load.token * plane.stride_token +
                         load.kv_head * plane.stride_head) *
                            T::kStoredBytes;
  }

  // Copies a block of keys into the next stage.
  __device__ void load(const Load& load) {
    const std::int32_t stage = stage_.index;
    ptx::Barrier* full = shared_.stage_full + stage;
    ptx::wait(shared_.stage_empty + stage, stage_.parity ^ 1U);
    if (warp_ == 0 && lane_ == 0) {
      shared_.stage_infos[stage] = {load.first_key, load.range.begin, load.range.end, load.flags};
    }
    const std::uint32_t to = ptx::shared_address(shared_.stages) +
                             static_cast<std::uint32_t>(stage * T::kStageBytes +
                                                        warp_ * Grid::kProducerKeys * T::kRowPitch);
    const bool valid = holds(load);
    const std::byte* key = row_of(params_.key, load);
    const std::byte* value = row_of(params_.value, load);
    open(full, __popc(__ballot_sync(kAllLanes, valid)) * (key_bytes_ + value_bytes_));
    if constexpr (kBulk) {
      const std::uint32_t row = to + static_cast<std::uint32_t>(lane_ * T::kRowPitch);
      if (valid && one_copy_) {
        ptx::copy_bulk(row, key, key_bytes_ + value_bytes_, full);
      } else if (valid) {
        ptx::copy_bulk(row, key, key_bytes_, full);
        ptx::copy_bulk(row + T::kKeyBytes, value, value_bytes_, full);
      }
    } else if (one_copy_) {
      copy_rows<Grid::kProducerKeys, T::kRowBytes>(to, T::kRowPitch, key, T::kRowBytes, valid);
    } else {
      copy_rows<Grid::kProducerKeys, T::kKeyBytes>(to, T::kRowPitch, key, key_bytes_, valid);
      copy_rows<Grid::kProducerKeys, T::kRowBytes - T::kKeyBytes>(to + T::kKeyBytes, T::kRowPitch,
                                                                  value, value_bytes_, valid);
    }
    close(full);
    stage_.advance(depth_.stages);
  }

  // Announces the bytes that bulk copies will bring.
  __device__ void open(ptx::Barrier* full, std::int32_t bytes) {
    __syncwarp();
    if constexpr (kBulk) {
      if (lane_ == 0) ptx::arrive_expecting(full, static_cast<std::uint32_t>(bytes));
      __syncwarp();
    } else {
      if (lane_ == 0) ptx::arrive(full);
    }
  }

  __device__ void close(ptx::Barrier* full) {
    if constexpr (!kBulk) ptx::arrive_after_copies(full);
  }

  // Copies kRows rows that the warp's lanes hold the addresses of, lane l's to to + l * pitch: 8
  // lanes a row, 16 bytes each.
  template <int kRows, int kMostBytes>
  __device__ void copy_rows(std::uint32_t to, std::int32_t pitch, const std::byte* from,
                            std::int32_t bytes, bool valid) const {
    const auto address = reinterpret_cast<std::uint64_t>(valid ? from : nullptr);
#pragma unroll
    for (std::int32_t first = 0; first < kRows; first += 4) {
      const std::int32_t row = first + lane_ / 8;
      const std::uint64_t source = __shfl_sync(kAllLanes, address, row);
#pragma unroll
      for (std::int32_t chunk = 0; chunk < kMostBytes; chunk += 128) {
        const std::int32_t at = chunk + lane_ % 8 * 16;
        if (source != 0 && at < bytes) {
          ptx::copy_async(to + static_cast<std::uint32_t>(row * pitch + at),
                          reinterpret_cast<const std::byte*>(source) + at);
        }
      }
    }
  }

  // Loads a piece's queries and tells the consumers what it is.
  __device__ void start_piece(const plan::Piece& piece) {
    const std::int32_t buffer = query_.index;
    ptx::Barrier* full = shared_.query_full + buffer;
    ptx::wait(shared_.query_empty + buffer, query_.parity ^ 1U);
    if (warp_ == 0) describe(piece, shared_.pieces[buffer]);

    const std::int32_t first_token = params_.schedule.tables.query_start_loc[piece.seq];
    const std::int32_t group = params_.schedule.group;
    // Rows of tokens that are not computed are the sequence's last ones.
    const std::int32_t tokens = params_.schedule.tables.num_tokens - first_token;
    const std::int64_t rows_left = std::int64_t{tokens} * group - piece.tile.first_row;
    const std::int32_t rows = static_cast<std::int32_t>(
        max(std::int64_t{0}, min(std::int64_t{piece.tile.num_rows}, rows_left)));
    constexpr int kQueryBytes = T::kQuery == DType::kE4M3 ? 1 : 2;
    const std::int32_t bytes = params_.head_size_qk * kQueryBytes;
    const std::uint32_t to =
        ptx::shared_address(shared_.queries) + static_cast<std::uint32_t>(buffer * T::kQueryBytes);
    constexpr int kRows = Grid::kProducerRows;
    const std::int32_t own_rows = max(0, min(rows - warp_ * kRows, kRows));
    open(full, own_rows * bytes);
#pragma unroll
    for (std::int32_t first = 0; first < kRows; first += kWarp) {
      const std::int32_t row = warp_ * kRows + first + lane_;
      const bool valid = first + lane_ < own_rows;
      const std::int32_t index = piece.tile.first_row + min(row, Grid::kRows - 1);
      const std::int64_t token = std::int64_t{first_token} + index / group;
      const std::int64_t head = std::int64_t{piece.tile.kv_head} * group + index % group;
      const std::byte* from =
          params_.query.data +
          (token * params_.query.stride_token + head * params_.query.stride_head) * kQueryBytes;
      if constexpr (kBulk) {
        if (valid) {
          ptx::copy_bulk(to + static_cast<std::uint32_t>(row * T::kQueryPitch), from,
                         static_cast<std::uint32_t>(bytes), full);
        }
      } else {
        copy_rows<(kRows < kWarp ? kRows : kWarp), T::kHeadSizeQk * kQueryBytes>(
            to + static_cast<std::uint32_t>((warp_ * kRows + first) * T::kQueryPitch),
            T::kQueryPitch, from, bytes, valid);
      }
    }
    close(full);
    query_.advance(depth_.query_buffers);
  }

  __device__ void describe(const plan::Piece& piece, typename Shared<T>::Piece& info) const {
    const plan::ScheduleView& schedule = params_.schedule;
    const core::SeqMask seq = plan::seq_mask(schedule, piece.seq);
    for (std::int32_t row = lane_; row < Grid::kRows; row += kWarp) {
      core::RowKeys keys;
      const std::int32_t index = piece.tile.first_row + row;
      if (row < piece.tile.num_rows) {
        keys = core::row_keys(schedule.mask, seq, index / schedule.group);
        const std::int32_t head = piece.tile.kv_head * schedule.group + index % schedule.group;
        if (params_.alibi_slopes.data != nullptr) {
          info.slope[row] = scale_at(params_.alibi_slopes, head);
        }
        info.sink[row] = params_.sinks.data == nullptr
                             ? core::kNegInf
                             : core::load_element(params_.sinks.dtype, params_.sinks.data,
                                                  head * params_.sinks.stride);
      }
      info.query_factor[row] = 1.0F;
      info.prefix_end[row] = keys.prefix_end;
      info.begin[row] = keys.begin;
      info.end[row] = keys.end;
    }
    if (lane_ == 0) {
      info.seq = piece.seq;
      info.kv_head = piece.tile.kv_head;
      info.first_row = piece.tile.first_row;
      info.num_rows = piece.tile.num_rows;
      info.slot = piece.slot;
      info.context_len = static_cast<std::int32_t>(seq.context_len());
      info.first_token = schedule.tables.query_start_loc[piece.seq];
      info.score_scale = score_scale(params_, piece.tile.kv_head);
      info.value_scale = scale_at(params_.v_scale, piece.tile.kv_head);
    }
  }

  const AttendKernelParams& params_;
  const Shared<T>& shared_;
  const Depth depth_;
  const std::int32_t tile_class_;
  const std::int32_t lane_;
  const std::int32_t warp_;  // among the producers
  const std::int32_t key_bytes_;
  const std::int32_t value_bytes_;
  const bool one_copy_;  // K and V of a token lie side by side in the cache as in a stage
  RingPosition stage_;
  RingPosition query_;
  Load pending_;
};

}  // namespace diffkv::cuda::mma
