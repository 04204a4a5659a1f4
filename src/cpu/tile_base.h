// What every kind of tile needs around its arithmetic: where rows and keys are, what each row sees,
// where results go. Plain code, the same for all SIMD targets.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "core/dtype.h"
#include "core/layout.h"
#include "core/mask.h"
#include "core/softmax.h"
#include "cpu/kernels.h"
#include "cpu/row_io.h"
#include "diffkv/attention.h"

namespace diffkv::cpu {

// Where the keys and values of a block are.
struct BlockRows {
  KeyRange range;
  // Past the block's end the last row is repeated, so that loops may run over whole steps of keys.
  std::array<const std::byte*, kBlockKeys> key;
  std::array<const std::byte*, kBlockKeys> value;

  std::int64_t count() const { return std::int64_t{range.end} - range.begin; }
};

// The keys of one sequence and KV head.
class KeySource {
 public:
  KeySource(const AttendArgs& args, std::int32_t seq, std::int64_t head) : cache_(args.cache) {
    key_ = plane_at(cache_.key, head);
    value_ = plane_at(cache_.value, head);
    if (cache_.dense) {
      const ConstTensorView& start = args.batch.kv_start;
      first_token_ = static_cast<const std::int32_t*>(start.data)[seq * start.strides[0]];
    } else {
      const ConstTensorView& table = args.batch.block_table;
      blocks_ = static_cast<const std::int32_t*>(table.data) + seq * table.strides[0];
    }
  }

  // Finds the rows of a range of at most kBlockKeys keys.
  void locate(KeyRange range, BlockRows& rows) const {
    rows.range = range;
    std::int64_t k = 0;
    for (std::int64_t key = range.begin; key < range.end;) {
      std::int64_t block = 0;
      std::int64_t offset = first_token_ + key;
      std::int64_t stop = range.end;
      if (blocks_ != nullptr) {
        const std::int64_t logical = key / cache_.block_size;
        offset = key - logical * cache_.block_size;
        stop = std::min<std::int64_t>(stop, (logical + 1) * cache_.block_size);
        // Ids are validated; the clamp only keeps a table changed behind our back from faulting.
        block = std::clamp<std::int64_t>(blocks_[logical], 0, cache_.num_blocks - 1);
      }
      const std::byte* at_key = key_.base + block * key_.block + offset * key_.token;
      const std::byte* at_value = value_.base + block * value_.block + offset * value_.token;
      for (; key < stop; ++key, ++k, at_key += key_.token, at_value += value_.token) {
        rows.key[static_cast<std::size_t>(k)] = at_key;
        rows.value[static_cast<std::size_t>(k)] = at_value;
      }
    }
    const auto used = static_cast<std::size_t>(k);
    std::fill(rows.key.begin() + used, rows.key.end(), rows.key[used - 1]);
    std::fill(rows.value.begin() + used, rows.value.end(), rows.value[used - 1]);
  }

 private:
  // A plane of one head, in bytes.
  struct HeadPlane {
    const std::byte* base = nullptr;
    std::int64_t block = 0;
    std::int64_t token = 0;
  };

  static HeadPlane plane_at(const KvPlane& plane, std::int64_t head) {
    const std::int64_t bytes = size_of(plane.dtype);
    return {static_cast<const std::byte*>(plane.data) + head * plane.stride_head * bytes,
            plane.stride_block * bytes, plane.stride_token * bytes};
  }

  const KvCacheView& cache_;
  HeadPlane key_;
  HeadPlane value_;
  const std::int32_t* blocks_ = nullptr;  // null: dense
  std::int64_t first_token_ = 0;
};

// Per row what it sees and what its scores depend on; arrays of the tile's rows rounded up, zeros
// past them.
struct RowInfo {
  std::int32_t* prefix_end = nullptr;
  std::int32_t* begin = nullptr;
  std::int32_t* end = nullptr;
  std::int32_t* position = nullptr;  // p
  float* slope = nullptr;            // ALiBi

  RowInfo() = default;
  RowInfo(core::Layout& take, std::int64_t width)
      : prefix_end(take.take<std::int32_t>(width)),
        begin(take.take<std::int32_t>(width)),
        end(take.take<std::int32_t>(width)),
        position(take.take<std::int32_t>(width)),
        slope(take.take<float>(width)) {}

