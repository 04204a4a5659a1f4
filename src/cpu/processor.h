// What is fast on one processor and slow on another, though both have the same instructions.
#pragma once

#include <optional>

namespace diffkv::cpu {

// Whether the processor is one of Intel's.
bool made_by_intel();

struct Tuning {
  // Whether decode tiles of up to 16 rows are multiplied by blocks of rows (rows-inl.h) with
  // AVX-512, or with rows in the lanes. They are but on Intel's processors, which add and permute
  // lanes in the units that multiply: by two threads of a Xeon of 2023 1 x 32768 of fp16 took 9.1
  // to 10.6 ms in blocks of rows and 6.9 to 7.6 with rows in the lanes, by two others 7.6 to 8.7
  // and 7.0 to 8.1.
  bool row_blocks = false;
  // Whether the next rows are fetched into the first-level cache, or into the second level only
  // (fetch.h). They are on AMD's from Zen 5 on.
  bool near_fetch = false;
};

// How the kernels run: as suits this processor, or as set_tuning() says.
Tuning tuning();

// For tests; nothing goes back to the processor's own. Process-wide; not to be called while kernels
// run, nor between asking for the size of a workspace and planning in it.
void set_tuning(std::optional<Tuning> wanted);

}  // namespace diffkv::cpu
