// Plans of made-up batches, masks and tile classes: make_plan refuses with diffkv::Error or makes a
// plan whose work items stay in range and give every row of every head to exactly one tile.
#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "arena.h"
#include "bytes.h"
#include "diffkv/diffkv.h"

namespace diffkv::fuzz {
namespace {

// The CPU's planner with limits of the fuzzer's choice.
class LimitsBackend final : public Backend {
 public:
  LimitsBackend(const Backend& base, const ScheduleLimits& limits) : base_(base), limits_(limits) {}

  std::string_view name() const override { return "limits"; }
  DeviceType device_type() const override { return DeviceType::kCpu; }
  std::string description() const override { return "plans only"; }
  Support available() const override { return {true, "", "none"}; }
  Support supports(const Problem&) const override { return {false, "plans only", ""}; }
  ScheduleLimits limits(const PlanKey&, std::int32_t) const override { return limits_; }
  void* allocate(std::int64_t bytes, const Device& device) const override {
    return base_.allocate(bytes, device);
  }
  void deallocate(void* data, const Device& device) const noexcept override {
    base_.deallocate(data, device);
  }
  void copy_to_device(void*, const void*, std::int64_t, const Device&, Stream) const override {}
  void copy_to_host(void*, const void*, std::int64_t, const Device&, Stream) const override {}
  void fill_bytes(void*, std::uint8_t, std::int64_t, const Device&, Stream) const override {}
  void synchronize(const Device&, Stream) const override {}
  void plan(const PlanKey& key, const ScheduleLimits& limits, const Batch& batch,
            detail::PlanTables& tables, Stream stream) const override {
    base_.plan(key, limits, batch, tables, stream);
  }
  void update_cache(const ConstTensorView&, const ConstTensorView&, const KvCacheView&,
                    const ConstTensorView&, Stream) const override {}
  bool attend(const AttentionParams&, const AttendArgs&, const Plan&, Stream) const override {
    return false;
  }
  void combine(const AttentionParams&, const AttendArgs&, const Plan&, Stream) const override {}
  void merge_attn_states(const AttnState&, const AttnState&, const ConstTensorView&,
                         const TensorView&, const TensorView&, Stream) const override {}
  void fill_zero(const TensorView&, Stream) const override {}

