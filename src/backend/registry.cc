// The backends there are, best first.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "cpu/backend.h"
#include "diffkv/backend.h"
#include "diffkv/error.h"

namespace diffkv {

std::vector<const Backend*> backends() { return {&cpu::backend()}; }

const Backend& find_backend(std::string_view name) {
  if (name.empty()) {
    const char* wanted = std::getenv("DIFFKV_BACKEND");
    if (wanted != nullptr) name = wanted;
  }
  std::vector<std::string> known;
  for (const Backend* backend : backends()) {
    const Support available = backend->available();
    if (name == backend->name() && !available) {
      throw Error(ErrorCode::kUnavailable,
                  fmt::format("backend \"{}\" can't run here: {}", name, available.reason));
    }
    if (available && (name.empty() || name == backend->name())) return *backend;
    known.emplace_back(backend->name());
  }
  throw Error(ErrorCode::kUnavailable, fmt::format("there is no backend \"{}\", there are: {}",
                                                   name, fmt::join(known, ", ")));
}

}  // namespace diffkv
