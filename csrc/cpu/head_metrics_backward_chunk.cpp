// head_metrics_backward, large heads: what lies between the library's matrix products, for tiles of classes outside and
// blocks of rows inside.
//
// Order of calls, in flatcore/_engine/chunked_cpu_backward.py: the loop of the values gives a block's row statistics
// and, for neuronwise and gradient norms, its sums over u (W - center). head_backward_rows turns those into one
// direction per row (the mean row of p, or the dual direction of the gradient). Then for each tile the library forms z
// = W_tile phi and direction (W_tile - center)^T, head_backward_tile writes dL/dz over the latter and the directions'
// factors over z, and the library adds up the gradients. Rows that need explicit differences come last, by
// head_backward_explicit.
//
// Who allocates: the caller. Nothing here is of size N x C.
//
// Numerics: as head_metrics_backward.cpp, per row in float64. Where the sums over u (W - center) leave too little of
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

const HeadTail& tail_of(const HeadBackwardLoop& call, int64_t first, int64_t i) {
  return call.tails[(call.all_tails ? first : 0) + i];
}

// q of all classes of a row, from logits in float64.
void shares_of_row(const HeadBackwardLoop& call, int64_t n, const math::SoftmaxTail& tail, double* q) {
  explicit_logits(call, n, q);
  const double inverse_temperature = 1.0 / call.temperature, base = tail.r == -math::kInfinity ? 0.0 : tail.r;
  double sum = 0.0;
  for (int64_t j = 0; j < call.C; ++j) {
    q[j] = j == tail.m ? 0.0 : math::tail_scale(q[j] < base ? q[j] : base, base, inverse_temperature);
    sum += q[j];
  }
  for (int64_t j = 0; j < call.C; ++j) q[j] = sum > 0.0 ? q[j] / sum : 0.0;
}

