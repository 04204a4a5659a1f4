// Any bytes as a trace: the reader returns requests within its documented bounds, in order of
// arrival, or throws diffkv::Error.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <sstream>
#include <string>

#include "diffkv/error.h"
#include "replay/trace.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  std::string text(reinterpret_cast<const char*>(data), size);
  // Half of the inputs get a header, or few would get past it.
  if (size > 0 && data[0] % 2 == 0) {
    text.replace(0, 1, "TIMESTAMP,ContextTokens,GeneratedTokens\n");
  }
  std::istringstream in(text);
  try {
    double last = 0.0;
    const auto requests = diffkv::replay::read_trace(in, "fuzz");
    if (requests.empty()) std::abort();
    for (const auto& request : requests) {
      const bool ok = request.arrival_s >= last && request.prompt_tokens >= 1 &&
                      request.prompt_tokens <= diffkv::replay::kMaxRequestTokens &&
                      request.generated_tokens >= 1 &&
                      request.generated_tokens <= diffkv::replay::kMaxRequestTokens;
      if (!ok) std::abort();
      last = request.arrival_s;
    }
  } catch (const diffkv::Error&) {
  }
  return 0;
}
