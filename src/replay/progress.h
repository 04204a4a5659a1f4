// The progress line of a terminal.
#pragma once

#include <cstdint>
#include <string>

namespace diffkv::replay {

struct Progress {
  std::int64_t tokens_done = 0;   // prompt and generated, recomputed ones not counted twice
  std::int64_t tokens_total = 0;  // of the whole trace
  std::int64_t requests_finished = 0;
  std::int64_t requests = 0;
  double elapsed_s = 0.0;
};

// "[########........]  50 %  12/24 requests  3456 tok/s  0:42 left", of at most `width` columns.
std::string progress_line(const Progress& progress, int width);

}  // namespace diffkv::replay
