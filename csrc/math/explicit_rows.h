// Neuronwise and gradient norms of a row done again from differences w_j - w_a to the row of W of an anchor a, the top
// class or the label: u_j = exp((z_j - best)/T) over the classes whose row is not the anchor's, p_j = share u_j; for
// the CPU and CUDA, forward and backward.
#pragma once

#include "math/portable.h"

namespace flatcore::math {

// Whether a class counts in the sums; marks below 0 do not. However little it is: where all others leave a component at
// 0, it decides the component's sign.
FLATCORE_INLINE bool explicit_share_counts(double u) { return u > 0.0; }

// Where the classes whose row is the anchor's have this share, what sum u ||d||^2 - ||sum u d||^2/sum u loses by the
// difference is small beside the other part of the variance.
FLATCORE_INLINE bool spread_may_be_a_difference(double group) { return group > 0.25; }

// Var_p(w)/share: the spread sum_j u_j ||w_j - w_u||^2 about the mean w_u of those that differ, and that mean's
// distance to the anchor, by norm2 = ||sum_j u_j (w_j - w_a)||^2, total = sum_j u_j and the anchor's share. The
// difference sum_j p_j ||d_j||^2 - ||sum_j p_j d_j||^2 about the anchor would lose a factor of 1/p_a, which is C for a
// flat row: 1.7e-11 of float64's digits at C = 40,000.
FLATCORE_INLINE double explicit_variance(double spread, double group, double norm2, double total) {
  return total > 0.0 ? spread + group * norm2 / total : 0.0;
}

// d log Var_p(w)/dz: of a class with the anchor's row (of probability p), and of another by its own square
// ||w_j - w_a||^2 and its product with sum_j u_j (w_j - w_a). Times `scale`.
struct ExplicitVarianceCotangent {
  double scale, share, norm2, inner;

  FLATCORE_METHOD double twin(double p) const { return scale * p * (share * norm2 / inner - 1.0); }
  FLATCORE_METHOD double other(double u, double square, double dot) const {
    const double distance = square - 2.0 * share * dot + share * share * norm2;
    return scale * u * (distance - share * inner) / inner;
  }
};

// d log ||sum_j p_j (w_j - w_a)||/dz of a class by its difference's product with the norm's dual direction; norm over
// share. Times `scale`.
FLATCORE_INLINE double explicit_norm_cotangent(double scale, double u, double dot, double share, double norm) {
  return scale * u * (dot - share * norm) / norm;
}

}  // namespace flatcore::math
