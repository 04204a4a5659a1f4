#include "verify/codec.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace diffkv::verify {
namespace {

// 2^n as a double, for the exponents of normal numbers.
double power_of_two(int n) {
  return std::bit_cast<double>(static_cast<std::uint64_t>(n + 1023) << 52U);
}

// floor(log2(x)) of a normal x > 0; less than any exponent used here for 0 and subnormal doubles.
int exponent_of(double x) {
  return static_cast<int>(std::bit_cast<std::uint64_t>(x) >> 52U & 0x7ffU) - 1023;
}

// Ties to even: past 2^52 doubles are integers, so the addition rounds.
double round_to_integer(double x) {
  const double shift = power_of_two(52);
  return (x + shift) - shift;
}

struct Format {
  int exponent_bits;
  int mantissa_bits;
  bool ieee;  // the highest exponent holds infinities and NaNs; else only all ones is NaN

  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  int min_exponent() const { return 1 - bias(); }
  std::uint32_t exponent_mask() const { return (1U << exponent_bits) - 1; }
  std::uint32_t mantissa_mask() const { return (1U << mantissa_bits) - 1; }
  double max_finite() const {
    // Where the highest exponent is an ordinary one, its last mantissa is NaN.
    return ieee ? (2 - power_of_two(-mantissa_bits)) * power_of_two(bias())
                : (2 - 2 * power_of_two(-mantissa_bits)) * power_of_two(bias() + 1);
  }
  std::uint32_t sign_bit() const { return 1U << (exponent_bits + mantissa_bits); }
};

Format format_of(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return {8, 23, true};
    case DType::kF16:
      return {5, 10, true};
    case DType::kBF16:
      return {8, 7, true};
    case DType::kE4M3:
      return {4, 3, false};
    case DType::kE5M2:
      return {5, 2, true};
    default:
      throw Error(ErrorCode::kInvalidArgument,
                  fmt::format("verify: dtype {} passed where a floating-point type was expected",
                              to_string(dtype)));
  }
}

double decode_by_definition(const Format& format, std::uint32_t bits) {
  const std::uint32_t mantissa = bits & format.mantissa_mask();
  const std::uint32_t exponent = (bits >> format.mantissa_bits) & format.exponent_mask();
  const double sign = (bits & format.sign_bit()) != 0 ? -1.0 : 1.0;
  if (exponent == format.exponent_mask()) {
    if (format.ieee) {
      return mantissa == 0 ? sign * std::numeric_limits<double>::infinity()
                           : std::numeric_limits<double>::quiet_NaN();
    }
    if (mantissa == format.mantissa_mask()) return std::numeric_limits<double>::quiet_NaN();
  }
  if (exponent == 0) {
    return sign * mantissa * power_of_two(format.min_exponent() - format.mantissa_bits);
  }
  return sign * std::ldexp(mantissa + power_of_two(format.mantissa_bits),
                           static_cast<int>(exponent) - format.bias() - format.mantissa_bits);
}

// All values of a type of at most 16 bits; float holds each of them exactly.
std::vector<float> value_table(DType dtype) {
  const Format format = format_of(dtype);
  std::vector<float> values(std::size_t{1} << (8 * size_of(dtype)));
  for (std::size_t bits = 0; bits < values.size(); ++bits) {
    values[bits] =
        static_cast<float>(decode_by_definition(format, static_cast<std::uint32_t>(bits)));
  }
  return values;
}

const std::vector<float>& cached_table(DType dtype) {
  static const std::vector<float> f16 = value_table(DType::kF16);
  static const std::vector<float> bf16 = value_table(DType::kBF16);
  static const std::vector<float> e4m3 = value_table(DType::kE4M3);
  static const std::vector<float> e5m2 = value_table(DType::kE5M2);
  switch (dtype) {
    case DType::kF16:
      return f16;
    case DType::kBF16:
      return bf16;
    case DType::kE4M3:
      return e4m3;
    default:
      return e5m2;
  }
}

template <class Bits>
Bits bits_at(const void* data, std::int64_t index) {
  Bits bits;
  std::memcpy(&bits, static_cast<const char*>(data) + index * std::int64_t{sizeof(Bits)},
              sizeof(Bits));
  return bits;
}

template <class Bits>
void table_row(const std::vector<float>& table, const void* data, std::int64_t offset,
               std::int64_t n, double* out) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = table[bits_at<Bits>(data, offset + i)];
}

}  // namespace

