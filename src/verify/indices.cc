#include "verify/indices.h"

#include <fmt/format.h>

#include "verify/codec.h"
#include "verify/reference.h"

namespace diffkv::verify {
namespace {

std::string check_lengths(const AttendArgs& args) {
  const Batch& batch = args.batch;
  if (const std::int64_t first = index_at(batch.query_start_loc, 0); first != 0) {
    return fmt::format("query_start_loc[0] is {}, expected 0", first);
  }
  for (std::int64_t s = 0; s < batch.num_seqs; ++s) {
    const std::int64_t begin = index_at(batch.query_start_loc, s);
    const std::int64_t end = index_at(batch.query_start_loc, s + 1);
    if (end < begin) {
      return fmt::format("query_start_loc[{}] is {}, below {} before it", s + 1, end, begin);
    }
    const std::int64_t len = index_at(batch.seq_lens, s);
    const std::int64_t start = args.cache.dense ? index_at(batch.kv_start, s) : 0;
    const std::int64_t room = args.cache.dense ? args.cache.block_size - start
                                               : batch.block_table.shape[1] * args.cache.block_size;
    if (len < 0 || start < 0 || len > room) {
      return fmt::format("seq_lens[{}] is {} from token {}, expected 0 to {} keys", s, len, start,
                         room);
    }
  }
  return "";
}

std::string check_pages(const PlanKey& key, const AttendArgs& args) {
  for (std::int64_t token = 0; token < covered_tokens(args.batch); ++token) {
    const RowPlace place = place_row(args.batch, token);
    for (std::int64_t j = 0; j < place.seq_len; ++j) {
      if (!sees(key.mask, args.batch, place, j)) continue;
      const KeyPlace at = place_key(args.cache, args.batch, place.seq, j);
      if (at.block >= 0 && at.block < args.cache.num_blocks) continue;
      return fmt::format("block_table[{}, {}] is {}, expected 0 to {}: token {} sees key {}",
                         place.seq, j / args.cache.block_size, at.block, args.cache.num_blocks - 1,
                         token, j);
    }
  }
  return "";
}

}  // namespace

std::string check_index_tensors(const PlanKey& key, const AttendArgs& args,
                                const ConstTensorView& slot_mapping) {
  std::string what = check_lengths(args);
  if (what.empty() && !args.cache.dense) what = check_pages(key, args);
  const std::int64_t capacity = args.cache.num_blocks * args.cache.block_size;
  for (std::int64_t i = 0; what.empty() && slot_mapping.given() && i < slot_mapping.shape[0]; ++i) {
    const std::int64_t slot = index_at(slot_mapping, i);
    if (slot >= capacity) {
      what = fmt::format("slot_mapping[{}] is {}, the cache has {} slots", i, slot, capacity);
    }
  }
  return what;
}

}  // namespace diffkv::verify
