// The shapes of the tensor-core kernels: what a thread block holds, and where in shared memory.
// Host and device.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/host_device.h"
#include "cuda/generic/racecheck.h"
#include "diffkv/tensor.h"

namespace diffkv::cuda::mma {

inline constexpr int kWarp = 32;
inline constexpr int kMmaRows = 16;  // rows, and keys, of one instruction
inline constexpr int kMaxStages = 8;
inline constexpr int kMaxQueryBuffers = 4;
// Keys and values are copied in boxes of at least 16 keys and lie in shared memory as slabs of 64
// columns.
inline constexpr int kLeastBoxKeys = 16;
inline constexpr int kSlabColumns = 64;
// Added to each row of queries in shared memory, so that the same columns of 8 neighbouring rows
// lie in different banks.
inline constexpr int kQueryPadding = 16;

// Tiles of 8 columns of sums that a warp gives to each other one at a time.
inline constexpr int kMergeTiles = 2;

// How a block's consumer warps share a tile: kRowWarps x kKeyWarps warps, each with kRowTiles x 16
// rows and kBlockKeys / kKeyWarps keys of every block of keys. Warps that share rows keep partial
// sums of their own, merged at a piece's end. Each key warp's slice of a stage is filled and
// emptied by itself. kProducers more warps copy.
// Of a grid of warpgroups, every four row warps multiply together (see warpgroup.cuh).
template <int kRowWarpsValue, int kKeyWarpsValue, int kRowTilesValue, int kBlockKeysValue,
          int kProducersValue, int kBlocksPerSmValue, bool kWarpgroupsValue = false>
struct WarpGrid {
  static constexpr bool kWarpgroups = kWarpgroupsValue;
  // Bytes whose copies are under way at a time; 0: as many as there is room for. What is asked for
  // beyond what keeps the memory busy waits in a queue, and instructions behind it; and SMs that
  // are served first end first.
  static constexpr int kBytesUnderWay = 0;
  // What a tile's start and end take, in times of half a block of keys.
  static constexpr int kTileCost = 3;
  // Whether the second-level cache is told to evict keys and values first (see kSmKeptBytes), which
  // no other tile may read then.
  static constexpr bool kEvictsFirst = false;
  // Whether balanced shares are made for sms_for_reading() SMs, and not for all.
  static constexpr bool kSparesSms = false;
  static constexpr int kRowWarps = kRowWarpsValue;
  static constexpr int kKeyWarps = kKeyWarpsValue;
  static constexpr int kRowTiles = kRowTilesValue;
  static constexpr int kBlockKeys = kBlockKeysValue;
  static constexpr int kProducers = kProducersValue;
  static constexpr int kBlocksPerSm = kBlocksPerSmValue;  // where they fit

  // Which rows and which keys of a block consumer warp `warp` has.
  DIFFKV_HD static constexpr int row_warp(int warp) {
    return kWarpgroups ? warp % kRowWarps : warp / kKeyWarps;
  }
  DIFFKV_HD static constexpr int key_warp(int warp) {
    return kWarpgroups ? warp / kRowWarps : warp % kKeyWarps;
  }

