// The backends there are, best first.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "cpu/backend.h"
#ifdef DIFFKV_HAS_CUDA
#include "cuda/backend.h"
#endif
#include "diffkv/backend.h"
#include "diffkv/error.h"

namespace diffkv {

std::vector<const Backend*> backends() {
#ifdef DIFFKV_HAS_CUDA
  return {&cuda::backend(), &cpu::backend()};
#else
  return {&cpu::backend()};
#endif
}

const Backend& find_backend(std::string_view name) {
  if (name.empty()) {
    const char* wanted = std::getenv("DIFFKV_BACKEND");
    if (wanted != nullptr) name = wanted;
  }
  std::vector<std::string> states;  // of each, for the message
  for (const Backend* backend : backends()) {
    const Support available = backend->available();
    const bool wanted = name.empty() || name == backend->name();
    if (wanted && available) return *backend;
    states.push_back(available ? std::string(backend->name())
                               : fmt::format("{} ({})", backend->name(), available.reason));
  }
  const std::string what = name.empty() ? "no backend" : fmt::format("no backend \"{}\"", name);
  throw Error(ErrorCode::kUnavailable,
              fmt::format("there is {} to use here, there are: {}", what, fmt::join(states, ", ")));
}

}  // namespace diffkv
