#include "device/memory_stream.h"

#include <algorithm>
#include <chrono>

namespace diffkv::device {

MemoryStream::MemoryStream(std::int64_t bytes)
    : words_(std::max<std::int64_t>(bytes / static_cast<std::int64_t>(sizeof(std::uint64_t)), 1)),
      // Uninitialised, so that each thread's first touch places its own share.
      data_(new std::uint64_t[static_cast<std::size_t>(words_)]) {
  std::uint64_t* words = data_.get();
#pragma omp parallel for schedule(static)
  for (std::int64_t i = 0; i < words_; ++i) words[i] = static_cast<std::uint64_t>(i);
}

double MemoryStream::read() {
  std::uint64_t* words = data_.get();
  const std::int64_t count = words_;
  const auto start = std::chrono::steady_clock::now();
  std::uint64_t sum = 0;
#pragma omp parallel for schedule(static) reduction(+ : sum)
  for (std::int64_t i = 0; i < count; ++i) sum += words[i];
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  // Every pass writes what it summed where the next one reads: none can be left out.
  words[0] = sum;
  return static_cast<double>(bytes()) / elapsed.count();
}

double measure_host_read_rate() {
  constexpr int kPasses = 8;
  MemoryStream stream(std::int64_t{256} << 20);
  double best = 0.0;
  for (int pass = 0; pass < kPasses; ++pass) best = std::max(best, stream.read());
  return best;
}

}  // namespace diffkv::device