  // The same from row `row` on.
  RowInfo from(std::int64_t row) const {
    RowInfo rest;
    rest.prefix_end = prefix_end + row;
    rest.begin = begin + row;
    rest.end = end + row;
    rest.position = position + row;
    rest.slope = slope + row;
    return rest;
  }
};

// What is done to the scores of a block besides scaling.
struct ScoreRules {
  float soft_cap = 0.0F;
  bool alibi = false;
  bool alibi_sqrt = false;
  std::int32_t context_len = 0;

  bool any() const { return soft_cap > 0.0F || alibi; }
};

// What is fetched at a time, in elements, and what queries by row are padded to with zeros.
inline constexpr std::int64_t kFetchUnit = 32;
constexpr std::int64_t padded_to_unit(std::int64_t n) {
  return (n + kFetchUnit - 1) / kFetchUnit * kFetchUnit;
}

// A wide tile's memory over all its blocks. `width`: its rows rounded up to whole vectors; a group
// of rows is up to `group_width` of them.
struct WideState {
  // [head_size_qk, rows] by groups; or pairs [head_size_qk / 2, rows], one part or two; or
  // as row_word_at() says
  float* query;
  float* acc;         // [head_size_v, rows] by groups; or, summed by rows, [rows, head_size_v]
  float* folded;      // as acc: what was accumulated before the last fold
  float* max;         // [width]
  float* sum;         // [width]
  float* folded_max;  // [width]
  float* folded_sum;  // [width]
  RowInfo rows;       // [width] each

  WideState(core::Layout& take, std::int64_t width, std::int64_t head_size_qk,
            std::int64_t head_size_v)
      : query(take.take<float>(width * head_size_qk)),
        acc(take.take<float>(width * head_size_v)),
        folded(take.take<float>(width * head_size_v)),
        max(take.take<float>(width)),
        sum(take.take<float>(width)),
        folded_max(take.take<float>(width)),
        folded_sum(take.take<float>(width)),
        rows(take, width) {}
};

// Neighbouring columns of the values of a block, converted to fp32.
inline constexpr std::int64_t kValueColumns = 16;
// Where value column c of key k of a block is. A key more than a block has keeps the columns of a
// key from falling into one set of the cache.
constexpr std::int64_t value_at(std::int64_t k, std::int64_t c) {
  return (c / kValueColumns * (kBlockKeys + 1) + k) * kValueColumns + c % kValueColumns;
}

// A wide tile's memory for the block at hand.
struct WideBlock {
  float* keys;    // [kBlockKeys, head_size_qk], or a few; or bf16, twice as many
  float* values;  // as value_at says; or [kBlockKeys, head_size_v], or pairs, two parts
  float* scores;  // [kBlockKeys, rows of a group]
  // Pairs of probabilities, [kBlockKeys / 2, rows of a group] or, turned, by rows; two parts.
  std::uint32_t* weights;
  float* keep;  // [rows of a group]
  float* rows;  // four rows of queries or values

  WideBlock(core::Layout& take, std::int64_t group_width, std::int64_t head_size_qk,
            std::int64_t head_size_v)
      : keys(take.take<float>(kBlockKeys * head_size_qk)),
        values(take.take<float>(value_at(0, head_size_v + kValueColumns - 1))),
        scores(take.take<float>(kBlockKeys * group_width)),
        weights(take.take<std::uint32_t>(kBlockKeys * group_width)),
        keep(take.take<float>(group_width)),
        rows(take.take<float>(4 * std::max(head_size_qk, head_size_v))) {}
};

// A narrow tile's memory over all its blocks; head sizes are padded to whole vectors.
struct NarrowState {
  float* query;   // [padded head_size_qk / chunk, rows, chunk]; a chunk is a vector
  float* acc;     // [rows, padded head_size_v]
  float* folded;  // as acc: what was accumulated before the last fold
  RowInfo info;   // [rows] each

  NarrowState(core::Layout& take, std::int64_t rows, std::int64_t padded_qk, std::int64_t padded_v)
      : query(take.take<float>(rows * padded_qk)),
        acc(take.take<float>(rows * padded_v)),
        folded(take.take<float>(rows * padded_v)),
        info(take, rows) {}
};

// A narrow tile's memory for the block at hand.
struct NarrowBlock {
  float* scores;           // [rows, kBlockKeys]
  std::uint16_t* weights;  // [rows, kBlockKeys]: bf16 probabilities
  std::uint16_t* values;   // [kBlockKeys, padded head_size_v]: bf16, where some are not finite

