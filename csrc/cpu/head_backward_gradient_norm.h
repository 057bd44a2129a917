// Gradient norms, fused: the gradient of one row's norm, from differences to the label's row of W.
#pragma once

#include "cpu/head_backward_group.h"
#include "math/explicit_rows.h"
#include "math/measure_cotangent.h"

namespace flatcore::cpu::FLATCORE_TARGET {

// g_j = c/T d log ||.||/dz_j of one row, with the norm's dual direction and its factor for each class. Returns false
// where no row of W differs from the label's, or the norm is 0.
template <class C>
bool gradient_norm_of_row(const HeadProblem& call, const SharedBackward<C>& shared, Group<C>& group, int i, int64_t y,
                          int64_t top, double t, double confidence, const RowUpstream& upstream, int64_t stride) {
  const int64_t classes = call.C;
  const double c = upstream.c, inverse_temperature = 1.0 / call.temperature;
  const double scale = std::scalbn(1.0, shared.exponent);
  const double* z = group.tile.z;
  double* u = group.row;
  double* direction = group.row + 2 * classes;
  const C* wy = shared.packed + y * stride;
  double best = -math::kInfinity;
  for (int64_t j = 0; j < classes; ++j) {
    const C* wj = shared.packed + j * stride;
    bool differs = false;
    for (int64_t d = 0; d < call.D && !differs; ++d) differs = wj[d] != wy[d];
    u[j] = differs ? 1.0 : -1.0;
    if (differs && z[j * kTile + i] > best) best = z[j * kTile + i];
  }
  if (best == -math::kInfinity) return false;
  for (int64_t d = 0; d < stride; ++d) direction[d] = 0.0;
  for (int64_t j = 0; j < classes; ++j) {
    if (u[j] < 0.0) continue;
    u[j] = math::tail_scale(z[j * kTile + i], best, inverse_temperature);
    if (u[j] == 0.0) continue;
    const C* wj = shared.packed + j * stride;
    for (int64_t d = 0; d < stride; d += kDoubles) {
      const DoubleV difference = (Load<double>::from(wj + d) - Load<double>::from(wy + d)) * scale;
      store_unaligned(direction + d, load_unaligned<DoubleV>(direction + d) + u[j] * difference);
    }
  }
  const math::NormOrder order = norm_order(1U << shared.field);
  double norm = 0.0, ties = 0.0;
  for (int64_t d = 0; d < call.D; ++d) {
    const double a = std::fabs(direction[d]);
    if (order == math::NormOrder::kTwo) {
      norm += a * a;
    } else if (order == math::NormOrder::kOne) {
      norm += a;
    } else if (a > norm) {
      norm = a;
    }
  }
  if (order == math::NormOrder::kTwo) norm = std::sqrt(norm);
  if (!(norm > 0.0)) return false;
  for (int64_t d = 0; d < call.D; ++d) ties += std::fabs(direction[d]) == norm ? 1.0 : 0.0;
  for (int64_t d = 0; d < call.D; ++d) {
    direction[d] = math::dual_entry(order, direction[d], norm, ties);
    group.dual[i * stride + d] = static_cast<C>(direction[d]);
  }
  // exp(rho)/T ||.||: F; the label's group has p_j of its own
  const double log_share = (best - t) * inverse_temperature + std::log(confidence);
  const double share = std::exp(log_share);
  const auto put_factor = [&](int64_t j, double factor) {
    const C k = static_cast<C>(factor * scale);
    const bool overflow = std::fabs(k) == static_cast<C>(math::kInfinity);
    group.k_compute[j * kTile + i] = overflow ? C{} : k;
    if (!overflow) return;
    for (int64_t d = 0; d < call.D; ++d) {  // inf where the direction has a part, not NaN where it has none
      if (direction[d] != 0.0) group.weight[j * stride + d] += k * static_cast<C>(direction[d]);
    }
  };
  double own = 0.0, others = 0.0;
  for (int64_t j = 0; j < classes; ++j) {
    double factor = 0.0;
    if (u[j] >= 0.0) {
      const C* wj = shared.packed + j * stride;
      DoubleV dots = {};
      for (int64_t d = 0; d < stride; d += kDoubles) {
        dots +=
            (Load<double>::from(wj + d) - Load<double>::from(wy + d)) * scale * load_unaligned<DoubleV>(direction + d);
      }
      group.g[j * kTile + i] =
          math::explicit_norm_cotangent(c * inverse_temperature, u[j], sum_lanes(dots), share, norm);
      factor = c * u[j] / norm;
    } else {
      const double log_p = (z[j * kTile + i] - t) * inverse_temperature + std::log(confidence);
      group.g[j * kTile + i] = -c * inverse_temperature * std::exp(log_p);
      if (j != y) factor = math::twin_factor(upstream.upstream, upstream.log_coefficient, log_p, log_share, norm);
    }
    if (j != top) others += group.g[j * kTile + i];
    own -= factor;
    put_factor(j, factor);
  }
  put_factor(y, own);
  // a wrong label: the top class's share is all but 1 and its own term a difference of equals; the sum is 0
  if (u[top] >= 0.0) group.g[top * kTile + i] = -others;
  return true;
}

}  // namespace flatcore::cpu::FLATCORE_TARGET
