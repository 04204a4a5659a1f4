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

  // Divides several numbers if all are of everyday size, which none of them that is zero or a NaN
  // is; else leaves them alone and returns false.
  template <int kCount>
  DIFFKV_HD bool divide_usual(float (&x)[kCount]) const {
    bool usual = quick_;
    float guesses[kCount];
    for (int i = 0; i < kCount; ++i) {
      guesses[i] = x[i] * reciprocal_;
      usual = usual && is_usual(guesses[i]);
    }
    if (!usual) return false;
    for (int i = 0; i < kCount; ++i) x[i] = refine(x[i], guesses[i]);
    return true;
  }

  DIFFKV_HD float operator()(float x) const {
    if (!quick_) return x / scale_;
    // One step of Newton's iteration with a correctly rounded reciprocal gives the correctly
    // rounded quotient (Markstein) where nothing under- or overflows. Far below the least fp8 and
    // far above the largest the first guess is as good, and has the sign of a zero.
    const float guess = x * reciprocal_;
    if (is_usual(guess)) return refine(x, guess);
    return guess == guess ? guess : x;  // a NaN with its sign
  }

 private:
  // |guess| in [2^-30, 2^20). Doubling drops the sign.
  DIFFKV_HD static bool is_usual(float guess) {
    return 2U * core::bits_of(guess) - (97U << 24) < (50U << 24);
  }

  DIFFKV_HD float refine(float x, float guess) const {
    return std::fma(std::fma(-guess, scale_, x), reciprocal_, guess);
  }

  float scale_;
  float reciprocal_;
  bool quick_;
};

}  // namespace diffkv::cuda
