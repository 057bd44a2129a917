// Norms that do not leave the range on the way to their logs.
#pragma once

#include <cmath>

#include "math/exp_log.h"

namespace flatcore::math {

// log of ||phi||^2, or with the bias as a column of ||phi||^2 + 1, without leaving the range.
FLATCORE_INLINE double log_head_square(double log_n, bool include_bias) {
  if (!include_bias) return log_n;
  return log_n > 0 ? log_n + log1p(exp(-log_n)) : log1p(exp(log_n));
}

// Whether a sum of squares kept its digits in the type it was taken in; otherwise it is taken again, scaled.
template <class T>
FLATCORE_INLINE bool squares_in_range(double squares) {
  constexpr double low = sizeof(T) == 4 ? 1e-30 : 1e-280, high = sizeof(T) == 4 ? 1e36 : 1e300;
  return squares > low && squares < high;
}

// e such that 2^e times the largest entry lies in [1, 2); 0 where squares of entries and of their differences are safe
// without scaling, in float too.
// At most 1000 either way (100 where products are in float32), so that 2^e itself is a normal number; subnormal entries
// still come up far enough.
FLATCORE_INLINE int scaling_exponent(double largest, bool double_compute) {
  const int limit = double_compute ? 1000 : 100;
  if (!(largest > 0.0 && largest < kInfinity) || (largest > 0x1p-30 && largest < 0x1p30)) return 0;
  const int exponent = -ilogb(largest);
  return exponent > limit ? limit : exponent < -limit ? -limit : exponent;
}

FLATCORE_INLINE double sign_of(double x) { return x > 0.0 ? 1.0 : x < 0.0 ? -1.0 : 0.0; }

// Which norm of a gradient.
enum class NormOrder { kTwo, kOne, kInf };

// An entry of the vector of dual norm 1 along which a norm grows: x/||x||; its sign; the sign of one of the `ties`
// largest, shared.
FLATCORE_INLINE double dual_entry(NormOrder order, double x, double norm, double ties) {
  if (order == NormOrder::kTwo) return x / norm;
  if (order == NormOrder::kOne) return sign_of(x);
  return fabs(x) == norm ? sign_of(x) / ties : 0.0;
}

}  // namespace flatcore::math
