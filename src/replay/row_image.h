// What one query row's reference reads, brought to the host.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "device/memory.h"
#include "diffkv/attention.h"
#include "diffkv/layer.h"
#include "replay/stats.h"

namespace diffkv::replay {

// The pages with the keys of one sequence that a row may see, and the row's output and lse. The
// rest of the cache is not copied: it may be larger than the host's memory.
class RowImage {
 public:
  struct Source {
    const Backend* backend;
    const device::Memory* cache;  // pages of the row's layer
    AttendArgs args;              // of the row's layer, in the backend's memory
  };

  // `host` is the step's call with query and batch on the host. The row sees no key below
  // `first_key`, and none past its own position. Waits for the default stream.
  RowImage(const Source& source, const AttendArgs& host, const KvCacheSpec& spec,
           std::int64_t token, std::int64_t head, std::int64_t first_key);
  RowImage(const RowImage&) = delete;
  RowImage& operator=(const RowImage&) = delete;

  // The call with everything on the host. Good for this row only: other rows' outputs and other
  // sequences' keys are not there.
  const AttendArgs& args() const { return args_; }

 private:
  void copy_pages(const Source& source, const KvCacheSpec& spec, std::int64_t seq,
                  std::int64_t first_key, std::int64_t position);
  void copy_output(const Source& source, std::int64_t token, std::int64_t head);

  std::vector<std::byte> pages_;
  std::vector<std::int32_t> table_;  // [max_blocks], of the row's sequence
  std::vector<std::byte> output_;    // [head_size_v]
  float lse_ = 0.0F;
  AttendArgs args_;
};

}  // namespace diffkv::replay