double decode(DType dtype, std::uint32_t bits) {
  return decode_by_definition(format_of(dtype), bits);
}

double max_finite(DType dtype) { return format_of(dtype).max_finite(); }

double min_normal(DType dtype) { return power_of_two(format_of(dtype).min_exponent()); }

std::uint32_t encode(DType dtype, double value, Overflow overflow) {
  const Format format = format_of(dtype);
  const std::uint32_t sign = std::signbit(value) ? format.sign_bit() : 0;
  const std::uint32_t top = format.exponent_mask() << format.mantissa_bits;
  const std::uint32_t nan =
      format.ieee ? top | (1U << (format.mantissa_bits - 1)) : top | format.mantissa_mask();
  if (std::isnan(value)) return nan;

  const double largest = format.max_finite();
  double magnitude = std::fabs(value);
  // Of the first binade past the largest value the rounding still decides; all else is too large.
  if (magnitude < 2 * largest) {
    const int exponent = std::max(exponent_of(magnitude), format.min_exponent());
    const int quantum = exponent - format.mantissa_bits;
    magnitude = round_to_integer(magnitude * power_of_two(-quantum)) * power_of_two(quantum);
  }
  if (magnitude > largest) {
    if (overflow == Overflow::kInfinity) return format.ieee ? sign | top : nan;
    magnitude = largest;
  }
  const int exponent = exponent_of(magnitude);
  if (exponent < format.min_exponent()) {
    return sign | static_cast<std::uint32_t>(
                      magnitude * power_of_two(format.mantissa_bits - format.min_exponent()));
  }
  const double significand = magnitude * power_of_two(format.mantissa_bits - exponent);
  const auto mantissa = static_cast<std::uint32_t>(significand) & format.mantissa_mask();
  return sign | (static_cast<std::uint32_t>(exponent + format.bias()) << format.mantissa_bits) |
         mantissa;
}

std::uint32_t load_bits(const void* data, DType dtype, std::int64_t index) {
  switch (size_of(dtype)) {
    case 1:
      return bits_at<std::uint8_t>(data, index);
    case 2:
      return bits_at<std::uint16_t>(data, index);
    default:
      return bits_at<std::uint32_t>(data, index);
  }
}

void store_bits(void* data, DType dtype, std::int64_t index, std::uint32_t bits) {
  const std::int64_t size = size_of(dtype);
  char* to = static_cast<char*>(data) + index * size;
  if (size == 1) {
    const auto narrow = static_cast<std::uint8_t>(bits);
    std::memcpy(to, &narrow, 1);
  } else if (size == 2) {
    const auto narrow = static_cast<std::uint16_t>(bits);
    std::memcpy(to, &narrow, 2);
  } else {
    std::memcpy(to, &bits, 4);
  }
}

double load(const void* data, DType dtype, std::int64_t index) {
  double value = 0;
  load_row(data, dtype, index, 1, &value);
  return value;
}

void load_row(const void* data, DType dtype, std::int64_t offset, std::int64_t n, double* out) {
  switch (dtype) {
    case DType::kF32:
      for (std::int64_t i = 0; i < n; ++i) out[i] = bits_at<float>(data, offset + i);
      return;
    case DType::kF16:
    case DType::kBF16:
      return table_row<std::uint16_t>(cached_table(dtype), data, offset, n, out);
    case DType::kE4M3:
    case DType::kE5M2:
      return table_row<std::uint8_t>(cached_table(dtype), data, offset, n, out);
    default:
      format_of(dtype);  // throws
  }
}

double load_at(const ConstTensorView& view, std::int64_t index) {
  return load(view.data, view.dtype, index * view.strides[0]);
}

std::int64_t index_at(const ConstTensorView& view, std::int64_t i, std::int64_t j, std::int64_t k) {
  const std::int64_t at = i * view.strides[0] + j * view.strides[1] + k * view.strides[2];
  switch (view.dtype) {
    case DType::kI32:
      return bits_at<std::int32_t>(view.data, at);
    case DType::kI64:
      return bits_at<std::int64_t>(view.data, at);
    case DType::kU8:
    case DType::kBool:
      return bits_at<std::uint8_t>(view.data, at);
    default:
      throw Error(ErrorCode::kInvalidArgument,
                  fmt::format("verify: dtype {} passed where an integer type was expected",
                              to_string(view.dtype)));
  }
}

}  // namespace diffkv::verify
