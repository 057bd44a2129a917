// Neuronwise, fused: the gradient of one row's Var_p(w) where the tile's sums would lose it.
#pragma once

#include "cpu/head_backward_group.h"
#include "math/measure_cotangent.h"
#include "math/table_rows.h"

namespace flatcore::cpu::FLATCORE_TARGET {

// g_j = c/T d log Var_p(w)/dz_j and the pair factors of one row whose distances underflow next to the top class: u is
// taken relative to the best class whose row of W differs from the top one's. Returns false if there is no such class.
template <class C>
bool variance_of_row(const HeadProblem& call, const SharedBackward<C>& shared, Group<C>& group, int i, int64_t top,
                     double t, double confidence, double c, int64_t classes_stride) {
  const int64_t classes = call.C;
  const double inverse_temperature = 1.0 / call.temperature;
  const double* from_top = shared.distances + top * classes;
  const double* z = group.tile.z;
  double* u = group.row;
  double* s = group.row + classes;
  double best = -math::kInfinity;
  for (int64_t j = 0; j < classes; ++j) {
    if (from_top[j] > 0.0 && z[j * kTile + i] > best) best = z[j * kTile + i];
  }
  if (best == -math::kInfinity) return false;
  double group_share = 0.0;
  for (int64_t j = 0; j < classes; ++j) {
    const double logit = z[j * kTile + i];
    u[j] = from_top[j] > 0.0 ? math::tail_scale(logit, best, inverse_temperature) : 0.0;
    if (!(from_top[j] > 0.0)) group_share += math::tail_scale(logit, t, inverse_temperature) * confidence;
  }
  const double share = math::tail_scale(best, t, inverse_temperature) * confidence;
  double pairs = 0.0;
  for (int64_t j = 0; j < classes; ++j) {
    double sum = 0.0;
    for (int64_t k = 0; k < classes; ++k) sum += u[k] * shared.distances[j * classes + k];
    s[j] = sum;
    pairs += 0.5 * u[j] * sum;
  }
  const double inner = math::table_variance(group_share, s[top], share, pairs);
  if (!(inner > 0.0)) return false;
  auto form = math::variance_cotangent<double>(group_share, share, inner);
  double* left = group.left + i * classes_stride;
  double* right = group.right + i * classes_stride;
  for (int64_t j = 0; j < classes; ++j) {
    if (from_top[j] > 0.0) {
      group.g[j * kTile + i] = c * inverse_temperature * form.rest(u[j], from_top[j], s[j]);
      left[j] = c * form.inverse * share * u[j];
      right[j] = u[j];
    } else {
      const double p = math::tail_scale(z[j * kTile + i], t, inverse_temperature) * confidence;
      form.confidence = p;
      group.g[j * kTile + i] = c * inverse_temperature * form.top(s[top]);
      form.confidence = group_share;
      left[j] = 2.0 * c * form.inverse * p;
      right[j] = 0.0;
    }
  }
  return true;
}

}  // namespace flatcore::cpu::FLATCORE_TARGET
