#include "replay/bandwidth.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>

namespace diffkv::replay {

double measure_read_bandwidth() {
  constexpr std::int64_t kWords = (std::int64_t{256} << 20) / sizeof(std::uint64_t);
  constexpr int kPasses = 8;
  // Uninitialised, so that each thread's first touch places its own share.
  const std::unique_ptr<std::uint64_t[]> buffer(new std::uint64_t[kWords]);
  std::uint64_t* words = buffer.get();
#pragma omp parallel for schedule(static)
  for (std::int64_t i = 0; i < kWords; ++i) words[i] = static_cast<std::uint64_t>(i);

  double best = 0.0;
  for (int pass = 0; pass < kPasses; ++pass) {
    const auto start = std::chrono::steady_clock::now();
    std::uint64_t sum = 0;
#pragma omp parallel for schedule(static) reduction(+ : sum)
    for (std::int64_t i = 0; i < kWords; ++i) sum += words[i];
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    // Every pass writes what it summed where the next one reads: none can be left out.
    words[0] = sum;
    best = std::max(best, static_cast<double>(kWords) * sizeof(std::uint64_t) / elapsed.count());
  }
  return best;
}

}  // namespace diffkv::replay