  static constexpr int kRows = kRowWarps * kRowTiles * kMmaRows;
  static constexpr int kHeads = 1;  // KV heads that row warps are divided among
  static constexpr int kWarpKeys = kBlockKeys / kKeyWarps;
  static constexpr int kConsumers = kRowWarps * kKeyWarps;
  static constexpr int kThreads = (kConsumers + kProducers) * kWarp;
  // Keys of each slice that one producer warp copies where they are copied row by row.
  static constexpr int kProducerKeys = kWarpKeys / kProducers;
  static_assert(kWarpKeys % kLeastBoxKeys == 0 && kProducerKeys % 4 == 0);
  static_assert(kProducerKeys * kKeyWarps <= kWarp && kProducers >= 2);
};

// Warps of a decode tile share nothing but the merge. Two blocks share an SM where shared memory
// holds two stages of each: where tiles are short, one computes while the other starts or ends a
// tile. Values of more than 128 columns leave no room for a second one. Of small heads a block
// computes more keys at a time: else that takes longer than to read them.
template <int kHeadSizeQk, int kHeadSizeV>
using DecodeWarps = std::conditional_t<
    (kHeadSizeV > 128), WarpGrid<1, 4, 1, 64, 2, 1>,
    std::conditional_t<(kHeadSizeQk + kHeadSizeV > 128), WarpGrid<1, 2, 1, 64, 2, 2>,
                       WarpGrid<1, 2, 1, 128, 4, 2>>>;
template <int kHeadSizeQk, int kHeadSizeV>
struct DecodeGrid : DecodeWarps<kHeadSizeQk, kHeadSizeV> {
  static constexpr int kBytesUnderWay =
      80 * 1024 / DecodeWarps<kHeadSizeQk, kHeadSizeV>::kBlocksPerSm;
  static constexpr bool kSparesSms = true;
  static constexpr bool kEvictsFirst = true;
};
// The same rows of four neighbouring KV heads, of which each row warp has one. Their keys are one
// stretch of memory, which is read in longer bursts than four blocks would. Keys and values of few
// bytes are computed twice as many at a time.
template <int kKeyAndValueBytes>
struct HeadsDecodeGrid : WarpGrid<4, 2, 1, kKeyAndValueBytes <= 320 ? 64 : 32, 4, 1> {
  static constexpr int kHeads = 4;
  static constexpr int kBytesUnderWay = 80 * 1024;
  static constexpr bool kSparesSms = true;
  static constexpr bool kEvictsFirst = true;
};
// Up to 4 tokens of a group of 16.
struct WideDecodeGrid : WarpGrid<4, 2, 1, 64, 4, 1> {
  static constexpr int kBytesUnderWay = 60 * 1024;
  static constexpr int kTileCost = 12;
};
// The same in longer blocks, of whose instructions more are products, for memory that is faster
// than those of short ones. They take longer to start and to end, and the shared memory of sm_90 or
// sm_100.
struct LongWideDecodeGrid : WarpGrid<4, 2, 1, 128, 4, 1> {
  static constexpr int kBytesUnderWay = 80 * 1024;
  static constexpr int kTileCost = 12;
};
// What sm_90a takes instead of both where its shared memory holds two stages of it: two warpgroups,
// each of which has keys of its own and reads, or converts, them once for all rows.
struct GroupWideDecodeGrid : WarpGrid<4, 2, 1, 128, 4, 1, true> {
  static constexpr int kBytesUnderWay = 80 * 1024;
  static constexpr bool kSparesSms = true;
};
inline constexpr double kFastMemory = 4.2e12;  // bytes/s; an H100 has 3.4e12, an H200 4.9e12
using PrefillGrid = WarpGrid<8, 1, 1, 64, 4, 1>;
// Half the reads of keys and values from shared memory; needs registers that only sm_90a can move.
using TallPrefillGrid = WarpGrid<8, 1, 2, 64, 4, 1>;
// What sm_90a takes instead where it can multiply what the cache stores, and the sums leave
// registers for queries.
using GroupPrefillGrid = WarpGrid<8, 1, 1, 64, 4, 1, true>;

// Keys and values that no other tile reads need not stay in the second-level cache, which is told
// to evict them first, so that what is used again stays: instructions, and until later what kernels
// before have written. That is then written back bit by bit, between reads, which takes longer than
// at once. So an SM that reads much keeps its first kSmKeptBytes as usual, which force it out. One
// that reads up to kSmMoreBytes has ended before most of it has to go, and keeps its first keys
// alone, or, up to kSmFewBytes, none. Measured on compute capability 9.0, whose cache has 50 MB.
inline constexpr int kSmFewBytes = 1'000'000;
inline constexpr int kSmMoreBytes = 2'200'000;
inline constexpr int kSmKeptBytes = 1'250'000;

// SMs of `num_sms` for whose blocks shares are made, which read as fast as all do: at most one in
// 32 is left out. A multiple of 16 cuts many batches evenly, and the hardware leaves SMs of the
// largest clusters free, or with one block instead of two, whose SMs have the least of the memory's
// rate.
constexpr int sms_for_reading(int num_sms) {
  const int spare = num_sms % 16;
  return spare * 32 <= num_sms ? num_sms - spare : num_sms;
}

// Keys and values as warpgroups multiply them: the places that row_of_key() and chunk_at() give are
// as those of a Tile, of one KV head and 2-byte elements.
template <int kGroupKeysValue, int kKeySlabs, int kValueSlabs>
struct WarpgroupOperands {
  static constexpr int kGroupKeys = kGroupKeysValue;
  static constexpr int kSlabRowBytes = kSlabColumns * 2;
  static constexpr int kSlabChunks = kSlabRowBytes / 16;
  static constexpr int kSlabBytes = kGroupKeys * kSlabRowBytes;
  static constexpr int kValuesInGroup = kKeySlabs * kSlabBytes;
  static constexpr int kGroupBytes = kValuesInGroup + kValueSlabs * kSlabBytes;
};

// One kernel: a warp grid, the type of the cache, and the head sizes it has room for. True sizes
// may be smaller. Queries are of the cache's type or, with fp8, of any type of 1 or 2 bytes: they
// become fp16 once a piece.
template <class GridType, DType kStoredValue, int kHeadSizeQkValue, int kHeadSizeVValue>
struct Tile {
  using Grid = GridType;
  static constexpr DType kStored = kStoredValue;  // K and V in the cache
  static constexpr int kHeadSizeQk = kHeadSizeQkValue;
  static constexpr int kHeadSizeV = kHeadSizeVValue;
  static constexpr bool kFp8 = is_fp8(kStored);
  // fp8 keys and values are multiplied as fp16, which holds all of them.
  static constexpr bool kHalf = kFp8 || kStored == DType::kF16;
  static_assert(kHeadSizeQk % kSlabColumns == 0 && kHeadSizeV % kSlabColumns == 0);

