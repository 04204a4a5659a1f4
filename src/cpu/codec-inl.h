// Stored rows to fp32, for the target being compiled.

// Per-target include guard.
#if defined(DIFFKV_CPU_CODEC_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DIFFKV_CPU_CODEC_INL_H_
#undef DIFFKV_CPU_CODEC_INL_H_
#else
#define DIFFKV_CPU_CODEC_INL_H_
#endif

#include <cstdint>

#include "core/dtype.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace diffkv::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Rows are multiples of 8 elements, so 8 lanes (or the target's fewer) need no tail.
using RowTag = hn::CappedTag<float, 8>;
using RowVec = hn::Vec<RowTag>;

// Before AVX2 there is no instruction that widens fp16, and Highway's emulation does not keep NaN
// and infinities.
#if HWY_ARCH_X86
inline constexpr bool kWidensF16 = HWY_TARGET <= HWY_AVX2;
#else
inline constexpr bool kWidensF16 = true;
#endif

// Elements i .. i + Lanes(d) of a row.
template <DType kDType, class D>
HWY_INLINE hn::Vec<D> load_lanes(D d, const void* row, std::int64_t i) {
  const hn::Rebind<std::uint32_t, D> du32;
  const hn::Rebind<std::uint16_t, D> du16;
  const hn::Rebind<std::uint8_t, D> du8;
  const hn::Rebind<hwy::float16_t, D> df16;
  if constexpr (kDType == DType::kF32) {
    return hn::LoadU(d, static_cast<const float*>(row) + i);
  } else if constexpr (kDType == DType::kBF16) {
    const auto x = hn::LoadU(du16, static_cast<const std::uint16_t*>(row) + i);
    return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(du32, x)));
  } else if constexpr (!kWidensF16) {
    HWY_ALIGN float lanes[hn::MaxLanes(d)];
    for (std::size_t lane = 0; lane < hn::MaxLanes(d); ++lane) {
      lanes[lane] = core::load_element(kDType, row, i + static_cast<std::int64_t>(lane));
    }
    return hn::Load(d, lanes);
  } else if constexpr (kDType == DType::kF16) {
    const auto x = hn::LoadU(du16, static_cast<const std::uint16_t*>(row) + i);
    return hn::PromoteTo(d, hn::BitCast(df16, x));
  } else if constexpr (kDType == DType::kE5M2) {
    // The upper byte of an fp16.
    const auto x = hn::PromoteTo(du16, hn::LoadU(du8, static_cast<const std::uint8_t*>(row) + i));
    return hn::PromoteTo(d, hn::BitCast(df16, hn::ShiftLeft<8>(x)));
  } else {
    // As an fp16 with the same sign and mantissa the exponent is 8 too small. 0x7f is NaN.
    const auto x = hn::PromoteTo(du16, hn::LoadU(du8, static_cast<const std::uint8_t*>(row) + i));
    const auto sign = hn::ShiftLeft<8>(hn::And(x, hn::Set(du16, 0x80)));
    const auto mag = hn::And(x, hn::Set(du16, 0x7f));
    const auto is_nan = hn::Eq(mag, hn::Set(du16, 0x7f));
    const auto f16 = hn::IfThenElse(is_nan, hn::Set(du16, 0x7e00), hn::ShiftLeft<7>(mag));
    const auto f32 = hn::PromoteTo(d, hn::BitCast(df16, hn::Or(f16, sign)));
    return hn::Mul(f32, hn::Set(d, 256.0F));
  }
}

// Elements i .. i + Lanes(d) of a row of n (a multiple of 8), zeros past its end.
template <DType kDType, class D>
HWY_INLINE hn::Vec<D> load_padded(D d, const std::byte* row, std::int64_t i,
                                  [[maybe_unused]] std::int64_t n) {
#if HWY_TARGET != HWY_SCALAR  // which has one lane and no halves
  if constexpr (hn::MaxLanes(D()) == 16) {
    if (n - i < 16) {
      return hn::ZeroExtendVector(d, load_lanes<kDType>(hn::Half<D>(), row, i));
    }
  }
#endif
  return load_lanes<kDType>(d, row, i);
}

// Calls fn(constant) with the dtype as a compile-time constant.
template <class Fn>
HWY_INLINE auto with_dtype(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::kF32:
      return fn(std::integral_constant<DType, DType::kF32>());
    case DType::kF16:
      return fn(std::integral_constant<DType, DType::kF16>());
    case DType::kBF16:
      return fn(std::integral_constant<DType, DType::kBF16>());
    case DType::kE5M2:
      return fn(std::integral_constant<DType, DType::kE5M2>());
    default:
      return fn(std::integral_constant<DType, DType::kE4M3>());
  }
}

// Widens n elements (a multiple of 8) of a row.
template <DType kDType>
HWY_INLINE void load_row(const void* row, std::int64_t n, float* HWY_RESTRICT dst) {
  const hn::CappedTag<float, 16> wide;
  constexpr auto kWide = static_cast<std::int64_t>(hn::MaxLanes(wide));
  std::int64_t i = 0;
  for (; i + kWide <= n; i += kWide) hn::StoreU(load_lanes<kDType>(wide, row, i), wide, dst + i);
  const RowTag d;
  for (; i < n; i += static_cast<std::int64_t>(hn::MaxLanes(d))) {
    hn::StoreU(load_lanes<kDType>(d, row, i), d, dst + i);
  }
}

// The same times `scale`, of a dtype known at run time.
HWY_INLINE void load_scaled(DType dtype, const void* row, std::int64_t n, float scale, float* dst) {
  with_dtype(dtype, [&](auto known) HWY_ATTR { load_row<decltype(known)::value>(row, n, dst); });
  for (std::int64_t i = 0; i < n; ++i) dst[i] *= scale;
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace diffkv::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
