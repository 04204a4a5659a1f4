// x / scale for many x, in three instructions each.
#pragma once

#include <cmath>

#include "core/dtype.h"
#include "core/host_device.h"

namespace diffkv::cuda {

// Divides by one scale. Encoded as fp8, a quotient has the bytes that fp32's own division gives.
class Divider {
 public:
  DIFFKV_HD explicit Divider(float scale)
      : scale_(scale),
        reciprocal_(1.0F / scale),
        // Far from the ends of the exponents the remainder below is exact. A zero, negative,
        // infinite or NaN scale is not in the range.
        quick_(scale > 0x1p-60F && scale < 0x1p60F) {}

  DIFFKV_HD float operator()(float x) const {
    if (!quick_) return x / scale_;
    // One step of Newton's iteration with a correctly rounded reciprocal gives the correctly
    // rounded quotient (Markstein) where nothing under- or overflows. It does where the quotient is
    // below 2^-11, which is zero in fp8 in any case, and where it is huge, infinite or NaN:
    // there the first guess is good enough.
    const float guess = x * reciprocal_;
    const float remainder = std::fma(-guess, scale_, x);
    return std::fabs(guess) < 0x1p20F ? std::fma(remainder, reciprocal_, guess) : guess;
  }

 private:
  float scale_;
  float reciprocal_;
  bool quick_;
};

}  // namespace diffkv::cuda
