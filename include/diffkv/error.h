// Errors: every refused call throws diffkv::Error; nothing is printed, nothing aborts.
#pragma once

#include <stdexcept>
#include <string>

namespace diffkv {

enum class ErrorCode {
  kInvalidArgument,  // the caller passed something the contract excludes
  kUnsupported,      // legal by the contract, but the chosen backend says it can't
  kUnavailable,      // a resource is not there: no such backend or device, no memory
};

// What was passed, what was expected and where, e.g.
// "query has head_size_qk 96, the layer was built for 192".
// A call that throws Error has changed nothing: no output, no cache slot, no metadata.
class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}

  ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

}  // namespace diffkv
