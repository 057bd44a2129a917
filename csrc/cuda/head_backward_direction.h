// A row's direction, component by component, from its sums over u (W - center); included by .cu files only.
#pragma once

#include "cuda/head_metrics.h"
#include "cuda/head_rows.h"
#include "math/cancellation.h"

namespace flatcore::cuda {

template <class V>
struct Direction {
  const HeadBackwardLoop& call;
  const V* mean;
  int64_t m, y;  // the top class, and the label; 0 for a row that adds nothing
  bool top_label;
  double alpha, beta;  // as math::gradient_mix, whose record would spill on sm_90
  double scale, inverse;

  __device__ __forceinline__ Direction(const HeadBackwardLoop& loop, int64_t n, int64_t i, bool live)
      : call(loop),
        mean(static_cast<const V*>(loop.mean) + i * loop.D),
        m(live ? loop.row_state[i].m : 0),
        y(live && is_gradient(loop) ? loop.target[n] : m),
        top_label(y == m),
        alpha(top_label ? 0.0 : loop.row_state[i].confidence),
        beta(top_label ? 1.0 : loop.row_state[i].eps),
        scale(scalbn(1.0, static_cast<int>(loop.summary[1]))),
        inverse(1.0 / loop.row_state[i].q_sum) {}

  __device__ __forceinline__ double x(int64_t d) const { return static_cast<double>(mean[d]) * inverse; }
  __device__ __forceinline__ double centered(int64_t j, int64_t d) const {
    return element(call.weight, j, d) * scale - call.center[d];
  }
  // of sum_j p_j (w_j - w_y)
  __device__ __forceinline__ double value_at(int64_t d) const {
    return alpha * centered(m, d) + beta * x(d) - centered(y, d);
  }
  __device__ __forceinline__ bool is_unsure(int64_t d, double distance) const {
    const double terms = fabs(alpha * centered(m, d)) + fabs(beta * x(d)) + fabs(centered(y, d));
    return math::component_is_unsure(distance, terms, sizeof(V) == 8);
  }
  // Compared within the noise and never for equality: the compiler may contract the same expression in two ways.
  __device__ __forceinline__ bool may_be_largest(int64_t d, double largest) const {
    return is_unsure(d, (largest - fabs(value_at(d))) * 0.5);
  }
};

// A row's shares of its logits, from what was kept of it. V: float where logits are used as they stand.
template <class V>
struct RowShares {
  double base, inverse_sum, inverse_temperature;

  __device__ __forceinline__ double share(V z) const {
    if (!(z > -static_cast<V>(math::kInfinity))) return 0.0;
    if constexpr (sizeof(V) == 4) {
      return static_cast<double>(math::exp_difference_float(z, static_cast<float>(base))) * inverse_sum;
    } else {
      return math::exp_nonpositive((z - base) * inverse_temperature) * inverse_sum;
    }
  }
};
template <class V>
__device__ __forceinline__ RowShares<V> shares_of(const HeadBackwardLoop& call, const math::SoftmaxTail& tail) {
  return {tail.r == -math::kInfinity ? 0.0 : tail.r, tail.u1 > 0.0 ? 1.0 / tail.u1 : 0.0, 1.0 / call.temperature};
}

}  // namespace flatcore::cuda
