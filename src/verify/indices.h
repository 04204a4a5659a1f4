// Rules about the values of index tensors, which the library only checks where they are cheap to
// read: what `check --deep` adds.
#pragma once

#include <string>

#include "diffkv/attention.h"

namespace diffkv::verify {

// "" or the first value that is out of its range: query_start_loc not rising from 0, negative
// lengths, keys past the block table's width or the dense tokens, a visible page outside the pool,
// a slot past the cache. slot_mapping may be not given. Host memory.
std::string check_index_tensors(const PlanKey& key, const AttendArgs& args,
                                const ConstTensorView& slot_mapping);

}  // namespace diffkv::verify
