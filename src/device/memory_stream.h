// How fast this machine's threads read memory.
#pragma once

#include <cstdint>
#include <memory>

namespace diffkv::device {

// Memory to read from front to back, each thread its own share. Reading it measures the rate of the
// memory, and pushes out of the caches what was there.
class MemoryStream {
 public:
  // Touches every page once. `bytes` is rounded down to a multiple of 8, at least 8.
  explicit MemoryStream(std::int64_t bytes);

  std::int64_t bytes() const { return words_ * static_cast<std::int64_t>(sizeof(std::uint64_t)); }
  // Reads everything once with all OpenMP threads. Returns bytes per second.
  double read();

 private:
  std::int64_t words_;
  std::unique_ptr<std::uint64_t[]> data_;
};

// Bytes per second at which all OpenMP threads together read a buffer of 256 MiB front to back,
// each its own share: the best of eight passes after one that touches the pages. Takes a fraction
// of a second.
double measure_host_read_rate();

}  // namespace diffkv::device
