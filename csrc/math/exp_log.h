// exp, log and log1p in double, branch-free, for scalars and for SIMD vectors of any width.
//
// Numerics: within 2 units in the last place of the true value on the ranges stated. No library call, so that a loop
// over rows or classes stays in registers, and so that every CPU target and the GPU run the same steps.
#pragma once

#include "math/portable.h"

namespace flatcore::math {

constexpr double kInfinity = __builtin_inf();
constexpr double kLn2 = 0.693147180559945309417;
constexpr double kLn2High = 0x1.62e42fefa3800p-1;  // 42 bits: k * kLn2High is exact for |k| < 2^11
constexpr double kLn2Low = 0x1.ef35793c76730p-45;
constexpr double kExpUnderflow = -708.0;  // exp of less is below the smallest normal double: returned as 0

// exp(x) for x <= 0 (x = -inf gives 0, NaN gives NaN). exp(0) is exactly 1.
template <class V>
FLATCORE_INLINE V exp_nonpositive(V x) {
  using Bits = typename Shape<V>::Bits;
  // Adding 1.5 * 2^52 leaves the nearest integer in the low bits.
  constexpr double magic = 0x1.8p52;
  const V shifted = x * 0x1.71547652b82fep0 + magic;
  const V k = shifted - magic;
  const V r = (x - k * kLn2High) - k * kLn2Low;  // |r| <= 0.3466
  // Taylor to r^13: the first term left out is below 4e-18.
  V p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const Bits exponent = (bit_cast<Bits>(shifted) + uint64_t{1023}) << 52;
  const V value = p * bit_cast<V>(exponent);
  return x < kExpUnderflow ? V{} : value;
}

// 2^k exp(r) in float for |r| <= 0.3467; `shifted` has k in its low bits. exp(0) is exactly 1.
template <class V>
FLATCORE_INLINE V exp_of_parts_float(V r, V shifted) {
  using Bits = typename Shape<V>::Bits;
  // Taylor to r^7: the first term left out is below 6e-9 of the result, a tenth of a rounding.
  V p = r * (1.0F / 5040.0F) + 1.0F / 720.0F;
  p = p * r + 1.0F / 120.0F;
  p = p * r + 1.0F / 24.0F;
  p = p * r + 1.0F / 6.0F;
  p = p * r + 0.5F;
  p = p * r + 1.0F;
  p = p * r + 1.0F;
  const Bits exponent = (bit_cast<Bits>(shifted) + uint32_t{127}) << 23;
  return p * bit_cast<V>(exponent);
}

// What the rounding of difference = x - top took: exact, by Knuth's two-sum, which needs no order of the operands.
template <class V>
FLATCORE_INLINE V lost_of_difference(V x, V top, V difference) {
  const V taken = x - difference;
  return (x - (difference + taken)) + (taken - top);
}

constexpr float kFloatMagic = 0x1.8p23F;  // added, it leaves the nearest integer in the low bits

// exp(x - top) for x <= top in float (x = -inf gives 0, NaN gives NaN); exp(0) is exactly 1.
//
// The difference of two floats is rounded: by 4e-6 at 87, which would be the result's relative error. What the rounding
// took is added after the reduction, so the result is right to 2 units in its last place for every pair. Results of
// differences below `least`, at the lowest that of the smallest normal float, are returned as 0.
constexpr float kExpUnderflowFloat = -87.3F;
template <class V>
FLATCORE_INLINE V exp_difference_float(V x, V top, float least = kExpUnderflowFloat) {
  const V difference = x - top;
  const V lost = lost_of_difference(x, top, difference);
  const V shifted = difference * 0x1.715476p+0F + kFloatMagic;
  const V k = shifted - kFloatMagic;
  // the high part of ln 2 has 15 bits: its product with |k| < 2^8 is exact
  const V r = ((difference - k * 0x1.62e4p-1F) - k * 0x1.7f7d1cp-20F) + lost;  // |r| <= 0.3467
  const V value = exp_of_parts_float(r, shifted);
  return difference < least ? V{} : value;
}

// A softmax's temperature T for exp((x - top)/T) in float: the reduction by k T ln 2 comes before the division, so that
// the quotient's rounding is that of a number below 0.35.
struct FloatTemperature {
  float steps, high, low, inverse, least;

