// The epsilon-split: everything a softmax row is asked for, without ever forming 1 - p.
//
// Numerics: with tau = exp(-g) U1, p_m = 1/(1 + tau), eps = tau/(1 + tau) and log eps = log U1 - g - log1p(tau),
// 1 - sum p^2 = eps (2 - eps (1 + s2)) with the bracket in [1, 2]: no difference of nearly equal numbers at any
// confidence, and nothing that underflows before its log is taken.
#pragma once

#include "math/exp_log.h"

namespace flatcore::math {

template <class V>
struct EpsilonSplit {
  V margin;      // g = (t - r)/T, +inf if nothing but the top class is there
  V confidence;  // p_m
  V eps;         // 1 - p_m
  V log_eps;     // its log, right where eps underflows
  V log1p_tau;   // -log p_m
  V log_one_minus_sum_p2;
};

// V is double or a SIMD vector of doubles. t is finite; r = -inf and u1 = u2 = 0 where there is no other class.
template <class V>
FLATCORE_INLINE EpsilonSplit<V> epsilon_split(V t, V r, V u1, V u2, double inverse_temperature) {
  EpsilonSplit<V> split;
  split.margin = (t - r) * inverse_temperature;
  const V tau = exp_nonpositive(-split.margin) * u1;
  split.confidence = 1.0 / (1.0 + tau);
  split.eps = tau * split.confidence;
  split.log1p_tau = log1p_nonnegative(tau);
  split.log_eps = log_nonnegative(u1) - split.margin - split.log1p_tau;
  const V s2 = u1 > 0.0 ? u2 / (u1 * u1) : V{};
  split.log_one_minus_sum_p2 = split.log_eps + log_nonnegative(2.0 - split.eps * (1.0 + s2));
  return split;
}

}  // namespace flatcore::math