  // Sums of two row tiles, or of more than 128 columns, need more registers than twelve warps have:
  // the consumers are given some of the producers'.
  static constexpr bool kManySums = Grid::kRowTiles > 1 || kHeadSizeV > 128;
  static constexpr bool kGiveRegisters =
      (kManySums || Grid::kWarpgroups) && Grid::kConsumers + Grid::kProducers == 12;
  // Of a thread then; twelve warps start with 168, and eight of them consume.
  static constexpr int kConsumerRegisters =
      !Grid::kWarpgroups ? 224 : (Grid::kKeyWarps > 1 ? 184 : 208);
  static constexpr int kProducerRegisters = 3 * 168 - 2 * kConsumerRegisters;
  // Whether producers have enough to go through what consumers do when they merge tiles.
  static constexpr bool kRehearses = !kGiveRegisters || kProducerRegisters >= 128;

  static constexpr int kStoredBytes = kFp8 ? 1 : 2;
  static constexpr int kSlabRowBytes = kSlabColumns * kStoredBytes;  // of one key
  static constexpr int kSlabChunks = kSlabRowBytes / 16;
  static constexpr int kHeads = Grid::kHeads;
  static constexpr int kHeadRows = Grid::kRows / kHeads;  // rows of a tile's KV head
  // A group of keys: the slabs of their keys, head by head, then those of their values. Large ones
  // are multiplied in fewer instructions, small ones copied in fewer where pages are small.
  static constexpr int kGroupKeys =
      Grid::kWarpgroups && Grid::kKeyWarps == 1 ? Grid::kBlockKeys : kLeastBoxKeys;
  static constexpr int kSlabBytes = kGroupKeys * kSlabRowBytes;
  static constexpr int kKeySlabs = kHeadSizeQk / kSlabColumns;
  static constexpr int kValueSlabs = kHeadSizeV / kSlabColumns;
  // Whether columns of queries and sums have another order than those of the cache, see
  // fragments.cuh.
  static constexpr bool kMixesColumns = kFp8 && !Grid::kWarpgroups;
  // Warpgroups multiply 16-bit types as they are stored; others they convert first.
  static constexpr bool kConverts = kFp8 && Grid::kWarpgroups;
  using Operands =
      WarpgroupOperands<kConverts ? Grid::kWarpKeys : kGroupKeys, kKeySlabs, kValueSlabs>;
  static constexpr int kConvertedBytes = kConverts ? Grid::kKeyWarps * Operands::kGroupBytes : 0;
  static constexpr int kKeyHeadBytes = kKeySlabs * kSlabBytes;  // from one KV head to the next
  static constexpr int kValueHeadBytes = kValueSlabs * kSlabBytes;
  static constexpr int kValuesInGroup = kHeads * kKeyHeadBytes;
  static constexpr int kGroupBytes = kValuesInGroup + kHeads * kValueHeadBytes;
  static constexpr int kStageBytes = Grid::kBlockKeys / kGroupKeys * kGroupBytes;
  // Slices of stages whose copies are under way at a time, where they are limited.
  static constexpr int kSliceBytes = kStageBytes / Grid::kKeyWarps;
  static constexpr int kSlicesUnderWay =
      Grid::kBytesUnderWay < 2 * kSliceBytes ? 2 : Grid::kBytesUnderWay / kSliceBytes;
  // How many blocks of keys a thread block copies before it says that the second-level cache shall
  // evict what follows first, if its share costs so much, the starts of tiles taken for keys.
  DIFFKV_HD static constexpr int kept_blocks(std::int32_t share_cost, std::int32_t block_cost) {
    constexpr int kSmBlockBytes = kStageBytes * Grid::kBlocksPerSm;
    if (share_cost <= kSmFewBytes / kSmBlockBytes * block_cost) return 0;
    if (share_cost <= kSmMoreBytes / kSmBlockBytes * block_cost) return 1;
    return kSmKeptBytes / kSmBlockBytes;
  }
  static constexpr int kQueryPitch = kHeadSizeQk * 2 + kQueryPadding;
  static constexpr int kQueryBytes = kQueryPitch * Grid::kRows;
  // Of the sums that warps with the same rows exchange at a time: kMergeTiles tiles of 16 x 8.
  static constexpr int kMergeBytes =
      Grid::kConsumers * (Grid::kKeyWarps - 1) * kMergeTiles * kMmaRows * 8 * 4;
};

// Where the slab rows of a key begin in a stage: those of its first 64 columns; its value's after
// kValuesInGroup.
template <class T>
DIFFKV_HD constexpr int row_of_key(int key) {
  return key / T::kGroupKeys * T::kGroupBytes + key % T::kGroupKeys * T::kSlabRowBytes;
}

// Where 16 bytes of a key are in a stage, or of its value after kValuesInGroup: chunk `chunk` of
// key `key` of the block. Chunks of a slab's row are permuted as tensor copies permute them
// ("swizzle": exclusive or with bits 7 and up of the address), so that the same chunk of 8
// neighbouring keys lies in different banks.
template <class T>
DIFFKV_HD constexpr int chunk_at(int key, int chunk) {
  const int row = key % T::kGroupKeys;
  const int turn = row * T::kSlabRowBytes / 128 % T::kSlabChunks;
  return key / T::kGroupKeys * T::kGroupBytes + chunk / T::kSlabChunks * T::kSlabBytes +
         row * T::kSlabRowBytes + (chunk % T::kSlabChunks ^ turn) * 16;
}

// What a block has shared memory for.
struct Depth {
  std::int32_t stages = 0;         // blocks of keys loaded ahead
  std::int32_t query_buffers = 0;  // tiles' queries, likewise
};

// What one piece's consumers need to know, made by the producer.
template <int kRows, int kHeads>
struct alignas(16) PieceInfo {
  static constexpr int kHeadRows = kRows / kHeads;
  DIFFKV_HD static constexpr int head_of(int row) { return row / kHeadRows; }
  DIFFKV_HD static constexpr int row_in_head(int row) { return row % kHeadRows; }
  DIFFKV_HD bool has(int row) const { return row_in_head(row) < num_rows; }

