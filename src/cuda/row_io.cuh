// A row (token, head) on its way in and out: scales of queries; sink, lse, scales and type of
// results.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"
#include "core/softmax.h"
#include "cuda/params.h"
#include "plan/schedule.h"

namespace diffkv::cuda {

// Element `i` of an fp32 vector, 1 where there is none.
__device__ inline float scale_at(const VectorParams& scale, std::int64_t i) {
  return scale.data == nullptr ? 1.0F : static_cast<const float*>(scale.data)[i * scale.stride];
}

// What q . k of this KV head is multiplied with.
__device__ inline float score_scale(const AttendKernelParams& p, std::int32_t kv_head) {
  return p.scale * scale_at(p.q_scale, 0) * scale_at(p.k_scale, kv_head);
}

__device__ inline std::byte* row_at(const RowsParams& rows, std::int64_t token, std::int64_t head) {
  return rows.data + (token * rows.stride_token + head * rows.stride_head) * size_of(rows.dtype);
}

// The (token, head) of row `row` of a tile. A row whose token is at or past
// schedule.tables.num_tokens is neither read nor written.
struct RowPlace {
  std::int64_t token;
  std::int32_t head;
  std::int32_t query;  // the token within its sequence
};

// Of row `index` of a KV head of the sequence that starts at `first_token`.
__device__ inline RowPlace row_place(std::int32_t first_token, std::int32_t kv_head,
                                     std::int32_t group, std::int32_t index) {
  RowPlace place;
  place.query = index / group;
  place.token = std::int64_t{first_token} + place.query;
  place.head = kv_head * group + (index - place.query * group);
  return place;
}

// Of row `row` of KV head `head` of a tile, counted from its first ones.
__device__ inline RowPlace row_place(const plan::ScheduleView& view, const plan::Piece& piece,
                                     std::int32_t head, std::int32_t row) {
  return row_place(view.tables.query_start_loc[piece.seq], piece.tile.kv_head + head, view.group,
                   piece.tile.first_row + row);
}

// What the finished row's accumulator, sum p v without scales, becomes.
struct RowEnd {
  float factor;
  float divisor;  // output_scale
  bool empty;     // the row is zeros, whatever the accumulator holds
  bool divided;

  __device__ float operator()(float acc) const {
    const float x = empty ? 0.0F : acc * factor;
    return divided ? x / divisor : x;
  }
};

// What a row's end needs of memory.
struct RowScales {
  float sink;
  float value;
  float output;
};

__device__ inline RowScales row_scales(const AttendKernelParams& p, std::int32_t head,
                                       std::int32_t kv_head) {
  RowScales scales;
  scales.sink = p.sinks.data == nullptr
                    ? core::kNegInf
                    : core::load_element(p.sinks.dtype, p.sinks.data, head * p.sinks.stride);
  scales.value = scale_at(p.v_scale, kv_head);
  scales.output = scale_at(p.output_scale, 0);
  return scales;
}

__device__ inline void write_lse(const AttendKernelParams& p, std::int64_t token, std::int32_t head,
                                 float lse) {
  p.lse[head * p.lse_stride_head + token * p.lse_stride_token] = lse;
}

// Adds the sink to a row's softmax and writes its lse. Call once a row.
__device__ inline RowEnd finish_row(const AttendKernelParams& p, std::int64_t token,
                                    std::int32_t head, std::int32_t kv_head,
                                    core::SoftmaxState state) {
  const RowScales scales = row_scales(p, head, kv_head);
  const core::SoftmaxEnd end = core::finish(state, scales.sink);
  if (p.lse != nullptr) write_lse(p, token, head, end.lse);
  RowEnd row;
  row.factor = end.factor * scales.value;
  row.empty = end.empty;
  row.divided = p.output_scale.data != nullptr;
  row.divisor = scales.output;
  return row;
}

}  // namespace diffkv::cuda
