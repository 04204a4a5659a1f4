#include "replay/block_allocator.h"

#include <fmt/format.h>

#include <limits>

#include "diffkv/error.h"

namespace diffkv::replay {

BlockAllocator::BlockAllocator(std::int64_t num_blocks) {
  if (num_blocks < 2 || num_blocks > std::numeric_limits<std::int32_t>::max()) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("a block pool has {} blocks, expected 2 to 2147483647 (the first is "
                            "the null block)",
                            num_blocks));
  }
  in_use_.assign(static_cast<std::size_t>(num_blocks), false);
  free_.reserve(in_use_.size());
  for (auto block = static_cast<std::int32_t>(num_blocks - 1); block > kNullBlock; --block) {
    free_.push_back(block);
  }
}

bool BlockAllocator::allocate(std::int64_t count, std::vector<std::int32_t>& blocks) {
  if (count > num_free()) return false;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int32_t block = free_.back();
    free_.pop_back();
    in_use_[static_cast<std::size_t>(block)] = true;
    blocks.push_back(block);
  }
  return true;
}

void BlockAllocator::free(std::int32_t block) {
  if (block <= kNullBlock || block >= num_blocks() || !in_use_[static_cast<std::size_t>(block)]) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("block {} was given back, expected one of the {} blocks handed out",
                            block, num_used()));
  }
  in_use_[static_cast<std::size_t>(block)] = false;
  free_.push_back(block);
}

}  // namespace diffkv::replay
