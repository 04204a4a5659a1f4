// Vectors and what is done to a vector of scores, for the target being compiled.

// Per-target include guard.
#if defined(DIFFKV_CPU_LANES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DIFFKV_CPU_LANES_INL_H_
#undef DIFFKV_CPU_LANES_INL_H_
#else
#define DIFFKV_CPU_LANES_INL_H_
#endif

#include <cstdint>

#include "core/softmax.h"
#include "cpu/tile_base.h"
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace diffkv::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using LaneTag = hn::CappedTag<float, 16>;
using LaneVec = hn::Vec<LaneTag>;
using IntTag = hn::RebindToSigned<LaneTag>;
using IntVec = hn::Vec<IntTag>;
inline constexpr std::int64_t kLanes = static_cast<std::int64_t>(hn::MaxLanes(LaneTag()));

// exp(x) for x <= 0, relative error below 1e-7: 2^n (1 + r + r^2 q(r)), q a degree-4 minimax fit of
// (exp(r) - 1 - r) / r^2 on |r| <= ln(2) / 2, weighted for the relative error of exp. Below -87,
// where the result would leave fp32's normal range, 0. NaN stays NaN.
HWY_INLINE LaneVec exp_nonpositive(LaneVec x) {
  const LaneTag d;
  const IntTag di;
  const LaneVec least = hn::Set(d, -87.0F);
  const LaneVec clamped = hn::IfThenElse(hn::Lt(x, least), least, x);
  // round(x / ln 2) appears in the low mantissa bits of x / ln 2 + 1.5 * 2^23.
  const LaneVec magic = hn::Set(d, 12582912.0F);
  const LaneVec shifted = hn::MulAdd(clamped, hn::Set(d, 1.44269504F), magic);
  const LaneVec n = hn::Sub(shifted, magic);
  // ln 2 = 0.693359375 - 2.12194440e-4, the first part exact in few bits.
  LaneVec r = hn::NegMulAdd(n, hn::Set(d, 0.693359375F), clamped);
  r = hn::NegMulAdd(n, hn::Set(d, -2.12194440e-4F), r);
  LaneVec q = hn::MulAdd(hn::Set(d, 0.00138145394F), r, hn::Set(d, 0.00836874545F));
  q = hn::MulAdd(q, r, hn::Set(d, 0.0416683890F));
  q = hn::MulAdd(q, r, hn::Set(d, 0.166665211F));
  q = hn::MulAdd(q, r, hn::Set(d, 0.49999994F));
  const LaneVec y = hn::Add(hn::MulAdd(q, hn::Mul(r, r), r), hn::Set(d, 1.0F));
  const LaneVec scaled =
      hn::BitCast(d, hn::Add(hn::BitCast(di, y), hn::ShiftLeft<23>(hn::BitCast(di, shifted))));
  // Adding to the exponent would lose a NaN whose mantissa overflows; such an x fails both tests.
  return hn::IfThenElse(hn::Ge(x, least), scaled, hn::IfThenElse(hn::Lt(x, least), hn::Zero(d), x));
}

// cap * tanh(s / cap); NaN stays NaN.
HWY_INLINE LaneVec soft_cap(float cap, LaneVec s) {
  const LaneTag d;
  const LaneVec x = hn::Mul(s, hn::Set(d, 1.0F / cap));
  return hn::IfThenElse(hn::IsNaN(x), x, hn::Mul(hn::Set(d, cap), hn::Tanh(d, x)));
}

// Soft cap and ALiBi on scores of keys and rows at positions; `slope` is the rows'.
HWY_INLINE LaneVec adjust_scores(const ScoreRules& rules, LaneVec s, LaneVec slope, IntVec key,
                                 IntVec position) {
  const LaneTag d;
  const IntTag di;
  if (rules.soft_cap > 0.0F) s = soft_cap(rules.soft_cap, s);
  if (rules.alibi_sqrt) {
    const IntVec distance = hn::Max(hn::Sub(position, key), hn::Zero(di));
    s = hn::NegMulAdd(slope, hn::Sqrt(hn::ConvertTo(d, distance)), s);
  } else if (rules.alibi) {
    const IntVec distance = hn::Sub(key, hn::Set(di, rules.context_len));
    s = hn::MulAdd(slope, hn::ConvertTo(d, distance), s);
  }
  return s;
}

// -inf where a row that sees [0, prefix_end) and [begin, end) does not see the key.
HWY_INLINE LaneVec hide_scores(LaneVec s, IntVec key, IntVec prefix_end, IntVec begin, IntVec end) {
  const LaneTag d;
  const auto in_window = hn::AndNot(hn::Lt(key, begin), hn::Lt(key, end));
  const auto seen = hn::Or(in_window, hn::Lt(key, prefix_end));
  return hn::IfThenElse(hn::RebindMask(d, seen), s, hn::Set(d, core::kNegInf));
}

// Rows that become lanes, or lanes that become rows, at a time: a block of 4 x 4 words is four
// vectors. One word after another took a quarter of a windowed prefill's time.
inline constexpr std::int64_t kRowsTurned = kLanes < 4 ? 1 : 4;

// to[j * to_stride + i] = from[i * from_stride + j] for i and j below kRowsTurned.
HWY_INLINE void turn_block(const float* from, [[maybe_unused]] std::int64_t from_stride, float* to,
                           [[maybe_unused]] std::int64_t to_stride) {
#if HWY_TARGET == HWY_SCALAR
  *to = *from;
#else
  const hn::FixedTag<float, 4> d;
  const hn::Repartition<double, decltype(d)> pairs;
  const auto a = hn::LoadU(d, from);
  const auto b = hn::LoadU(d, from + from_stride);
  const auto c = hn::LoadU(d, from + 2 * from_stride);
  const auto e = hn::LoadU(d, from + 3 * from_stride);
  const auto ab = hn::BitCast(pairs, hn::InterleaveLower(d, a, b));
  const auto ce = hn::BitCast(pairs, hn::InterleaveLower(d, c, e));
  const auto upper_ab = hn::BitCast(pairs, hn::InterleaveUpper(d, a, b));
  const auto upper_ce = hn::BitCast(pairs, hn::InterleaveUpper(d, c, e));
  hn::StoreU(hn::BitCast(d, hn::InterleaveLower(pairs, ab, ce)), d, to);
  hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(pairs, ab, ce)), d, to + to_stride);
  hn::StoreU(hn::BitCast(d, hn::InterleaveLower(pairs, upper_ab, upper_ce)), d, to + 2 * to_stride);
  hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(pairs, upper_ab, upper_ce)), d, to + 3 * to_stride);
#endif
}

// acc = acc * keep + other * add.
HWY_INLINE void fold_lanes(float* HWY_RESTRICT acc, LaneVec keep, const float* HWY_RESTRICT other,
                           LaneVec add) {
  const LaneTag d;
  hn::Store(hn::MulAdd(hn::Load(d, acc), keep, hn::Mul(hn::Load(d, other), add)), d, acc);
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace diffkv::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
