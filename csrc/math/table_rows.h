// Small heads (neuronwise and gradient norms): what a row's sums over the table of squared distances D_jk between rows
// of W are put together to; for the CPU and CUDA, forward and backward. math/cancellation.h says when enough digits are
// left of it.
#pragma once

#include "math/portable.h"

namespace flatcore::math {

// Var_p(w) over the share of the classes apart from the top one, every term >= 0: p_m s_m + share sum_{j<k} u_j u_k
// D_jk, s_j = sum_k u_k D_jk. With shares q that sum to 1 (u = q, share = eps) it is Var_p(w)/eps.
FLATCORE_INLINE double table_variance(double confidence, double from_top, double share, double pairs) {
  return confidence * from_top + share * pairs;
}

// ||sum_j p_j (w_j - w_y)||^2, over eps^2 where y is the top class, and what that difference was taken from.
struct TableGradient {
  double total, square;
};
// from_top, from_label and pairs: sums under q; top_to_label: D_my.
FLATCORE_INLINE TableGradient table_gradient(bool top_label, double confidence, double eps, double from_top,
                                             double from_label, double top_to_label, double pairs) {
  if (top_label) return {from_top, from_top - pairs};
  const double total = confidence * top_to_label + eps * from_label;
  return {total, total - eps * table_variance(confidence, from_top, eps, pairs)};
}

}  // namespace flatcore::math