  // What its first block needs: there with its queries.
  std::int32_t first_row;
  std::int32_t num_rows;     // of each KV head
  std::int32_t context_len;  // only where there are slopes or qq_bias
  float score_scale[kHeads];
  // What each row sees; its ALiBi slope; what its query was multiplied with.
  std::int32_t prefix_end[kRows];
  std::int32_t begin[kRows];
  std::int32_t end[kRows];
  float slope[kRows];
  float query_factor[kRows];

  // What its end needs: there when it is described.
  std::int64_t partial_row;  // of its first row, if it has a slot
  std::int32_t kv_head;      // the first
  std::int32_t slot;
  std::int32_t cut;          // which of Shared::cut_pieces, if it has a slot
  std::int32_t first_token;  // of the sequence
  float value_scale[kHeads];
  // Where each row of the output is, in bytes from its start; -1: nowhere. Its sink.
  std::int64_t output_at[kRows];
  float sink[kRows];
};

// Parts of a cut tile at most, and so shares of a class.
inline constexpr int kMostParts = 512;

// One of the two pieces of cut tiles that a share may have, for the merge of its tile.
struct alignas(16) CutPiece {
  enum Merger : std::int32_t { kNobody, kThisBlock, kAllBlocks };

  std::int32_t blocks;  // 0: there is none
  std::int32_t blocks_of_tile;
  std::int32_t seq;
  std::int32_t line_index;
  std::int32_t first_worker;  // that has the tile's first piece
  std::int32_t slot;
  std::int32_t first_token;  // of the sequence
  std::int32_t kv_head;
  std::int32_t first_row;
  std::int32_t num_rows;
  Merger merger;  // known when the block has met others
  // How many parts the tile has, and which one this is. The blocks of parts [0, mergers) merge a
  // divided tile: all, or all but the last, whose block goes on with other tiles.
  std::int32_t parts;
  std::int32_t part;
  std::int32_t mergers;
  // Of a tile of many parts: lanes that have some columns of a row between them; else 0.
  std::int32_t lanes;
  bool waits;  // whether the tile is divided: those blocks wait for all parts

