// What reaches a row's gradient from above: the derivative c of the result with respect to the row's log value, handed
// on as a number and a log, so that nothing underflows on the way to a class that it does not underflow for.
#pragma once

#include <cmath>

#include "math/portable.h"

namespace flatcore::math {

// Below this a value is given back as 0: 2^-150, half of float32's least number, or 2^-1075. An upstream that is not
// finite (that of the log of such a value, which the caller has masked) counts as 0 there.
FLATCORE_INLINE double log_of_least(bool double_result) { return double_result ? -745.133 : -103.972; }
FLATCORE_INLINE bool counts_as_nothing(double upstream, double log_coefficient, bool double_result) {
  if (upstream == 0.0 || log_coefficient == -__builtin_inf()) return true;
  return !(upstream * 0.0 == 0.0) && log_coefficient < log_of_least(double_result);
}

// upstream exp(log_coefficient), in two steps: exp of -740 has few digits left.
FLATCORE_INLINE double row_derivative(double upstream, double log_coefficient) {
  if (log_coefficient == 0.0) return upstream;
  const double half = exp(0.5 * log_coefficient);
  return upstream * half * half;
}

// c p_j/(exp(log_share) norm) of a class j whose row of W equals the label's: in one exponent, as p_j over the norm may
// leave the range where c is as small.
FLATCORE_INLINE double twin_factor(double upstream, double log_coefficient, double log_p, double log_share,
                                   double norm) {
  return upstream * exp(log_coefficient + log_p - log_share) / norm;
}

}  // namespace flatcore::math