  NarrowBlock(core::Layout& take, std::int64_t rows, std::int64_t padded_v)
      : scores(take.take<float>(rows * kBlockKeys)),
        weights(take.take<std::uint16_t>(rows * kBlockKeys)),
        values(take.take<std::uint16_t>(kBlockKeys * padded_v)) {}
};

// One KV head, the `head`-th, of a piece of a tile.
class TileBase {
 public:
  TileBase(const AttendCall& call, const plan::Piece& piece, std::int64_t head)
      : params_(*call.params),
        args_(*call.args),
        call_(call),
        piece_(piece),
        head_of_tile_(head),
        kv_head_(piece.tile.kv_head + head),
        seq_(plan::seq_mask(call.schedule, piece.seq)),
        source_(*call.args, piece.seq, kv_head_) {}

  // Finds the rows of virtual block v, which rows(v) then has until kBlocksFound more are found.
  void find(std::int32_t v) { source_.locate(piece_.tile.keys_at(v), found(v)); }
  // The same from what another head of the tile has found: one walk over the pages serves all.
  void find_as(const TileBase& other, std::int32_t v) {
    const KvCacheView& cache = args_.cache;
    const std::int64_t heads = kv_head_ - other.kv_head_;
    const std::int64_t to_key = heads * cache.key.stride_head * size_of(cache.key.dtype);
    const std::int64_t to_value = heads * cache.value.stride_head * size_of(cache.value.dtype);
    const BlockRows& from = other.rows(v);
    BlockRows& to = found(v);
    to.range = from.range;
    for (std::size_t k = 0; k < to.key.size(); ++k) {
      to.key[k] = from.key[k] + to_key;
      to.value[k] = from.value[k] + to_value;
    }
  }
  const BlockRows& rows(std::int32_t v) const { return found_[v % kBlocksFound]; }

 protected:
  std::int64_t num_rows() const { return piece_.tile.num_rows; }
  // The row's query token within its sequence.
  std::int32_t index_of(std::int64_t row) const {
    return static_cast<std::int32_t>((piece_.tile.first_row + row) / call_.schedule.group);
  }
  std::int64_t token_of(std::int64_t row) const {
    return std::int64_t{call_.schedule.tables.query_start_loc[piece_.seq]} + index_of(row);
  }
  std::int64_t head_of(std::int64_t row) const {
    return kv_head_ * call_.schedule.group + (piece_.tile.first_row + row) % call_.schedule.group;
  }
  const std::byte* query_of(std::int64_t row) const {
    const ConstTensorView& query = args_.query;
    return static_cast<const std::byte*>(query.data) +
           (token_of(row) * query.strides[0] + head_of(row) * query.strides[1]) *
               size_of(query.dtype);
  }
  // What the query is multiplied with before its products.
  float query_scale() const {
    const float q_scale =
        params_.q_scale.given() ? *static_cast<const float*>(params_.q_scale.data) : 1.0F;
    return params_.scale * q_scale * scale_of(args_.cache.k_scale, kv_head_);
  }

  ScoreRules score_rules() const {
    return {params_.soft_cap, params_.alibi_slopes.given(), params_.alibi_sqrt,
            static_cast<std::int32_t>(seq_.context_len())};
  }

  void find_rows(std::int64_t width, const RowInfo& info) {
    info_ = info;
    for (std::int32_t* array : {info_.prefix_end, info_.begin, info_.end, info_.position}) {
      std::fill_n(array, width, 0);
    }
    std::fill_n(info_.slope, width, 0.0F);
    all_see_.prefix_end = all_see_.end = seq_.seq_len;
    for (std::int64_t row = 0; row < num_rows(); ++row) {
      const core::RowKeys keys = core::row_keys(call_.schedule.mask, seq_, index_of(row));
      info_.prefix_end[row] = keys.prefix_end;
      info_.begin[row] = keys.begin;
      info_.end[row] = keys.end;
      info_.position[row] = static_cast<std::int32_t>(seq_.context_len()) + index_of(row);
      if (params_.alibi_slopes.given()) {
        info_.slope[row] = static_cast<const float*>(
            params_.alibi_slopes.data)[head_of(row) * params_.alibi_slopes.strides[0]];
      }
      all_see_.prefix_end = std::min(all_see_.prefix_end, keys.prefix_end);
      all_see_.begin = std::max(all_see_.begin, keys.begin);
      all_see_.end = std::min(all_see_.end, keys.end);
    }
  }

