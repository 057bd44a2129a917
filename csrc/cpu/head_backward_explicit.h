// Large heads: the gradient of a row whose sums over q would cancel, from explicit differences of rows of W.
#pragma once

#include <cmath>

#include "cpu/head_metrics_backward.h"
#include "cpu/head_rows.h"
#include "math/explicit_rows.h"

namespace flatcore::cpu::FLATCORE_TARGET {

// A row from explicit differences to the row of W of an anchor, the top class (neuronwise) or the label: what both
// measures need. Costs 6CD operations in float64 with the measure's own part.
template <class W>
struct ExplicitRow {
  const HeadBackwardLoop& call;
  const HeadRow& state;
  const RowUpstream upstream;
  const int64_t classes, D, anchor;
  const double c, inverse_temperature, scale;
  const bool with_bias;
  double* z;
  double* u;           // exp of the logits relative to the best that differs; -1 for a class whose row is the anchor's
  double* direction;   // sum_j u_j (w_j - w_anchor): D, and the bias's entry behind
  double group = 0.0;  // sum of p_j over the classes whose row equals the anchor's
  double log_share = 0.0, share = 0.0;
  double square_mean = 0.0, total = 0.0;                       // sum_j u_j ||w_j - w_anchor||^2, sum_j u_j
  double norm1 = 0.0, norm2 = 0.0, largest = 0.0, ties = 0.0;  // of the direction; norm2 squared
  bool differs = false;                                        // whether any class does

  ExplicitRow(const HeadBackwardLoop& from, int64_t first, int64_t i, bool gradient)
      : call(from),
        state(from.row_state[i]),
        upstream(row_upstream(from, first + i)),
        classes(from.C),
        D(from.D),
        anchor(gradient ? from.target[first + i] : from.row_state[i].m),
        c(from.numbers[i].c),
        inverse_temperature(1.0 / from.temperature),
        scale(std::scalbn(1.0, static_cast<int>(from.summary[1]))),
        with_bias(from.include_bias && !gradient),
        z(from.scratch),
        u(z + from.C),
        direction(u + from.C) {
    explicit_logits(call, first + i, z);
    const double best = compare();
    differs = best != -math::kInfinity;
    if (differs) sum(best);
  }

  double element(int64_t j, int64_t d) const {
    const W* row = static_cast<const W*>(call.weight.data) + j * call.weight.row_stride;
    return static_cast<double>(widen(row[d * call.weight.column_stride]));
  }
  double difference(int64_t j, int64_t d) const { return (element(j, d) - element(anchor, d)) * scale; }
  double bias_difference(int64_t j) const { return with_bias ? (call.bias[j] - call.bias[anchor]) * scale : 0.0; }
  double probability(int64_t j) const {
    return math::tail_scale(z[j], z[state.m], inverse_temperature) * state.confidence;
  }

 private:
  // Marks the classes whose row is the anchor's; returns the best logit of the others.
  double compare() {
    double best = -math::kInfinity;
    for (int64_t j = 0; j < classes; ++j) {
      bool other = with_bias && call.bias[j] != call.bias[anchor];
      for (int64_t d = 0; d < D && !other; ++d) other = element(j, d) != element(anchor, d);
      u[j] = other ? 1.0 : -1.0;
      if (!other) group += probability(j);
      if (other && z[j] > best) best = z[j];
    }
    return best;
  }

