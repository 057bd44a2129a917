// When a sum about the mean row of W has kept enough digits, for large heads: otherwise the row is summed again from
// differences of rows. One place for the CPU and CUDA, forward and backward.
#pragma once

#include "math/portable.h"

namespace flatcore::math {

// `inner` of `magnitude`, the sum of the parts that it is left of: below 1/20, float32's product would leave more than
// the 4e-6 that a log may be off (a rounding of x moves it by 2 |x dx|/inner, at most 40 roundings).
FLATCORE_INLINE bool variance_is_left(double inner, double magnitude) { return inner > 0.05 * magnitude; }

// The squared norm of x - w_y, of ||x||^2 + ||w_y||^2 and of the mean square sum_j q_j ||w_j||^2, all about the mean
// row. The second keeps out rows where few large terms cancel to noise, which a w_y and an x that are noise too do not
// see.
FLATCORE_INLINE bool gradient_is_left(double norm2, double ends2, double square_mean) {
  return norm2 > 0.01 * ends2 && norm2 > 1e-4 * square_mean;
}

}  // namespace flatcore::math
