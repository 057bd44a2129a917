// The softmax-tail monoid: the statistics of a set of logits that combine over disjoint sets of classes.
//
// One piece of code merges SIMD lanes, class blocks, threads and warps: docs/mathematics.md, "The monoid". Associative
// and commutative in real arithmetic; in floats to rounding, so a fixed order gives bit-equal runs.
#pragma once

#include "math/exp_log.h"

namespace flatcore::math {

// The top class of no class at all: of an empty set, and of a row that is not to be trusted.
constexpr int64_t kNoClass = -1;

struct SoftmaxTail {
  double t;   // top logit, -inf if the set is empty
  int64_t m;  // its class, the lowest on a tie; kNoClass if the set is empty
  double r;   // best of the rest
  double u1;  // sum over the rest of exp((z_j - r)/T); NaN marks a set with NaN or +inf in it
  double u2;  // sum of their squares
};

FLATCORE_INLINE SoftmaxTail empty_tail() { return {-kInfinity, kNoClass, -kInfinity, 0.0, 0.0}; }

// One class. -inf is a masked class; NaN and +inf poison.
FLATCORE_INLINE SoftmaxTail leaf_tail(int64_t j, double z) {
  if (z == -kInfinity) return empty_tail();
  if (!(z < kInfinity)) return {-kInfinity, kNoClass, -kInfinity, __builtin_nan(""), __builtin_nan("")};
  return {z, j, -kInfinity, 0.0, 0.0};
}

// exp((x - r)/T), 0 for x = -inf, so that (-inf) - (-inf) is never formed. T enters as its inverse.
FLATCORE_INLINE double tail_scale(double x, double r, double inverse_temperature) {
  return x == -kInfinity ? 0.0 : exp_nonpositive((x - r) * inverse_temperature);
}

FLATCORE_INLINE bool is_before(const SoftmaxTail& a, const SoftmaxTail& b) {
  if (a.m == kNoClass || b.m == kNoClass) return b.m == kNoClass;
  return a.t > b.t || (a.t == b.t && a.m < b.m);
}

// The top two of the union, without the sums.
FLATCORE_INLINE SoftmaxTail combine_tops(const SoftmaxTail& x, const SoftmaxTail& y) {
  const bool x_first = is_before(x, y);
  const SoftmaxTail& a = x_first ? x : y;
  const SoftmaxTail& b = x_first ? y : x;
  double r = a.r;
  if (b.r > r) r = b.r;
  if (b.t > r) r = b.t;
  return {a.t, a.m, r, 0.0, 0.0};
}

FLATCORE_INLINE SoftmaxTail combine(const SoftmaxTail& x, const SoftmaxTail& y, double inverse_temperature) {
  SoftmaxTail both = combine_tops(x, y);
  const double fx = tail_scale(x.r, both.r, inverse_temperature);
  const double fy = tail_scale(y.r, both.r, inverse_temperature);
  // the lower of the two tops joins the rest
  const double fl = tail_scale(is_before(x, y) ? y.t : x.t, both.r, inverse_temperature);
  // Multiplied even where a factor is 0: a NaN must survive.
  both.u1 = x.u1 * fx + y.u1 * fy + fl;
  both.u2 = x.u2 * fx * fx + y.u2 * fy * fy + fl * fl;
  return both;
}

}  // namespace flatcore::math
