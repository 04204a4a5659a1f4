#include "replay/progress.h"

#include <fmt/format.h>
#include <cmath>

#include <algorithm>

namespace diffkv::replay {

std::string progress_line(const Progress& progress, int width) {
  constexpr int kMaxBar = 40;
  const double done = static_cast<double>(progress.tokens_done);
  const double total = static_cast<double>(std::max<std::int64_t>(progress.tokens_total, 1));
  const double share = std::clamp(done / total, 0.0, 1.0);
  const double rate = progress.elapsed_s > 0 ? done / progress.elapsed_s : 0.0;
  std::string left = "?";
  if (rate > 0) {
    const auto seconds = std::int64_t{std::llround((1.0 - share) * total / rate)};
    left = fmt::format("{}:{:02}", seconds / 60, seconds % 60);
  }
  const std::string text =
      fmt::format("{:3.0f} %  {}/{} requests  {:.0f} tok/s  {} left", share * 100,
                  progress.requests_finished, progress.requests, rate, left);
  const int bar = std::min(width - static_cast<int>(text.size()) - 4, kMaxBar);
  if (bar < 4) return text.substr(0, static_cast<std::size_t>(std::max(width, 0)));
  const auto full = static_cast<std::size_t>(share * bar);
  return fmt::format("[{}{}]  {}", std::string(full, '#'),
                     std::string(static_cast<std::size_t>(bar) - full, '.'), text);
}

}  // namespace diffkv::replay