// c of the row with what makes it 0 or poison.
HeadBackwardRow start_row(const HeadBackwardLoop& call, int64_t first, int64_t i) {
  const int64_t n = first + i;
  const HeadRow& state = call.row_state[i];
  const bool is_gradient = (call.fields & kGradientFields) != 0;
  const RowUpstream upstream = row_upstream(call, n);
  HeadBackwardRow row{upstream.c, 1.0, 0.0, 0.0, 0.0, kOrdinary, 0.0, 0.0};
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
void direction_of_row(const HeadBackwardLoop& call, int64_t first, int64_t i, int thread) {
  const int64_t n = first + i, D = call.D;
  HeadBackwardRow& row = call.numbers[i];
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
  if (call.top != nullptr) call.top[i] = 0;
  const HeadRow& state = call.row_state[i];
  const C* sums = static_cast<const C*>(call.mean) + i * D;
  const double inverse_q_sum = 1.0 / state.q_sum;
  const auto x = [sums, inverse_q_sum](int64_t d) { return static_cast<double>(sums[d]) * inverse_q_sum; };
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
  call.top[i] = state.m;
  const math::NormOrder order = norm_order(call.fields);
  if (order == math::NormOrder::kTwo) {
    row.inner = std::sqrt(norm2);
    for (int64_t d = 0; d < D; ++d) direction[d] = static_cast<C>(gradient(d) / row.inner);
    return;
  }
  // A sign, and which component is the largest, must not come from the rounding of the product: a component that is 0,
  // where all classes with a share agree in it, or one of two equal ones, is summed again from differences.
  double* q = call.scratch + thread * head_chunk_scratch(call.C, D);
  bool q_known = false;
  const auto exact = [&](int64_t d) __attribute__((noinline)) {
    if (!q_known) shares_of_row(call, n, tail_of(call, first, i).tail, q);
    q_known = true;
    const double own = static_cast<double>(widen(w_label[d * step]));
    double sum = 0.0;
    for (int64_t j = 0; j < call.C; ++j) {
      const double share = mix.share(j == state.m, q[j]);
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
void norm_part(const HeadBackwardLoop& call, int64_t first, int64_t i) {
  const T* x = static_cast<const T*>(call.features.data) + (first + i) * call.features.row_stride;
  const HeadBackwardRow& row = call.numbers[i];
  C* to = static_cast<C*>(call.d_features) + (first + i) * call.D;
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

// The product of a gradient norm's direction with the label's row of W, as the library forms the others: in the compute
// type's numbers, summed in float64.
template <class C, class W>
double own_product(const HeadBackwardLoop& call, int64_t n, int64_t i) {
  const C* direction = static_cast<const C*>(call.direction) + i * call.D;
  const W* w = static_cast<const W*>(call.weight.data) + call.target[n] * call.weight.row_stride;
  const double scale = std::scalbn(1.0, static_cast<int>(call.summary[1]));
  double sum = 0.0;
  for (int64_t d = 0; d < call.D; ++d) {
    const double row = static_cast<double>(widen(w[d * call.weight.column_stride])) * scale - call.center[d];
    sum += static_cast<double>(direction[d]) * row;
  }
  return sum;
}

// A row's logits of a tile as doubles, the bias added where it is still to be added.
template <class C>
struct TileLogits {
  const C* z;
  const double* bias;
  double base, inverse_temperature, inverse_sum;

  // q of a class that is not the top one.
  double share(int64_t k) const {
    const double logit = static_cast<double>(z[k]) + (bias != nullptr ? bias[k] : 0.0);
    return math::tail_scale(logit, base, inverse_temperature) * inverse_sum;
  }
  DoubleV shares(int64_t k) const {
    DoubleV logit = Load<double>::from(z + k);
    if (bias != nullptr) logit += load_unaligned<DoubleV>(bias + k);
    return math::exp_nonpositive((logit - base) * inverse_temperature) * inverse_sum;
  }
};

template <class C>
FLATCORE_INLINE void store_compute(C* to, DoubleV v) {
  if constexpr (sizeof(C) == 8) {
    store_unaligned(to, v);
  } else {
    store_unaligned(to, to_float(v));
  }
}

template <class C>
void cotangent_of_row(const HeadBackwardLoop& call, const HeadBackwardTile& tile, int64_t i) {
  const int64_t classes = tile.classes;
  const HeadRow& state = call.row_state[i];
  const math::SoftmaxTail& tail = tail_of(call, tile.first, i).tail;
  const double inverse_temperature = 1.0 / call.temperature;
  C* z = static_cast<C*>(tile.z) + i * tile.stride;
  C* g = static_cast<C*>(tile.g) + i * tile.stride;  // z itself without weights
  const bool weights = (call.fields & kWeightFields) != 0;
  HeadBackwardRow& row = call.numbers[i];
  if (row.c == 0.0 || row.kind != kOrdinary) {
    const C value = row.kind == kPoisoned ? static_cast<C>(kNan) : C{};
    if (weights) std::memset(static_cast<void*>(z), 0, static_cast<size_t>(classes) * sizeof(C));
    for (int64_t k = 0; k < classes; ++k) g[k] = value;
    return;
  }
  const double* bias = call.bias != nullptr && call.logits.data == nullptr ? call.bias + tile.first_class : nullptr;
  const TileLogits<C> logits{z, bias, tail.r == -math::kInfinity ? 0.0 : tail.r, inverse_temperature,
                             tail.u1 > 0.0 ? 1.0 / tail.u1 : 0.0};
  const int64_t top = state.m - tile.first_class;  // may lie outside
  const bool has_top = top >= 0 && top < classes;
  const double scale = row.c * inverse_temperature;
  if (!weights) {
    const double s2 = tail.u1 > 0.0 ? tail.u2 / (tail.u1 * tail.u1) : 0.0;
    const auto form = math::trace_cotangent<double>(state.confidence, state.eps, s2);
    int64_t k = 0;
    for (; k + kDoubles <= classes; k += kDoubles) {
      const DoubleV q = logits.shares(k);
      store_compute(g + k, scale * (q * (form.sum_p2 - form.eps * q) * form.twice_inverse));
    }
    for (; k < classes; ++k) g[k] = static_cast<C>(scale * form.rest(logits.share(k)));
    if (has_top) g[top] = static_cast<C>(scale * form.top);
    return;
  }
  const double w_scale = std::scalbn(1.0, static_cast<int>(call.summary[1]));
  if ((call.fields & kGradientFields) == 0) {
    const auto form = math::centered_variance_cotangent(scale, state.eps, row.inner);
    const double factor = 2.0 * row.c * form.inverse * w_scale;
    const double* squares = call.centered_squares + tile.first_class;
    const double* column = call.include_bias ? call.bias + tile.first_class : nullptr;
    for (int64_t k = 0; k < classes; ++k) {
      const double share = k == top ? 0.0 : logits.share(k);
      double dot = static_cast<double>(g[k]);
      if (column != nullptr) dot += row.bias * (column[k] * w_scale - call.center[call.D]);
      g[k] = static_cast<C>(form.rest(share, squares[k], dot, row.direction2));
      z[k] = static_cast<C>(factor * share);
    }
    if (has_top) g[top] = static_cast<C>(form.top(state.confidence, row.delta2));
    return;
  }
  const int64_t y = call.target[tile.first + i], label = y - tile.first_class;
  const bool top_label = y == state.m;
  const double inverse = 1.0 / row.inner;
  const math::GradientMix mix = math::gradient_mix(top_label, state.confidence, state.eps);
  const double own_logit = tail_of(call, tile.first, i).own;
  const double q_y =
      top_label ? 0.0 : math::tail_scale(own_logit, logits.base, inverse_temperature) * logits.inverse_sum;
  const double p_y = top_label ? state.confidence : state.eps * q_y;
  const double norm = top_label ? state.eps * row.inner : row.inner;  // ||sum_j p_j (w_j - w_y)||
  for (int64_t k = 0; k < classes; ++k) {
    const double share = mix.share(k == top, k == top ? 0.0 : logits.share(k));
    double value = math::centered_norm_cotangent(scale, share, static_cast<double>(g[k]), row.own, norm, inverse);
    if (k == label) value = -scale * p_y;
    if (k == top && !top_label) {
      value = 0.0;  // a wrong label: its share is all but 1 and its own term a difference of equals; the sum is 0
    } else if (k != top) {
      row.others += value;
    }
    g[k] = static_cast<C>(value);
    z[k] = static_cast<C>(row.c * w_scale * inverse * (k != label ? share : top_label ? -1.0 : p_y - 1.0));
  }
}

}  // namespace

void head_backward_rows(const HeadBackwardLoop& call, int64_t first, int64_t rows) {
  const bool weights = (call.fields & kWeightFields) != 0;
  parallel_for(rows * call.D < (1 << 14) ? 1 : call.threads, rows, [&](int64_t i, int thread) {
    call.numbers[i] = start_row(call, first, i);
    with_element(call.weight.dtype, [&](auto* type) {
      using W = ElementOf<decltype(type)>;
      const auto run = [&](auto* compute) {
        using C = ElementOf<decltype(compute)>;
        if constexpr (sizeof(W) <= sizeof(C)) {
          if (weights) direction_of_row<C, W>(call, first, i, thread);
          HeadBackwardRow& row = call.numbers[i];
          const bool ordinary = weights && row.c != 0.0 && row.kind == kOrdinary;
          if (ordinary && (call.fields & kGradientFields) != 0) row.own = own_product<C, W>(call, first + i, i);
        }
      };
      if (call.double_compute) {
        run(static_cast<const double*>(nullptr));
      } else {
        run(static_cast<const float*>(nullptr));
      }
    });
    if (call.d_features == nullptr) return;
    with_element(call.features.dtype, [&](auto* type) {
      using T = ElementOf<decltype(type)>;
      if (call.double_compute) {
        norm_part<double, T>(call, first, i);
      } else {
        norm_part<float, T>(call, first, i);
      }
    });
  });
}

void head_backward_tile(const HeadBackwardLoop& call, const HeadBackwardTile& tile) {
  parallel_for(tile.rows * tile.classes < (1 << 14) ? 1 : call.threads, tile.rows, [&](int64_t i, int) {
    if (call.double_compute) {
      cotangent_of_row<double>(call, tile, i);
    } else {
      cotangent_of_row<float>(call, tile, i);
    }
  });
}

void head_backward_explicit(const HeadBackwardLoop& call, int64_t first, const int64_t* rows, int64_t count, void* g) {
  for (int64_t k = 0; k < count; ++k) {
    with_element(call.weight.dtype, [&](auto* type) {
      using W = ElementOf<decltype(type)>;
      if (call.double_compute) {
        explicit_backward<double, W>(call, first, rows[k], static_cast<double*>(g) + k * call.C);
      } else if constexpr (sizeof(W) <= sizeof(float)) {
        explicit_backward<float, W>(call, first, rows[k], static_cast<float*>(g) + k * call.C);
      }
    });
  }
}

}  // namespace flatcore::cpu::FLATCORE_TARGET
