// Every floating-point storage type, read and written by its definition in fp64. Independent of the
// library's own conversions, which are judged against it.
#pragma once

#include <cstdint>

#include "diffkv/tensor.h"

namespace diffkv::verify {

// What a finite value beyond the largest finite one becomes. kSaturate also turns infinities into
// the largest finite value.
enum class Overflow : std::uint8_t { kInfinity, kSaturate };

// The value of a bit pattern of fp32, fp16, bf16, e4m3 or e5m2. Throws Error for another dtype.
double decode(DType dtype, std::uint32_t bits);

// The nearest value's bits, ties to even; NaN gives a quiet NaN. e4m3 has no infinity: there
// kInfinity gives NaN. Throws Error for a dtype that is no floating-point type.
std::uint32_t encode(DType dtype, double value, Overflow overflow);

// The largest finite value of a floating-point type.
double max_finite(DType dtype);

// The smallest normal value of a floating-point type.
double min_normal(DType dtype);

// Element `index` of an array of that type.
std::uint32_t load_bits(const void* data, DType dtype, std::int64_t index);
void store_bits(void* data, DType dtype, std::int64_t index, std::uint32_t bits);
double load(const void* data, DType dtype, std::int64_t index);

// out[i] = element offset + i, for i < n.
void load_row(const void* data, DType dtype, std::int64_t offset, std::int64_t n, double* out);

// Element `index` (counted in the view's first dimension) of a rank-1 view of floating-point
// elements.
double load_at(const ConstTensorView& view, std::int64_t index);

// Element [i] or [i, j] or [i, j, k] of a view of kI32, kI64, kU8 or kBool.
std::int64_t index_at(const ConstTensorView& view, std::int64_t i, std::int64_t j = 0,
                      std::int64_t k = 0);

}  // namespace diffkv::verify
