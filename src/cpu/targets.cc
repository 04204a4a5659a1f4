#include "cpu/targets.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>

#include "cpu/simd_targets.h"
#include "diffkv/error.h"
#include "hwy/highway.h"
#include "hwy/targets.h"

namespace diffkv::cpu {
namespace {

// The target in use; 0 before the first choice.
std::atomic<std::int64_t> chosen{0};

// Built and runnable here, as a set.
std::int64_t usable() { return hwy::SupportedTargets() & HWY_TARGETS; }

std::int64_t best_of(std::int64_t targets) { return targets & -targets; }

std::int64_t target_named(std::string_view name) {
  for (std::int64_t rest = usable(); rest != 0; rest &= rest - 1) {
    if (name == hwy::TargetName(best_of(rest))) return best_of(rest);
  }
  throw Error(ErrorCode::kUnavailable,
              fmt::format("there is no CPU target \"{}\" on this machine, there are: {}", name,
                          fmt::join(supported_targets(), ", ")));
}

}  // namespace

std::vector<std::string> supported_targets() {
  std::vector<std::string> names;
  for (std::int64_t rest = usable(); rest != 0; rest &= rest - 1) {
    names.emplace_back(hwy::TargetName(best_of(rest)));
  }
  return names;
}

void set_target(std::string_view name) {
  if (name.empty()) {
    const char* wanted = std::getenv("DIFFKV_CPU_TARGET");
    if (wanted != nullptr) name = wanted;
  }
  const std::int64_t target = name.empty() ? best_of(usable()) : target_named(name);
  hwy::GetChosenTarget().Update(target);
  chosen = target;
}

std::string current_target() {
  if (chosen == 0) set_target("");
  return hwy::TargetName(chosen);
}

}  // namespace diffkv::cpu
