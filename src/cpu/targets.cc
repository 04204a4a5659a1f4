#include "cpu/targets.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>

#include "cpu/amx.h"
#include "cpu/bf16_dot.h"
#include "cpu/simd_targets.h"
#include "diffkv/error.h"
#include "hwy/highway.h"
#include "hwy/targets.h"

namespace diffkv::cpu {
namespace {

// Targets of ours beside Highway's: AVX3 with products of bf16 pairs, and with those of tiles, too.
constexpr std::string_view kBf16Target = "AVX3_BF16";
constexpr std::string_view kAmxTarget = "AVX3_AMX";

// The target in use; 0 before the first choice.
std::atomic<std::int64_t> chosen{0};
// What multiplies bf16 beside it.
enum class Bf16Products : std::uint8_t { kNone, kPairs, kTiles };
std::atomic<Bf16Products> chosen_products{Bf16Products::kNone};

// Built and runnable here, as a set.
std::int64_t usable() { return hwy::SupportedTargets() & HWY_TARGETS; }

std::int64_t best_of(std::int64_t targets) { return targets & -targets; }

bool bf16_target_usable() { return (usable() & HWY_AVX3) != 0 && bf16_dot_available(); }

bool amx_target_usable() { return bf16_target_usable() && amx_available(); }

std::int64_t target_named(std::string_view name) {
  if (name == kBf16Target && bf16_target_usable()) return HWY_AVX3;
  if (name == kAmxTarget && amx_target_usable()) return HWY_AVX3;
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
  if (amx_target_usable()) names.emplace_back(kAmxTarget);
  if (bf16_target_usable()) names.emplace_back(kBf16Target);
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
  if (name.empty() && amx_target_usable()) name = kAmxTarget;
  if (name.empty() && bf16_target_usable()) name = kBf16Target;
  const std::int64_t target = name.empty() ? best_of(usable()) : target_named(name);
  hwy::GetChosenTarget().Update(target);
  chosen = target;
  chosen_products = name == kAmxTarget    ? Bf16Products::kTiles
                    : name == kBf16Target ? Bf16Products::kPairs
                                          : Bf16Products::kNone;
}

std::string current_target() {
  if (chosen == 0) set_target("");
  if (uses_amx()) return std::string(kAmxTarget);
  return uses_bf16_dot() ? std::string(kBf16Target) : hwy::TargetName(chosen);
}

bool uses_bf16_dot() { return chosen_products != Bf16Products::kNone; }

bool uses_amx() { return chosen_products == Bf16Products::kTiles; }

}  // namespace diffkv::cpu
