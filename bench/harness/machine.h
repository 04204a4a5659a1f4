// The machine a benchmark runs on, and the two rates its results are held against.
#pragma once

#include <cstdint>
#include <string>

namespace diffkv::bench {

struct Machine {
  std::string cpu;                    // model name, "unknown" where the system does not tell
  int threads = 0;                    // of OpenMP
  std::int64_t last_level_bytes = 0;  // of all last-level caches; 0: not known
};

Machine this_machine();

// The date and time, UTC, in the form 2026-11-23T05:00:00Z.
std::string utc_now();

// Bytes of memory to stream through so that nothing else is left in the caches: the larger of
// 256 MiB and 4 times the last-level caches.
std::int64_t flush_bytes(const Machine& machine);

// fp32 multiplications and additions per second of all threads together in a register-blocked
// matrix product whose operands stay in the first-level caches: the rate no fp32 kernel exceeds.
// Each thread counts with its best of many short runs; takes about 50 ms.
double measure_gemm_rate();

}  // namespace diffkv::bench
