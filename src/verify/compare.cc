#include "verify/compare.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "verify/codec.h"

namespace diffkv::verify {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

double precision_of(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return 1e-5;
    case DType::kF16:
      return 1e-3;
    case DType::kBF16:
      return 6e-3;
    default:
      return 5e-2;
  }
}

// Half the distance between e4m3 values around x.
double e4m3_half_ulp(double x) {
  const double magnitude = std::max(std::fabs(x), min_normal(DType::kE4M3));
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  return std::ldexp(1.0, exponent - 1 - 4);
}

// Same place: both NaN, both the same infinity, or both finite.
bool same_kind(double got, double expected) {
  if (std::isnan(expected)) return std::isnan(got);
  if (std::isinf(expected)) return got == expected;
  return std::isfinite(got);
}

struct Element {
  double got = 0;
  double expected = 0;
};

// What an element must be compared as, given how its type overflows.
Element element_of(double got, double expected, DType dtype, double relative) {
  const double largest = max_finite(dtype);
  if (dtype == DType::kE4M3) {
    if (!std::isnan(expected)) expected = std::clamp(expected, -largest, largest);
  } else if (std::isinf(got) && std::isfinite(expected) && got * expected > 0 &&
             std::fabs(expected) >= largest * (1 - relative)) {
    got = expected;
  } else if (std::isfinite(got) && std::isfinite(expected) && std::fabs(expected) > largest) {
    expected = std::copysign(largest, expected);
  }
  return {got, expected};
}

double lse_error_of(double got, double expected) {
  if (!same_kind(got, expected)) return kInf;
  if (!std::isfinite(expected)) return 0;
  return std::fabs(got - expected) / std::max(1.0, std::fabs(expected));
}

}  // namespace

Tolerance tolerance(const PlanKey& key, DType output_dtype) {
  Tolerance result;
  result.output = precision_of(key.query_dtype);
  if (!is_fp8(output_dtype)) result.output = std::max(result.output, precision_of(output_dtype));
  result.lse = key.query_dtype == DType::kF32 ? 1e-4 : 1e-3;
  return result;
}

RowCheck check_row(const RowRef& reference, const AttendArgs& args, std::int64_t token,
                   std::int64_t head, const Tolerance& tolerance) {
  const TensorView& output = args.output;
  const auto size = static_cast<std::int64_t>(reference.output.size());
  std::vector<double> got(reference.output.size());
  load_row(output.data, output.dtype, token * output.strides[0] + head * output.strides[1], size,
           got.data());

  RowCheck check;
  double error_sq = 0;
  double norm_sq = 0;
  double worst = -1;
  std::int64_t worst_at = 0;
  bool all_zero = true;
  for (std::int64_t d = 0; d < size; ++d) {
    const auto i = static_cast<std::size_t>(d);
    const Element e = element_of(got[i], reference.output[i], output.dtype, tolerance.output);
    all_zero = all_zero && reference.output[i] == 0;
    double error = 0;
    if (!same_kind(e.got, e.expected)) {
      error = kInf;
    } else if (std::isfinite(e.expected)) {
      error = std::fabs(e.got - e.expected);
      if (output.dtype == DType::kE4M3) {
        error = std::max(0.0, error - e4m3_half_ulp(e.expected));
      }
      norm_sq += e.expected * e.expected;
    }
    error_sq += error * error;
    if (error > worst) {
      worst = error;
      worst_at = d;
    }
  }
  const double floor = std::sqrt(static_cast<double>(size)) * min_normal(output.dtype);
  check.error = std::sqrt(error_sq) / std::max(std::sqrt(norm_sq), floor);
  if (all_zero) {
    const auto nonzero =
        std::find_if(got.begin(), got.end(), [](double x) { return x != 0; });  // NaN too
    check.error = nonzero == got.end() ? 0 : kInf;
    if (nonzero != got.end()) worst_at = nonzero - got.begin();
  }

  double got_lse = 0;
  if (args.lse.given()) {
    got_lse = load(args.lse.data, args.lse.dtype,
                   head * args.lse.strides[0] + token * args.lse.strides[1]);
    check.lse_error = lse_error_of(got_lse, reference.lse);
  }
  check.ok = check.error <= tolerance.output && check.lse_error <= tolerance.lse;
  if (!check.ok) {
    const auto at = static_cast<std::size_t>(worst_at);
    check.what = fmt::format(
        "token {} head {}: error {:.3g} (allowed {:.3g}), element {} is {:.6g}, "
        "expected {:.6g}",
        token, head, check.error, tolerance.output, worst_at, got[at], reference.output[at]);
    if (args.lse.given()) {
      check.what +=
          fmt::format("; lse error {:.3g} (allowed {:.3g}), lse is {:.7g}, expected {:.7g}",
                      check.lse_error, tolerance.lse, got_lse, reference.lse);
    }
  }
  return check;
}

}  // namespace diffkv::verify
