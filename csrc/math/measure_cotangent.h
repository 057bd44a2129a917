// Derivatives of log Tr H and of log Var_p(w) with respect to the logits, from the statistics of the epsilon-split.
//
// Numerics: relative to the value itself, so nothing shrinks with confidence: for a confident row the shares of the top
// class and of the rest are -1 and q_j. Every division is by a bracket in [1, 2] or by a sum of terms of one sign.
// docs/mathematics.md, "Derivatives". The division by T is the caller's.
#pragma once

#include "math/portable.h"

namespace flatcore::math {

// d log(1 - sum p^2)/dz: `top` for the top class, rest(q_j) for any other.
template <class V>
struct TraceCotangent {
  V eps, sum_p2, twice_inverse, top;

  FLATCORE_METHOD V rest(V q) const { return q * (sum_p2 - eps * q) * twice_inverse; }
};
template <class V>
FLATCORE_INLINE TraceCotangent<V> trace_cotangent(V confidence, V eps, V s2) {
  const V bracket = 2.0 - eps * (1.0 + s2);
  const V twice_inverse = 2.0 / bracket;
  return {eps, 1.0 - eps * bracket, twice_inverse, -confidence * (confidence - eps * s2) * twice_inverse};
}

// d log Var_p(w)/dz, with p_j = share u_j for the classes apart from the top one, s_j = sum_k u_k D_jk,
// inner = Var_p(w)/share = p_m s_m + share/2 sum_j u_j s_j: top(s_m), and rest(u_j, D_mj, s_j).
template <class V>
struct VarianceCotangent {
  V confidence, share, inner, inverse;

  FLATCORE_METHOD V top(V s_top) const { return confidence * (s_top - 2.0 * inner) * inverse; }
  FLATCORE_METHOD V rest(V u, V from_top, V s) const {
    return u * (confidence * from_top + share * (s - 2.0 * inner)) * inverse;
  }
};
template <class V>
FLATCORE_INLINE VarianceCotangent<V> variance_cotangent(V confidence, V share, V inner) {
  return {confidence, share, inner, 1.0 / inner};
}

}  // namespace flatcore::math