  // T within 2^60 of 1: products with it stay in float's range.
  FLATCORE_METHOD static constexpr bool fits(double t) { return t > 0x1p-60 && t < 0x1p60; }
  // least_exponent: (x - top)/T below it gives 0; if not told, where the result is below 2^-100.
  FLATCORE_METHOD explicit FloatTemperature(double t, double least_exponent = -100.0 * kLn2) {
    const double step = t * kLn2;
    steps = static_cast<float>(1.0 / step);
    // the high part has 15 bits: its product with |k| < 2^8 is exact
    high = bit_cast<float>(bit_cast<uint32_t>(static_cast<float>(step)) & 0xfffffe00U);
    low = static_cast<float>(step - static_cast<double>(high));
    inverse = static_cast<float>(1.0 / t);
    least = static_cast<float>(least_exponent * t);
  }
};

// exp((x - top)/T) for x <= top in float, as above.
template <class V>
FLATCORE_INLINE V exp_difference_float(V x, V top, const FloatTemperature& temperature) {
  const V difference = x - top;
  const V lost = lost_of_difference(x, top, difference);
  const V shifted = difference * temperature.steps + kFloatMagic;
  const V k = shifted - kFloatMagic;
  // |r| <= 0.3467
  const V r = (((difference - k * temperature.high) - k * temperature.low) + lost) * temperature.inverse;
  const V value = exp_of_parts_float(r, shifted);
  return difference < temperature.least ? V{} : value;
}

// log(x) for x >= 0: log(0) = -inf, log(inf) = inf, NaN gives NaN; subnormals are right.
template <class V>
FLATCORE_INLINE V log_nonnegative(V x) {
  using Bits = typename Shape<V>::Bits;
  constexpr uint64_t sqrt_half = 0x3fe6a09e667f3bcdULL;
  constexpr uint64_t one = 0x3ff0000000000000ULL;
  const auto subnormal = x < 0x1p-1022;
  const V scaled = subnormal ? x * 0x1p54 : x;
  // scaled = 2^k m with m in [sqrt(1/2), sqrt(2))
  const Bits bits = bit_cast<Bits>(scaled);
  const Bits biased = (bits - sqrt_half + one) >> 52;
  const V m = bit_cast<V>(bits - ((biased - uint64_t{1023}) << 52));
  V k = bit_cast<V>(biased | uint64_t{0x4330000000000000ULL}) - (0x1p52 + 1023.0);
  k = subnormal ? k - 54.0 : k;
  // log m = 2 atanh(s), s = (m-1)/(m+1), |s| <= 0.1716: the first term left out is below 1e-17 of the sum.
  const V f = m - 1.0;
  const V s = f / (f + 2.0);
  const V z = s * s;
  V p = z * (1.0 / 21.0) + 1.0 / 19.0;
  p = p * z + 1.0 / 17.0;
  p = p * z + 1.0 / 15.0;
  p = p * z + 1.0 / 13.0;
  p = p * z + 1.0 / 11.0;
  p = p * z + 1.0 / 9.0;
  p = p * z + 1.0 / 7.0;
  p = p * z + 1.0 / 5.0;
  p = p * z + 1.0 / 3.0;
  const V two_s = s + s;
  V value = k * kLn2High + (two_s + (two_s * (z * p) + k * kLn2Low));
  value = x == 0.0 ? V{} - kInfinity : value;
  return x < kInfinity ? value : x;
}

// log(1 + x) for x >= 0, finite; relative accuracy also where 1 + x rounds to 1.
template <class V>
FLATCORE_INLINE V log1p_nonnegative(V x) {
  const V u = 1.0 + x;
  return log_nonnegative(u) + (x - (u - 1.0)) / u;
}

// log(1 + f) + k ln 2 in float for 1 + f in [sqrt(1/2), sqrt(2)).
template <class V>
FLATCORE_INLINE V log_of_parts_float(V f, V k) {
  // 2 atanh(s), s = f/(2 + f), |s| <= 0.1716: the first term left out is below 3e-9 of the sum
  // doubled first: where subnormals are flushed the half of 2e-38 is 0
  const V two_s = (f + f) / (f + 2.0F);
  const V s = 0.5F * two_s;
  const V z = s * s;
  V p = z * (1.0F / 9.0F) + 1.0F / 7.0F;
  p = p * z + 1.0F / 5.0F;
  p = p * z + 1.0F / 3.0F;
  return k * 0x1.62e4p-1F + (two_s + (two_s * (z * p) + k * 0x1.7f7d1cp-20F));
}

// x = 2^k (1 + f) for a normal float x > 0, 1 + f in [sqrt(1/2), sqrt(2)).
template <class V>
FLATCORE_INLINE V float_parts(V x, V& f) {
  using Bits = typename Shape<V>::Bits;
  constexpr uint32_t sqrt_half = 0x3f3504f3U, one = 0x3f800000U;
  const Bits bits = bit_cast<Bits>(x);
  const Bits biased = (bits - sqrt_half + one) >> 23;
  f = bit_cast<V>(bits - ((biased - uint32_t{127}) << 23)) - 1.0F;
  return bit_cast<V>(biased | uint32_t{0x4b000000}) - (0x1p23F + 127.0F);
}

// log(x) in float for a normal x > 0, within 2 units of 2^-24 of max(1, |log x|). Anything else gives some number.
template <class V>
FLATCORE_INLINE V log_normal_float(V x) {
  V f;
  const V k = float_parts(x, f);
  return log_of_parts_float(f, k);
}

// log(1 + x) in float for x >= 0, finite; relative accuracy also where 1 + x rounds to 1: below sqrt(2) f is x itself,
// above what 1 + x was rounded by is 2^-24 of a logarithm of at least 0.35.
template <class V>
FLATCORE_INLINE V log1p_nonnegative_float(V x) {
  V f;
  const V k = float_parts(1.0F + x, f);
  const auto large = k > 0.0F;
  return log_of_parts_float(large ? f : x, large ? k : V{});
}

}  // namespace flatcore::math