 private:
  const Backend& base_;
  ScheduleLimits limits_;
};

ScheduleLimits make_limits(Bytes& bytes) {
  ScheduleLimits limits;
  limits.num_classes = static_cast<std::int32_t>(bytes.range(1, kMaxTileClasses));
  limits.threads = static_cast<std::int32_t>(bytes.range(1, 4));
  limits.scratch_bytes = bytes.range(0, 100);
  const auto small = [&](std::int64_t most) {
    return static_cast<std::int32_t>(bytes.range(1, most));
  };
  std::int32_t least_rows = 0;
  for (std::int32_t c = 0; c < limits.num_classes; ++c) {
    TileClass& cls = limits.classes[static_cast<std::size_t>(c)];
    cls.tile_rows = small(70);
    cls.max_seq_rows = least_rows += small(40);
    cls.takes_smaller = bytes.range(0, 1) == 1;
    cls.block_keys = 1 << bytes.range(3, 8);
    cls.workers = small(40);
    cls.tile_cost = small(50);
    cls.block_cost = small(20);
    cls.least_cut = small(8);
    cls.uncut_per_share = small(32);
    cls.least_share_cost = static_cast<std::int32_t>(bytes.range(0, 2000));
    cls.invariant_max_tiles = small(6);
    cls.invariant_max_pieces = static_cast<std::int32_t>(bytes.range(1, 20));
    cls.invariant_least_keys = 256 << bytes.range(0, 3);
  }
  return limits;
}

PlanKey make_key(Bytes& bytes) {
  PlanKey key;
  key.num_kv_heads = bytes.range(1, 4);
  key.num_heads = key.num_kv_heads * bytes.range(1, 20);
  key.head_size_qk = 192;
  key.head_size_v = 8 * bytes.range(1, 8);
  const auto width = [&] {
    return static_cast<std::int32_t>(bytes.one_in(10) ? bytes.odd_number() : bytes.range(1, 300));
  };
  key.mask.causal = !bytes.one_in(3);
  if (bytes.one_in(3)) key.mask.window = width();
  if (bytes.one_in(5)) key.mask.chunk_size = width();
  if (key.mask.chunk_size > 0 && bytes.one_in(2)) key.mask.chunk_lookback = width();
  if (key.mask.chunk_size <= 0 && bytes.one_in(4)) key.mask.prefix_window = width();
  key.mm_ranges = bytes.one_in(3);
  key.mask.clamp_mm_ranges = key.mm_ranges && bytes.one_in(2);
  key.causal_per_seq = bytes.one_in(4);
  if (bytes.one_in(2)) key.policy = SchedulePolicy::kBatchInvariant;
  return key;
}

// A batch and the arrays it points to.
struct OwnedBatch {
  std::vector<std::int32_t> query_start_loc{0};
  std::vector<std::int32_t> seq_lens;
  std::vector<std::int32_t> prefix_lens;
  std::vector<std::int32_t> mm_ranges;
  std::unique_ptr<bool[]> causal;
  Batch batch;
};

OwnedBatch make_batch(Bytes& bytes, const PlanKey& key, const PlanMaxima& maxima) {
  OwnedBatch owned;
  const std::int64_t num_seqs = bytes.range(0, std::min<std::int64_t>(maxima.max_seqs, 12));
  const std::int64_t num_ranges = bytes.range(0, std::min<std::int64_t>(maxima.max_mm_ranges, 3));
  owned.causal = std::make_unique<bool[]>(static_cast<std::size_t>(num_seqs) + 1);
  for (std::int64_t s = 0; s < num_seqs; ++s) {
    const std::int64_t most = bytes.one_in(3) ? 200 : 6;
    const std::int64_t query_len = bytes.range(0, most);
    owned.query_start_loc.push_back(owned.query_start_loc.back() +
                                    static_cast<std::int32_t>(query_len));
    const std::int64_t longest = bytes.one_in(4) ? maxima.max_seq_len : 900;
    owned.seq_lens.push_back(static_cast<std::int32_t>(bytes.range(0, longest)));
    owned.prefix_lens.push_back(
        static_cast<std::int32_t>(bytes.one_in(10) ? bytes.odd_number() : bytes.range(0, longest)));
    owned.causal[static_cast<std::size_t>(s)] = bytes.one_in(2);
    for (std::int64_t r = 0; r < 2 * num_ranges; ++r) {
      owned.mm_ranges.push_back(static_cast<std::int32_t>(
          bytes.one_in(12) ? bytes.odd_number() : r * 150 + bytes.range(0, 180)));
    }
  }
  Batch& batch = owned.batch;
  batch.num_seqs = num_seqs;
  batch.num_actual_tokens = owned.query_start_loc.back();
  batch.query_start_loc = view_of(owned.query_start_loc.data(), {num_seqs + 1});
  batch.seq_lens = view_of(owned.seq_lens.data(), {num_seqs});
  if (key.causal_per_seq) batch.causal_per_seq = view_of(owned.causal.get(), {num_seqs});
  if (key.mask.prefix_window > 0) batch.prefix_lens = view_of(owned.prefix_lens.data(), {num_seqs});
  if (key.mm_ranges) {
    batch.mm_ranges = view_of(owned.mm_ranges.data(), {num_seqs, num_ranges, 2});
  }
  return owned;
}

void require(bool holds, const std::string& what) {
  if (!holds) throw std::logic_error(what);
}

void check_item(const WorkItem& item, const OwnedBatch& owned, const Plan& plan) {
  const PlanKey& key = plan.key();
  const auto s = static_cast<std::size_t>(item.seq);
  require(item.seq >= 0 && item.seq < owned.batch.num_seqs, "sequence out of range");
  require(item.tile_class >= 0 && item.tile_class < plan.limits().num_classes, "tile class");
  const TileClass& cls = plan.limits().classes[static_cast<std::size_t>(item.tile_class)];
  require(item.worker >= 0 && item.worker < cls.workers, "worker");
  require(item.kv_head >= 0 && item.kv_head < key.num_kv_heads, "KV head");
  const std::int64_t rows = (owned.query_start_loc[s + 1] - owned.query_start_loc[s]) * key.group();
  require(item.num_rows > 0 && item.num_rows <= cls.tile_rows && item.first_row >= 0 &&
              std::int64_t{item.first_row} + item.num_rows <= rows,
          "rows out of range");
  require(item.slot >= -1 && item.slot < plan.tables().num_slots, "slot out of range");
  std::int32_t below = 0;
  for (const KeyRange& range : item.keys) {
    if (range.begin >= range.end) continue;
    require(range.begin >= below && range.end <= owned.seq_lens[s], "keys out of range");
    below = range.end;
  }
}

// Rows of a tile by (sequence, KV head, first row): all pieces of a tile have the same rows, one
// piece without a slot or several with slots of their own, and tiles follow each other seamlessly.
void check_cover(const std::vector<WorkItem>& items, const OwnedBatch& owned, const Plan& plan) {
  struct Tile {
    std::int32_t num_rows = 0;
    int whole = 0;
    int cut = 0;
  };
  std::map<std::tuple<std::int32_t, std::int32_t, std::int32_t>, Tile> tiles;
  std::set<std::int32_t> slots;
  for (const WorkItem& item : items) {
    check_item(item, owned, plan);
    Tile& tile = tiles[{item.seq, item.kv_head, item.first_row}];
    require(tile.num_rows == 0 || tile.num_rows == item.num_rows, "pieces of one tile differ");
    tile.num_rows = item.num_rows;
    ++(item.slot < 0 ? tile.whole : tile.cut);
    require(item.slot < 0 || slots.insert(item.slot).second, "a slot is used twice");
  }
  for (std::int32_t s = 0; s < owned.batch.num_seqs; ++s) {
    const auto i = static_cast<std::size_t>(s);
    const std::int64_t rows =
        (owned.query_start_loc[i + 1] - owned.query_start_loc[i]) * plan.key().group();
    for (std::int32_t head = 0; head < plan.key().num_kv_heads; ++head) {
      std::int32_t next = 0;
      while (next < rows) {
        const auto found = tiles.find({s, head, next});
        require(found != tiles.end(), "a row has no tile");
        const Tile& tile = found->second;
        require((tile.whole == 1 && tile.cut == 0) || (tile.whole == 0 && tile.cut >= 2),
                "a tile is neither whole nor cut into slots");
        next += tile.num_rows;
        tiles.erase(found);
      }
    }
  }
  require(tiles.empty(), "a tile that is no sequence's");
}

void plan_once(Bytes& bytes) {
  const LimitsBackend backend(find_backend("cpu"), make_limits(bytes));
  const PlanKey key = make_key(bytes);
  PlanMaxima maxima{.max_tokens = bytes.range(0, 3000),
                    .max_seqs = bytes.range(0, 12),
                    .max_seq_len = bytes.range(0, 100000),
                    .max_mm_ranges = bytes.range(0, 3)};
  if (bytes.one_in(20)) maxima.max_tokens = bytes.odd_number();
  if (bytes.one_in(20)) maxima.max_seqs = bytes.odd_number();
  if (bytes.one_in(20)) maxima.max_seq_len = bytes.odd_number();
  const std::int64_t needed = workspace_bytes(backend, key, maxima);
  require(needed >= 4 * maxima.max_seqs, "a workspace smaller than its lengths");
  constexpr std::int64_t kAffordable = 1 << 24;
  if (needed > kAffordable) return;
  Arena arena;
  const TensorView workspace(arena.take(needed), DType::kU8, {needed});
  const OwnedBatch owned = make_batch(bytes, key, maxima);
  const Plan plan = make_plan(backend, key, maxima, owned.batch, workspace);
  check_cover(plan.work_items(owned.batch), owned, plan);
}

}  // namespace
}  // namespace diffkv::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  diffkv::fuzz::Bytes bytes(data, size);
  try {
    diffkv::fuzz::plan_once(bytes);
  } catch (const diffkv::Error&) {
    return 0;  // refused
  }
  return 0;
}
