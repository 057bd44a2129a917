// head_metrics_backward, large heads: what lies between the library's matrix products, for a chunk of rows at a time.
//
// Order of calls, in flatcore/_engine/chunked_cpu.py: the library forms z = W phi; head_chunk_statistics turns it into
// q. For neuronwise and gradient norms the library forms q (W - center), head_chunk_directions turns it into one
// direction per row (the mean row of p, or the dual direction of the gradient), the library forms direction (W -
// center)^T. Then head_chunk_cotangent writes dL/dz over it and the directions' factors over q, and the library forms
// the gradients.
//
// Who allocates: the caller. Nothing here is of size N x C but what a chunk holds.
//
// Numerics: as head_metrics_backward.cpp, per row in float64. Where the sums over q (W - center) leave too little of
// what they were taken from (nearly equal top rows), the row is done from explicit differences, one row at a time.
#include <cstring>

#include "cpu/head_backward_explicit.h"
#include "cpu/head_metrics_backward.h"
#include "cpu/head_rows.h"
#include "cpu/parallel.h"
#include "math/cancellation.h"
#include "math/centered_rows.h"
#include "math/measure_cotangent.h"

namespace flatcore::cpu::FLATCORE_TARGET {
namespace {

// c of the row with what makes it 0 or poison.
HeadBackwardRow start_row(const HeadBackwardChunk& call, int64_t i) {
  const int64_t n = call.first + i;
  const HeadRow& state = call.row_state[i];
  const bool is_gradient = (call.fields & kGradientFields) != 0;
  const RowUpstream upstream = row_upstream(call, n);
  HeadBackwardRow row{upstream.c, 1.0, 0.0, 0.0, 0.0, 0};
  if (!upstream.live) return row;
  if (state.m == math::kNoClass || row.c != row.c || (is_gradient && label_of(call, n) != Label::kValid)) {
    row.kind = kPoisoned;
    return row;
  }
  if (is_gradient) {
    if (row.c == 0.0) row.kind = kExplicit;
    return row;
  }
  const bool no_weight = (call.fields >> kLogLayerwise & 1U) != 0 && call.summary[0] == -math::kInfinity;
  if (state.log_eps == -math::kInfinity || log_head_square(state.log_n, call.include_bias) == -math::kInfinity ||
      no_weight) {
    row.c = 0.0;
  }
  return row;
}

template <class C, class W>
void direction_of_row(const HeadBackwardChunk& call, int64_t i) {
  const int64_t n = call.first + i, D = call.D;
  HeadBackwardRow& row = call.numbers[i];
  row = start_row(call, i);
  C* direction = static_cast<C*>(call.direction) + i * D;
  C* top_row = call.top_row != nullptr ? static_cast<C*>(call.top_row) + i * D : nullptr;
  const auto clear = [&] {
    const size_t bytes = static_cast<size_t>(D) * sizeof(C);
    if (bytes > 0) std::memset(static_cast<void*>(direction), 0, bytes);  // without features its address is null
    if (top_row != nullptr && bytes > 0) std::memset(static_cast<void*>(top_row), 0, bytes);
    if (call.top != nullptr) call.top[i] = 0;
    if (call.top_bias != nullptr) call.top_bias[i] = 0.0;
  };
  if (row.c == 0.0 || row.kind != kOrdinary) return clear();
  const HeadRow& state = call.row_state[i];
  const double* sums = call.mean + i * D;
  const double inverse_q_sum = 1.0 / state.q_sum;
  const auto x = [sums, inverse_q_sum](int64_t d) { return sums[d] * inverse_q_sum; };
  const double scale = std::scalbn(1.0, static_cast<int>(call.summary[1]));
  const W* w = static_cast<const W*>(call.weight.data);
  const int64_t step = call.weight.column_stride;
  const W* w_top = w + state.m * call.weight.row_stride;
  const auto centered = [&](const W* from, int64_t d) {
    return static_cast<double>(widen(from[d * step])) * scale - call.center[d];
  };

  if ((call.fields & kGradientFields) == 0) {
    math::CenteredVariance variance{0.0, 0.0, 0.0};
    double direction2 = 0.0;
    for (int64_t d = 0; d < D; ++d) {
      const double top = centered(w_top, d);
      const double delta = x(d) - top;
      const double p_mean = top + state.eps * delta;
      variance.top_mean2 += delta * delta;
      variance.mean2 += x(d) * x(d);
      variance.top2 += top * top;
      direction2 += p_mean * p_mean;
      direction[d] = static_cast<C>(p_mean);
    }
    double bias_delta = 0.0;
    if (call.include_bias) {
      const double top = call.bias[state.m] * scale - call.center[D];
      bias_delta = state.bias_mean - top;
      row.bias = top + state.eps * bias_delta;
      variance.add_column(top, state.bias_mean);
      direction2 += row.bias * row.bias;
    }
    const double inner = variance.inner(state.confidence, state.square_mean);
    const double magnitude = variance.magnitude(state.square_mean);
    if (call.equal_rows) {
      row.c = 0.0;
      return clear();
    }
    if (!math::variance_is_left(inner, magnitude) && inner == inner) {
      row.kind = kExplicit;
      return clear();
    }
    row.inner = inner;
    row.delta2 = variance.top_mean2;
    row.direction2 = direction2;
    const double factor = -2.0 * row.c * state.confidence / inner * scale;
    for (int64_t d = 0; d < D; ++d) top_row[d] = static_cast<C>(factor * (x(d) - centered(w_top, d)));
    call.top_bias[i] = factor * bias_delta;
    call.top[i] = state.m;
    return;
  }

  const int64_t y = call.target[n];
  const W* w_label = w + y * call.weight.row_stride;
  const bool top_label = y == state.m;
  const math::GradientMix mix = math::gradient_mix(top_label, state.confidence, state.eps);
  if (top_label && state.log_eps == -math::kInfinity) {
    row.c = 0.0;
    return clear();
  }
  double norm1 = 0.0, norm2 = 0.0, largest = 0.0, from = 0.0;
  const auto gradient = [&](int64_t d) {
    return mix.top * centered(w_top, d) + mix.rest * x(d) - centered(w_label, d);
  };
  for (int64_t d = 0; d < D; ++d) {
    const double value = gradient(d), a = std::fabs(value), label = centered(w_label, d);
    norm1 += a;
    norm2 += a * a;
    from += label * label + x(d) * x(d);
    largest = a > largest ? a : largest;
  }
  if (!math::gradient_is_left(norm2, from, state.square_mean) && norm2 == norm2) {
    row.kind = kExplicit;
    return clear();
  }
  const math::NormOrder order = norm_order(call.fields);
  if (order == math::NormOrder::kTwo) {
    row.inner = std::sqrt(norm2);
    for (int64_t d = 0; d < D; ++d) direction[d] = static_cast<C>(gradient(d) / row.inner);
    return;
  }
  // A sign, and which component is the largest, must not come from the rounding of the product: a component that is 0,
  // where all classes with a share agree in it, or one of two equal ones, is summed again from differences.
  const C* q = static_cast<const C*>(call.q) + i * call.q_stride;
  const auto exact = [&](int64_t d) __attribute__((noinline)) {
    const double own = static_cast<double>(widen(w_label[d * step]));
    double sum = 0.0;
    for (int64_t j = 0; j < call.C; ++j) {
      const double share = mix.share(j == state.m, static_cast<double>(q[j]) * inverse_q_sum);
      if (share == 0.0) continue;
      sum += share * (static_cast<double>(widen(w[j * call.weight.row_stride + d * step])) - own);
    }
    return sum * scale;
  };
  const auto unsure = [&](int64_t d, double from_value) {
    const double terms =
        std::fabs(mix.top * centered(w_top, d)) + std::fabs(mix.rest * x(d)) + std::fabs(centered(w_label, d));
    return math::component_is_unsure(from_value, terms, sizeof(C) == 8);
  };
  if (order == math::NormOrder::kOne) {
    row.inner = norm1;
    for (int64_t d = 0; d < D; ++d) {
      double value = gradient(d);
      if (unsure(d, std::fabs(value))) value = exact(d);
      direction[d] = static_cast<C>(math::sign_of(value));
    }
    return;
  }
  // Compared within the noise and never for equality: the compiler may contract the same expression in two ways.
  const auto is_candidate = [&](int64_t d) { return unsure(d, (largest - std::fabs(gradient(d))) * 0.5); };
  int64_t candidates = 0;
  for (int64_t d = 0; d < D; ++d) candidates += is_candidate(d) ? 1 : 0;
  double found = 0.0, ties = 1.0;
  for (int64_t d = 0; candidates > 1 && d < D; ++d) {
    if (!is_candidate(d)) continue;
    const double a = std::fabs(exact(d));
    found = a > found ? a : found;
  }
  if (candidates > 1) {
    ties = 0.0;
    for (int64_t d = 0; d < D; ++d) {
      if (is_candidate(d)) ties += math::is_among_largest(std::fabs(exact(d)), found) ? 1.0 : 0.0;
    }
  }
  row.inner = candidates > 1 ? found : largest;
  for (int64_t d = 0; d < D; ++d) {
    const bool among = is_candidate(d);
    const double value = !among ? 0.0 : candidates > 1 ? exact(d) : gradient(d);
    const bool is_largest = candidates <= 1 || math::is_among_largest(std::fabs(value), found);
    direction[d] = static_cast<C>(is_largest ? math::sign_of(value) / ties : 0.0);
  }
}

// 2 c phi/||phi||^2, or zeros, or NaN.
template <class C, class T>
void norm_part(const HeadBackwardChunk& call, int64_t i) {
  const T* x = static_cast<const T*>(call.features.data) + (call.first + i) * call.features.row_stride;
  const HeadBackwardRow& row = call.numbers[i];
  C* to = static_cast<C*>(call.d_features) + i * call.D;
  const bool none = row.c == 0.0 || row.kind == kPoisoned || (call.fields & kGradientFields) != 0;
  if (none) {
    const C value = row.kind == kPoisoned ? static_cast<C>(kNan) : C{};
    for (int64_t d = 0; d < call.D; ++d) to[d] = value;
    return;
  }
  // in two steps: ||phi||^-2 alone may leave the range
  const double half = std::exp(-0.5 * log_head_square(call.row_state[i].log_n, call.include_bias));
  const double factor = 2.0 * row.c * half;
  for (int64_t d = 0; d < call.D; ++d) {
    to[d] = static_cast<C>(factor * (half * static_cast<double>(widen(x[d * call.features.column_stride]))));
  }
}

template <class C>
void cotangent_of_row(const HeadBackwardChunk& call, int64_t i) {
  const int64_t classes = call.C;
  const HeadRow& state = call.row_state[i];
  const double inverse_temperature = 1.0 / call.temperature;
  C* q = static_cast<C*>(call.q) + i * call.q_stride;
  C* g = static_cast<C*>(call.g) + i * call.g_stride;
  const bool weights = (call.fields & kWeightFields) != 0;
  if (!weights) call.numbers[i] = start_row(call, i);
  const HeadBackwardRow& row = call.numbers[i];
  if (call.d_features != nullptr) {
    with_element(call.features.dtype, [&](auto* type) { norm_part<C, ElementOf<decltype(type)>>(call, i); });
  }
  if (row.c == 0.0 || row.kind != kOrdinary) {
    const C value = row.kind == kPoisoned ? static_cast<C>(kNan) : C{};
    for (int64_t j = 0; j < classes; ++j) g[j] = value;
    if (weights) std::memset(static_cast<void*>(q), 0, static_cast<size_t>(classes) * sizeof(C));
    return;
  }
  const double scale = row.c * inverse_temperature;
  if (!weights) {
    DoubleV squares = {};
    int64_t j = 0;
    for (; j + kDoubles <= classes; j += kDoubles) {
      const DoubleV value = Load<double>::from(q + j);
      squares += value * value;
    }
    double s2 = sum_lanes(squares);
    for (; j < classes; ++j) s2 += static_cast<double>(q[j]) * static_cast<double>(q[j]);
    const auto form = math::trace_cotangent<double>(state.confidence, state.eps, s2);
    for (j = 0; j < classes; ++j) g[j] = static_cast<C>(scale * form.rest(static_cast<double>(q[j])));
    g[state.m] = static_cast<C>(scale * form.top);
    return;
  }
  if ((call.fields & kGradientFields) == 0) {
    const auto form = math::centered_variance_cotangent(scale, state.eps, row.inner);
    const double w_scale = std::scalbn(1.0, static_cast<int>(call.summary[1]));
    const double factor = 2.0 * row.c * form.inverse * w_scale;
    for (int64_t j = 0; j < classes; ++j) {
      const double share = static_cast<double>(q[j]);
      double dot = static_cast<double>(g[j]);
      if (call.include_bias) dot += row.bias * (call.bias[j] * w_scale - call.center[call.D]);
      g[j] = static_cast<C>(form.rest(share, call.centered_squares[j], dot, row.direction2));
      q[j] = static_cast<C>(factor * share);
    }
    g[state.m] = static_cast<C>(form.top(state.confidence, row.delta2));
    return;
  }
  const int64_t y = call.target[call.first + i];
  const bool top_label = y == state.m;
  const double inverse = 1.0 / row.inner;
  const double w_scale = std::scalbn(1.0, static_cast<int>(call.summary[1]));
  const math::GradientMix mix = math::gradient_mix(top_label, state.confidence, state.eps);
  const double own = static_cast<double>(g[y]);
  const double p_y = top_label ? state.confidence : state.eps * static_cast<double>(q[y]);
  const double norm = top_label ? state.eps * row.inner : row.inner;  // ||sum_j p_j (w_j - w_y)||
  double others = 0.0;
  for (int64_t j = 0; j < classes; ++j) {
    const double share = mix.share(j == state.m, static_cast<double>(q[j]));
    double value = math::centered_norm_cotangent(scale, share, static_cast<double>(g[j]), own, norm, inverse);
    if (j == y) value = -scale * p_y;
    if (j != state.m) others += value;
    g[j] = static_cast<C>(value);
    q[j] = static_cast<C>(row.c * w_scale * inverse * share);
  }
  // a wrong label: the top class's share is all but 1 and its own term a difference of equals; the sum is 0
  if (!top_label) g[state.m] = static_cast<C>(-others);
  q[y] = static_cast<C>(row.c * w_scale * inverse * (top_label ? -1.0 : p_y - 1.0));
}

}  // namespace

void head_chunk_directions(const HeadBackwardChunk& call) {
  parallel_for(call.rows * call.D < (1 << 14) ? 1 : call.threads, call.rows, [&](int64_t i, int) {
    with_element(call.weight.dtype, [&](auto* type) {
      using W = ElementOf<decltype(type)>;
      if (call.double_compute) {
        direction_of_row<double, W>(call, i);
      } else if constexpr (sizeof(W) <= sizeof(float)) {
        direction_of_row<float, W>(call, i);
      }
    });
  });
}

void head_chunk_cotangent(const HeadBackwardChunk& call) {
  parallel_for(call.rows * (call.C + call.D) < (1 << 14) ? 1 : call.threads, call.rows, [&](int64_t i, int) {
    if (call.double_compute) {
      cotangent_of_row<double>(call, i);
    } else {
      cotangent_of_row<float>(call, i);
    }
  });
  for (int64_t i = 0; i < call.rows; ++i) {
    if (call.numbers[i].kind != kExplicit) continue;
    with_element(call.weight.dtype, [&](auto* type) {
      using W = ElementOf<decltype(type)>;
      if (call.double_compute) {
        explicit_backward<double, W>(call, i);
      } else if constexpr (sizeof(W) <= sizeof(float)) {
        explicit_backward<float, W>(call, i);
      }
    });
  }
}

}  // namespace flatcore::cpu::FLATCORE_TARGET
