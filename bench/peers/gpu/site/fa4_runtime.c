// The one function that FlashAttention 4's kernels take from the large library of their compiler,
// in place of that library: the others are in libcuda_dialect_runtime_static.a.
#include <stdint.h>
#include <stdio.h>

typedef void (*SetError)(const char* kind, const char** parts, int32_t num_parts);

void CuteDSLRT_TVMFFISetRaisedCudaError(SetError set_error, int32_t code) {
  char text[64];
  snprintf(text, sizeof(text), "CUDA error %d", (int)code);
  const char* parts[] = {text};
  set_error("RuntimeError", parts, 1);
}
