// The pool of cache blocks and who holds which.
#pragma once

#include <cstdint>
#include <vector>

namespace diffkv::replay {

// Hands out block ids of a pool, last freed first (its memory is the likeliest to be cached).
// Block 0 is the null block: never handed out, it stands in block tables for blocks that were
// freed because no later row sees them.
class BlockAllocator {
 public:
  static constexpr std::int32_t kNullBlock = 0;

  // Blocks 1 to num_blocks - 1 are free at first. Throws Error if num_blocks is below 2.
  explicit BlockAllocator(std::int64_t num_blocks);

  // Appends `count` blocks to `blocks` and returns true, or if there are fewer changes nothing and
  // returns false.
  bool allocate(std::int64_t count, std::vector<std::int32_t>& blocks);

  // Takes a block back. Throws Error if it is not handed out (the null block never is).
  void free(std::int32_t block);

  std::int64_t num_blocks() const { return static_cast<std::int64_t>(in_use_.size()); }
  std::int64_t num_free() const { return static_cast<std::int64_t>(free_.size()); }
  // Without the null block.
  std::int64_t num_used() const { return num_blocks() - 1 - num_free(); }

 private:
  std::vector<std::int32_t> free_;
  std::vector<bool> in_use_;  // [num_blocks]
};

}  // namespace diffkv::replay
