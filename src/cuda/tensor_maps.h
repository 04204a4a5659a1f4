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
  // Copies that a box takes: one where the head size is a multiple of a slab's columns, else one a
  // slab, because only the first dimension can end within a slab.
  std::int32_t copies;
};

struct KvMaps {
  PlaneMap key;
  PlaneMap value;
  bool usable;  // else rows are copied one by one
};

// Boxes of `box_keys` keys by `slabs` slabs of `slab_columns` columns, in shared memory as
// cuda/generic/tile.h says. Not usable where a box could span two pages, or strides are none that
// the engine takes.
struct BoxShape {
  std::int32_t box_keys;
  std::int32_t slab_columns;
  std::int32_t key_slabs;
  std::int32_t value_slabs;
};
KvMaps kv_maps(const AttendKernelParams& params, const BoxShape& shape);

}  // namespace diffkv::cuda
