// Merges two parts of equal weight whose outputs are 0 and 1: their mean, 0.5.
#include <array>
#include <cstdio>

#include "diffkv/diffkv.h"

int main() {
  std::array<float, 8> zeros{};
  std::array<float, 8> ones{};
  ones.fill(1.0F);
  std::array<float, 1> lse{};
  std::array<float, 8> output{};
  const diffkv::AttnState a{diffkv::view_of(zeros.data(), {1, 1, 8}),
                            diffkv::view_of(lse.data(), {1, 1})};
  const diffkv::AttnState b{diffkv::view_of(ones.data(), {1, 1, 8}),
                            diffkv::view_of(lse.data(), {1, 1})};
  diffkv::merge_attn_states(diffkv::find_backend("cpu"), a, b, {},
                            diffkv::view_of(output.data(), {1, 1, 8}));
  std::printf("diffkv %d.%d.%d: %g\n", DIFFKV_VERSION_MAJOR, DIFFKV_VERSION_MINOR,
              DIFFKV_VERSION_PATCH, static_cast<double>(output[7]));
  return 0;
}
