// Partials to output rows. A few rows a worker: bound by memory, so plain loops.
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "core/softmax.h"
#include "cpu/kernels.h"
#include "cpu/row_io.h"
#include "plan/parts.h"

namespace diffkv::cpu {
namespace {

void combine_tile(const AttendCall& call, std::int32_t tile_class, std::int32_t worker,
                  const plan::Piece& first, std::int64_t head_of_tile, float* acc) {
  const detail::PlanTables& tables = call.schedule.tables;
  const std::int64_t head_size_v = call.args->cache.head_size_v;
  const std::int64_t kv_head = first.tile.kv_head + head_of_tile;
  for (std::int64_t row = 0; row < first.tile.num_rows; ++row) {
    const std::int64_t index = first.tile.first_row + row;
    const std::int64_t token = tables.query_start_loc[first.seq] + index / call.schedule.group;
    if (token >= tables.num_tokens) continue;
    core::SoftmaxState state;
    std::fill_n(acc, head_size_v, 0.0F);
    plan::for_each_partial(call.schedule, tile_class, worker, first, [&](std::int32_t slot) {
      const std::int64_t at = plan::partial_row(call.schedule, tile_class, slot, row, head_of_tile);
      const float* part = tables.partial_acc + at * tables.partial_stride;
      float keep = 0.0F;
      float add = 0.0F;
      core::merge(state, tables.partial_state[at], keep, add);
      for (std::int64_t c = 0; c < head_size_v; ++c) acc[c] = acc[c] * keep + part[c] * add;
    });
    const std::int64_t head = kv_head * call.schedule.group + index % call.schedule.group;
    write_row(call, token, head, kv_head, state, acc);
  }
}

}  // namespace

void combine_share(const AttendCall& call, std::int32_t tile_class, std::int32_t worker,
                   std::int32_t part, std::int32_t parts, std::byte* scratch) {
  plan::for_each_cut_tile(call.schedule, tile_class, worker, [&](const plan::Piece& first) {
    for (std::int32_t head = part; head < first.tile.num_heads; head += parts) {
      combine_tile(call, tile_class, worker, first, head, reinterpret_cast<float*>(scratch));
    }
  });
}

}  // namespace diffkv::cpu