  void sum(double best) {
    log_share = (best - z[state.m]) * inverse_temperature - state.log1p_tau;
    share = std::exp(log_share);
    for (int64_t d = 0; d <= D; ++d) direction[d] = 0.0;
    for (int64_t j = 0; j < classes; ++j) {
      if (u[j] < 0.0) continue;
      u[j] = math::tail_scale(z[j], best, inverse_temperature);
      if (u[j] == 0.0) continue;
      double square = 0.0;
      for (int64_t d = 0; d < D; ++d) {
        const double value = difference(j, d);
        direction[d] += u[j] * value;
        square += value * value;
      }
      const double value = bias_difference(j);
      direction[D] += u[j] * value;
      square_mean += u[j] * (square + value * value);
      total += u[j];
    }
    for (int64_t d = 0; d <= D; ++d) {
      const double a = std::fabs(direction[d]);
      norm1 += a;
      norm2 += a * a;
      ties = a == largest ? ties + 1.0 : a > largest ? 1.0 : ties;
      largest = a > largest ? a : largest;
    }
  }
};

// Neuronwise. False where Var_p(w) is 0: the row has no gradient.
template <class C, class W>
bool explicit_variance_gradient(const ExplicitRow<W>& row, C* g) {
  const HeadBackwardLoop& call = row.call;
  const double* u = row.u;
  const double* direction = row.direction;
  const int64_t D = row.D;
  const double share = row.share, norm2 = row.norm2, total = row.total, c = row.c;
  double spread = row.square_mean - norm2 / total;
  if (!math::spread_may_be_a_difference(row.group)) {
    spread = 0.0;
    for (int64_t j = 0; j < row.classes; ++j) {
      if (!(u[j] > 0.0)) continue;
      const double bias_part = row.bias_difference(j) - direction[D] / total;
      double square = bias_part * bias_part;
      for (int64_t d = 0; d < D; ++d) {
        const double value = row.difference(j, d) - direction[d] / total;
        square += value * value;
      }
      spread += u[j] * square;
    }
  }
  const double inner = math::explicit_variance(spread > 0.0 ? spread : 0.0, row.group, norm2, total);
  if (!(inner > 0.0)) return false;
  const math::ExplicitVarianceCotangent form{c * row.inverse_temperature, share, norm2, inner};
  C* d_weight = static_cast<C*>(call.d_weight);
  for (int64_t j = 0; j < row.classes; ++j) {
    const double p = u[j] < 0.0 ? row.probability(j) : 0.0;
    if (u[j] < 0.0) {
      g[j] = static_cast<C>(form.twin(p));
    } else {
      if (u[j] == 0.0) continue;
      double square = 0.0, dot = 0.0;
      for (int64_t d = 0; d < D; ++d) {
        const double value = row.difference(j, d);
        square += value * value;
        dot += value * direction[d];
      }
      const double value = row.bias_difference(j);
      square += value * value;
      dot += value * direction[D];
      g[j] = static_cast<C>(form.other(u[j], square, dot));
    }
    const double k = 2.0 * c / inner * row.scale;
    if (d_weight != nullptr) {
      for (int64_t d = 0; d < D; ++d) {
        const double part = u[j] < 0.0 ? -p * direction[d] : u[j] * (row.difference(j, d) - share * direction[d]);
        d_weight[j * D + d] += static_cast<C>(k * part);
      }
    }
    if (row.with_bias && call.d_bias != nullptr) {
      call.d_bias[j] += k * (u[j] < 0.0 ? -p * direction[D] : u[j] * (row.bias_difference(j) - share * direction[D]));
    }
  }
  return true;
}

// Gradient norms. False where the norm is 0.
template <class C, class W>
bool explicit_gradient_norm(const ExplicitRow<W>& row, C* g) {
  const HeadBackwardLoop& call = row.call;
  const double* u = row.u;
  const double* z = row.z;
  double* direction = row.direction;
  const int64_t D = row.D, m = row.state.m;
  const double c = row.c, inverse_temperature = row.inverse_temperature, scale = row.scale;
  const math::NormOrder order = norm_order(call.fields);
  const double norm = order == math::NormOrder::kTwo   ? std::sqrt(row.norm2)
                      : order == math::NormOrder::kOne ? row.norm1
                                                       : row.largest;
  if (!(norm > 0.0)) return false;
  // ties over D: the entry behind the last column is 0 and never the largest
  for (int64_t d = 0; d < D; ++d) direction[d] = math::dual_entry(order, direction[d], norm, row.ties);
  C* d_weight = static_cast<C*>(call.d_weight);
  double own = 0.0, others = 0.0;
  const auto add = [&](int64_t j, double factor) {
    if (d_weight == nullptr || factor == 0.0) return;
    for (int64_t d = 0; d < D; ++d) {
      // by select: the factor may have left the range where the direction has no part
      if (direction[d] != 0.0) d_weight[j * D + d] += static_cast<C>(factor * scale * direction[d]);
    }
  };
  for (int64_t j = 0; j < row.classes; ++j) {
    double factor = 0.0;
    if (u[j] >= 0.0) {
      double dot = 0.0;
      if (u[j] > 0.0) {
        for (int64_t d = 0; d < D; ++d) dot += row.difference(j, d) * direction[d];
      }
      g[j] = static_cast<C>(math::explicit_norm_cotangent(c * inverse_temperature, u[j], dot, row.share, norm));
      factor = c * u[j] / norm;
    } else {
      const double log_p = (z[j] - z[m]) * inverse_temperature - row.state.log1p_tau;
      g[j] = static_cast<C>(-c * inverse_temperature * std::exp(log_p));
      if (j != row.anchor) {
        factor = math::twin_factor(row.upstream.upstream, row.upstream.log_coefficient, log_p, row.log_share, norm);
      }
    }
    if (j != m) others += static_cast<double>(g[j]);
    own -= factor;
    if (j != row.anchor) add(j, factor);
  }
  add(row.anchor, own);
  if (u[m] >= 0.0) g[m] = static_cast<C>(-others);
  return true;
}

// Writes g, adds to d_weight and d_bias (docs/mathematics.md, "Derivatives"); a row without a gradient has no features'
// part either.
template <class C, class W>
void explicit_backward(const HeadBackwardLoop& call, int64_t first, int64_t i, C* g) {
  const bool gradient = (call.fields & kGradientFields) != 0;
  const ExplicitRow<W> row(call, first, i, gradient);
  for (int64_t j = 0; j < call.C; ++j) g[j] = C{};
  if (row.differs && (gradient ? explicit_gradient_norm<C, W>(row, g) : explicit_variance_gradient<C, W>(row, g)))
    return;
  if (call.d_features == nullptr) return;
  C* to = static_cast<C*>(call.d_features) + (first + i) * call.D;
  for (int64_t d = 0; d < call.D; ++d) to[d] = C{};
}

}  // namespace flatcore::cpu::FLATCORE_TARGET