  // A load of its own: with its neighbours, the compiler would load it before it is known.
  DIFFKV_HD Merger known_merger() const { return *static_cast<const volatile Merger*>(&merger); }
};

enum StageFlags : std::int32_t { kLastOfPiece = 1, kNoMoreWork = 2 };

// Of a slice of a stage, too.
struct StageInfo {
  std::int32_t first_key;  // of the block
  std::int32_t begin;      // keys that were asked for
  std::int32_t end;
  std::int32_t flags;
};

// Offsets in a block's shared memory.
template <class T>
struct SharedLayout {
  using Piece = PieceInfo<T::Grid::kRows, T::kHeads>;

  DIFFKV_HD constexpr explicit SharedLayout(Depth depth)
      : converted(depth.stages * T::kStageBytes),
        queries(converted + T::kConvertedBytes),
        merge(queries + depth.query_buffers * T::kQueryBytes),
        pieces(merge + T::kMergeBytes),
        row_max(pieces + depth.query_buffers * static_cast<int>(sizeof(Piece))),
        row_sum(row_max + kRowFloats),
        stage_infos(row_sum + kRowFloats),
        barriers(stage_infos + kSlices * static_cast<int>(sizeof(StageInfo))),
        cut_pieces(barriers + (2 * kSlices + 3 * kMaxQueryBuffers) * 8),
        part_slots(cut_pieces + 2 * static_cast<int>(sizeof(CutPiece))),
        counted(part_slots + 2 * kMostParts * 2),
        began(counted + 3 * 8 + kRacecheckBytes),
        bytes(began + 8) {}

  static constexpr int kRacecheckBytes =
      kForRacecheck ? static_cast<int>(sizeof(RacecheckMemory)) : 0;
  static constexpr int kSlices = kMaxStages * T::Grid::kKeyWarps;
  static constexpr int kRowFloats = T::Grid::kKeyWarps * T::Grid::kRows * 4;

  int converted;
  int queries;
  int merge;
  int pieces;
  int row_max;
  int row_sum;
  int stage_infos;
  int barriers;
  int cut_pieces;
  int part_slots;
  int counted;
  int began;
  int bytes;
};

// Whether code for compute capability `major`.x has the kernel of a tile; the others' are empty.
// What the compiler leaves out and what the host launches both follow from this.
inline constexpr int kHopper = 9;
inline constexpr int kHopperSharedBytes = 227 * 1024;  // that a block of 9.0 may have
inline constexpr int kBlackwell = 10;
template <class T>
DIFFKV_HD constexpr bool has_kernel(int major) {
  using GroupWide = Tile<GroupWideDecodeGrid, T::kStored, T::kHeadSizeQk, T::kHeadSizeV>;
  const bool hopper = major == kHopper && T::kHeadSizeV <= 128;
  const bool wide_groups = hopper && SharedLayout<GroupWide>({2, 1}).bytes <= kHopperSharedBytes;
  if (T::Grid::kHeads > 1) return major >= kHopper && T::kHeadSizeV <= 128;
  if (T::Grid::kRows == WideDecodeGrid::kRows) {
    if (T::Grid::kWarpgroups) return wide_groups;
    const bool is_long = std::is_same_v<typename T::Grid, LongWideDecodeGrid>;
    return is_long ? major == kBlackwell && T::kHeadSizeV <= 128 : !wide_groups;
  }
  const bool groups = hopper && !T::kFp8;
  const bool tall = hopper && T::kFp8;
  if (T::Grid::kWarpgroups) return groups;
  if (T::Grid::kRows == TallPrefillGrid::kRows) return tall;
  if (T::Grid::kRows == PrefillGrid::kRows) return !tall && !groups;
  return true;
}

}  // namespace diffkv::cuda::mma
