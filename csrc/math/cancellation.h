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

// Var_p(w) over eps from the table of distances: below this the classes that differ from the top one may have
// underflowed in u, or in the product where that was in float32.
FLATCORE_INLINE bool table_variance_is_in_range(double inner, bool float_product = false) {
  return inner > (float_product ? 1e-20 : 1e-250);
}

// A gradient's squared norm as a difference of table sums of `total`: the table is right to about 1e-15, so this share
// of the total may be left before digits that a float32 (1e-7) or a float64 result (1e-12) shows are lost.
FLATCORE_INLINE bool table_gradient_is_left(double square, double total, bool double_result) {
  return square > (double_result ? 1e-2 : 1e-6) * total && square > 1e-250;
}

// The same where the sums over the table are products in the results' own type, right to some roundings of the total: a
// quarter of it is left of nearly every row whose rows of W lie apart.
FLATCORE_INLINE bool table_product_gradient_is_left(double square, double total) {
  return square > 0.25 * total && square > 1e-20;
}

// A norm of sum_j p_j (w_j - w_y) summed in the compute type, beside the norm of sum_j p_j |w_j - w_y|: its roundings
// are those of the terms.
FLATCORE_INLINE bool summed_norm_is_left(double norm, double terms, bool double_compute) {
  return norm > 0.25 * terms && norm > (double_compute ? 1e-250 : 1e-30) && terms < __builtin_inf();
}

// Whether a product with W needs no center: the squared length of W's mean row beside the rows' mean square.
FLATCORE_INLINE bool common_row_is_small(double center2, double mean2) { return center2 < 0.25 * mean2; }

// The least squared length that a product with raw W leaves right where its rows share one of squared length `common2`:
// the product loses 2^-22 of that length, so 5e-6 of a tenth of it.
FLATCORE_INLINE double least_beside_common_row(double common2) { return 0.01 * common2; }

// Below 2^-100 of the largest share a float's would meet the denormal numbers in the library's products, where they
// take a hundred times as long; no digit of a sum that is kept shows them. For vectors a mask.
template <class V>
FLATCORE_INLINE auto share_is_kept(V u) {
  return u > 0x1p-100;
}

// Whether a component of a gradient, or half the distance of two, may be the rounding of a product: 2^-15 of its terms'
// magnitudes is 512 roundings in float32, 2^-40 as many in float64. A column that is one number has terms of 0, and is
// 0.
FLATCORE_INLINE bool component_is_unsure(double distance, double terms, bool double_compute) {
  return terms != 0.0 && !(distance > (double_compute ? 0x1p-40 : 0x1p-15) * terms);
}

// Whether a component summed from differences is one of the largest: inlined twice, the same sum may be contracted in
// two ways, so equal means within 2^-40.
FLATCORE_INLINE bool is_among_largest(double a, double largest) { return !(a < largest * (1.0 - 0x1p-40)); }

}  // namespace flatcore::math
