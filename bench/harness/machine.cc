#include "bench/harness/machine.h"

#include <fmt/chrono.h>
#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <set>

namespace diffkv::bench {
namespace {

namespace fs = std::filesystem;

std::string first_line(const fs::path& path) {
  std::string line;
  std::ifstream file(path);
  std::getline(file, line);
  return line;
}

std::string cpu_model() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const std::size_t colon = line.find(": ");
    if (line.rfind("model name", 0) == 0 && colon != std::string::npos) {
      return line.substr(colon + 2);
    }
  }
  return "unknown";
}

// Caches are listed once for each processor: those with the same processors are one.
std::int64_t last_level_cache_bytes() {
  const fs::path root = "/sys/devices/system/cpu";
  int level = 0;
  std::int64_t bytes = 0;
  std::set<std::string> seen;
  const int processors = omp_get_num_procs();
  for (int cpu = 0; cpu < processors; ++cpu) {
    for (int index = 0;; ++index) {
      const fs::path cache =
          root / ("cpu" + std::to_string(cpu)) / "cache" / ("index" + std::to_string(index));
      const std::string size = first_line(cache / "size");  // "32768K"
      if (size.empty()) break;
      const int its_level = std::atoi(first_line(cache / "level").c_str());
      if (its_level < level) continue;
      if (its_level > level) {
        level = its_level;
        bytes = 0;
        seen.clear();
      }
      if (seen.insert(first_line(cache / "shared_cpu_list")).second) {
        bytes += std::atoll(size.c_str()) * 1024;
      }
    }
  }
  return bytes;
}

}  // namespace

Machine this_machine() {
  return {.cpu = cpu_model(),
          .threads = omp_get_max_threads(),
          .last_level_bytes = last_level_cache_bytes()};
}

std::string utc_now() {
  const auto now = std::chrono::system_clock::now();
  return fmt::format("{:%Y-%m-%dT%H:%M:%SZ}",
                     fmt::gmtime(std::chrono::system_clock::to_time_t(now)));
}

std::int64_t flush_bytes(const Machine& machine) {
  return std::max(std::int64_t{256} << 20, 4 * machine.last_level_bytes);
}

}  // namespace diffkv::bench
