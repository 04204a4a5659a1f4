// How the copy engine of sm_90 and later finds boxes of keys and values in the cache.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/params.h"

namespace diffkv::cuda {

// A plane of the cache as a tensor of columns, tokens of a page, slabs of columns, heads and pages.
// Passed by value as a kernel's `const __grid_constant__` argument.
struct PlaneMap {
  CUtensorMap map;
  // Copies that a box takes: one where it is a whole group and the head size a multiple of a slab's
  // columns, else one a slab of each head, because slabs of a group lie apart and because only the
  // first dimension can end within a slab. From one to the next, columns and slabs.
  std::int32_t copies;  // of a head, or of all
  std::int32_t heads_apart;
  std::int32_t column_step;
  std::int32_t slab_step;
};

struct KvMaps {
  PlaneMap key;
  PlaneMap value;
  std::int32_t box_keys;
  bool usable;  // else rows are copied one by one
};

// Of `heads` neighbouring KV heads, boxes of at least `least_keys` and at most `group_keys` keys,
// as many as lie in one page, by `slabs` slabs of `slab_columns` columns, in shared memory as
// cuda/generic/tile.h says. Not usable where a box could span two pages, or strides are none that
// the engine takes.
struct BoxShape {
  std::int32_t least_keys;
  std::int32_t group_keys;
  std::int32_t slab_columns;
  std::int32_t key_slabs;
  std::int32_t value_slabs;
  std::int32_t heads = 1;
};
KvMaps kv_maps(const AttendKernelParams& params, const BoxShape& shape);

}  // namespace diffkv::cuda