  // Whether no row is blind to a key of the range.
  bool seen_by_all(KeyRange range) const {
    return (range.begin >= all_see_.begin && range.end <= all_see_.end) ||
           range.end <= all_see_.prefix_end;
  }

  // Adds qq_bias[i, j - context_len] to the scores of `count` rows from first_row on; score (key,
  // row) is at scores[(key - range.begin) * key_stride + row * row_stride]. Returns whether any of
  // the table was in reach.
  bool add_qq_bias(KeyRange range, std::int64_t first_row, std::int64_t count, float* scores,
                   std::int64_t key_stride, std::int64_t row_stride) const {
    const KeyRange biased = biased_keys(range);
    for (std::int64_t row = 0; row < count; ++row) {
      for (std::int64_t key = biased.begin; key < biased.end; ++key) {
        const float x = qq_bias_at(first_row + row, key);
        float& score = scores[(key - range.begin) * key_stride + row * row_stride];
        score = x == core::kNegInf ? x : score + x;  // -inf hides the key, whatever its score
      }
    }
    return biased.begin < biased.end;
  }

  // Sets the probabilities of hidden keys to -0, which no exp gives, so that they can be left out
  // of a sum instead of being multiplied by zero. Layout as in add_qq_bias.
  void mark_hidden(KeyRange range, std::int64_t first_row, std::int64_t count, float* p,
                   std::int64_t key_stride, std::int64_t row_stride) const {
    const KeyRange biased = biased_keys(range);
    for (std::int64_t row = 0; row < count; ++row) {
      const std::int64_t r = first_row + row;
      for (std::int32_t key = range.begin; key < range.end; ++key) {
        const bool seen =
            key < info_.prefix_end[r] || (key >= info_.begin[r] && key < info_.end[r]);
        const bool masked =
            key >= biased.begin && key < biased.end && qq_bias_at(r, key) == core::kNegInf;
        if (!seen || masked) p[(key - range.begin) * key_stride + row * row_stride] = -0.0F;
      }
    }
  }

  // Finishes a row, which may overwrite its accumulator: to a partial or to the output.
  void finish_row(std::int64_t row, core::SoftmaxState state, float* acc) const {
    const detail::PlanTables& tables = call_.schedule.tables;
    if (piece_.slot >= 0) {
      const std::int64_t at = partial_row(row);
      std::copy_n(acc, args_.cache.head_size_v, tables.partial_acc + at * tables.partial_stride);
      tables.partial_state[at] = state;
    } else if (token_of(row) < tables.num_tokens) {
      write_row(call_, token_of(row), head_of(row), kv_head_, state, acc);
    }
  }

  const AttentionParams& params_;
  const AttendArgs& args_;
  const AttendCall& call_;
  const plan::Piece& piece_;
  std::int64_t head_of_tile_;
  std::int64_t kv_head_;
  core::SeqMask seq_;
  KeySource source_;
  RowInfo info_;

 private:
  // The block at hand and the one that is read next.
  static constexpr std::int32_t kBlocksFound = 2;

  BlockRows& found(std::int32_t v) { return found_[v % kBlocksFound]; }

  std::int64_t partial_row(std::int64_t row) const {
    const std::int32_t tile_class = plan::seq_tiles(call_.schedule, seq_.query_len).tile_class;
    return plan::partial_row(call_.schedule, tile_class, piece_.slot, row, head_of_tile_);
  }

  // Keys of the range that qq_bias has columns for.
  KeyRange biased_keys(KeyRange range) const {
    if (!params_.qq_bias.given()) return {};
    const std::int64_t context_len = seq_.context_len();
    const std::int64_t last = context_len + params_.qq_bias.shape[1];
    const auto clamped = [&](std::int64_t key) {
      return static_cast<std::int32_t>(std::clamp<std::int64_t>(key, range.begin, range.end));
    };
    return {clamped(context_len), clamped(last)};
  }

  // qq_bias of a row and a key of biased_keys; 0 below the table.
  float qq_bias_at(std::int64_t row, std::int64_t key) const {
    const ConstTensorView& bias = params_.qq_bias;
    const std::int64_t i = index_of(row);
    if (i >= bias.shape[0]) return 0.0F;
    return core::load_element(bias.dtype, bias.data,
                              i * bias.strides[0] + (key - seq_.context_len()) * bias.strides[1]);
  }

  std::array<BlockRows, kBlocksFound> found_;
  core::RowKeys all_see_;  // keys that every row sees
};

}  // namespace diffkv::cpu
