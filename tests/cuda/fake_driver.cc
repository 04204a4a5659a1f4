// A stand-in for the NVIDIA driver's library, libcuda.so.1: of the version that the environment
// says and, asked to start, with the result that it says. It has no GPU.
#include <cstdlib>
#include <cstring>

namespace {

int variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? 0 : std::atoi(value);
}

int not_initialized() { return 3; }

template <class Function>
void* address(Function* function) {
  return reinterpret_cast<void*>(function);
}

}  // namespace

// The names are the driver's.
// NOLINTBEGIN(readability-identifier-naming)
extern "C" {

int cuDriverGetVersion(int* version) {
  *version = variable("FAKE_DRIVER_VERSION");
  return 0;
}

int cuInit(unsigned /*flags*/) { return variable("FAKE_DRIVER_START"); }

int cuGetProcAddress_v2(const char* name, void** function, int /*version*/,
                        unsigned long long /*flags*/, int* found) {
  if (std::strcmp(name, "cuDriverGetVersion") == 0) {
    *function = address(cuDriverGetVersion);
  } else if (std::strcmp(name, "cuInit") == 0) {
    *function = address(cuInit);
  } else if (std::strcmp(name, "cuGetProcAddress") == 0) {
    *function = address(cuGetProcAddress_v2);
  } else {
    *function = address(not_initialized);
  }
  if (found != nullptr) *found = 0;
  return 0;
}

}  // extern "C"
// NOLINTEND(readability-identifier-naming)
