// Large heads (neuronwise and gradient norms): what a row's sums about the mean row of W are put together to. One place
// for the CPU and CUDA, forward and backward; math/cancellation.h says when enough digits are left of it.
#pragma once

#include "math/portable.h"

namespace flatcore::math {

// Var_p(w)/eps = p_m ||w_m - w_q||^2 + sum_j q_j ||w_j||^2 - ||w_q||^2, every row about the center.
struct CenteredVariance {
  double top_mean2;  // ||w_m - w_q||^2
  double mean2;      // ||w_q||^2
  double top2;       // ||w_m||^2

  // The bias as a column of W: the top class's, and the mean under q.
  FLATCORE_METHOD void add_column(double top, double mean) {
    top_mean2 += (top - mean) * (top - mean);
    mean2 += mean * mean;
    top2 += top * top;
  }
  FLATCORE_METHOD double inner(double confidence, double square_mean) const {
    return confidence * top_mean2 + (square_mean > mean2 ? square_mean - mean2 : 0.0);
  }
  FLATCORE_METHOD double magnitude(double square_mean) const { return square_mean + top2; }
};

// sum_j p_j w_j - w_y = top w_m + rest w_q - w_y; over eps where y is the top class, whose own term is gone then.
struct GradientMix {
  bool top_label;
  double top, rest;

  // p_j of a class, over eps if so above, from its q_j.
  FLATCORE_METHOD double share(bool is_top, double q) const { return is_top && !top_label ? top : rest * q; }
};
FLATCORE_INLINE GradientMix gradient_mix(bool top_label, double confidence, double eps) {
  return {top_label, top_label ? 0.0 : confidence, top_label ? 1.0 : eps};
}

// d log Var_p(w)/dz, inner = Var_p(w)/eps: of the top class by its row's distance to the mean of q, of another by its
// row's distance to the mean row under p, taken apart about the center. Times `scale`.
struct CenteredVarianceCotangent {
  double scale, eps, inner, inverse;

  FLATCORE_METHOD double top(double confidence, double top_mean2) const {
    return scale * confidence * (eps * top_mean2 * inverse - 1.0);
  }
  // By select: the bias of a masked class is -inf.
  FLATCORE_METHOD double rest(double q, double square, double dot, double mean_square) const {
    const double distance = square - 2.0 * dot + mean_square;
    return q == 0.0 ? 0.0 : scale * q * ((distance > 0.0 ? distance : 0.0) - eps * inner) * inverse;
  }
};
FLATCORE_INLINE CenteredVarianceCotangent centered_variance_cotangent(double scale, double eps, double inner) {
  return {scale, eps, inner, 1.0 / inner};
}

// d log ||sum_j p_j w_j - w_y||/dz of a class that is not y, by the products of its row and of w_y with the norm's dual
// direction; `norm` is the norm itself, `inverse` that of the norm in the shares' scale. Times
// `scale`.
FLATCORE_INLINE double centered_norm_cotangent(double scale, double share, double dot, double own, double norm,
                                               double inverse) {
  return share == 0.0 ? 0.0 : scale * share * (dot - own - norm) * inverse;
}

}  // namespace flatcore::math
