// head_metrics_backward: what lies between the library's matrix products, for a chunk of rows at a time.
//
// Order of calls, in flatcore/_engine/chunked_cuda.py: the library forms z = W phi; head_chunk_statistics turns it into
// q. For neuronwise and gradient norms the library forms q (W - center), head_chunk_directions turns it into one
// direction per row (the mean row of p, or the dual direction of the gradient), the library forms direction (W -
// center)^T. Then head_chunk_cotangent writes dL/dz over it and the directions' factors over q, and the library forms
// the gradients.
//
// Buffers: as cuda/head_metrics.h says. Does not synchronise.
// Numerics: as csrc/cpu/head_metrics_backward_chunk.cpp, per row in float64. Rows where the sums over q (W - center)
// leave too little of what they were taken from are done from explicit differences by one block, one row after the
// other, since they add to W's gradient: rare, and without atomics. Two runs agree bit for bit.
// Cost: directions read N x D numbers twice, cotangents N x C twice. Never run on a device yet: no figure is known.
#include "cuda/explicit_row.h"
#include "cuda/head_metrics.h"
#include "cuda/launch.h"
#include "math/cancellation.h"
#include "math/centered_rows.h"
#include "math/measure_cotangent.h"
#include "math/upstream.h"

namespace flatcore::cuda {
namespace {

constexpr int kThreads = 256;
using Block = Team<kThreads>;

__device__ __forceinline__ bool is_gradient(const HeadProblem& call) { return (call.fields & kGradientFields) != 0; }
__device__ __forceinline__ bool asks_for(const HeadProblem& call, Field field) {
  return (call.fields >> field & 1U) != 0;
}

// c of the row with what makes it 0 or poison.
__device__ __forceinline__ HeadBackwardRow start_row(const HeadBackwardChunk& call, int64_t i) {
  const int64_t n = call.first + i;
  const HeadRow& state = call.row_state[i];
  HeadBackwardRow row{0.0, 1.0, 0.0, 0.0, 0.0, kOrdinary};
  const double upstream = call.upstream[n];
  const double log_coefficient = call.log_coefficient != nullptr ? call.log_coefficient[n] : 0.0;
  if (math::counts_as_nothing(upstream, log_coefficient, call.double_compute)) return row;
  if (is_gradient(call) && label_of(call, n) == Label::kIgnored) return row;
  row.c = math::row_derivative(upstream, log_coefficient);
  if (row.c == 0.0 && !is_gradient(call)) return row;
  if (state.m == math::kNoClass || row.c != row.c || (is_gradient(call) && label_of(call, n) != Label::kValid)) {
    row.kind = kPoisoned;
    return row;
  }
  if (is_gradient(call)) {  // csrc/cpu/head_metrics_backward.h, RowUpstream
    if (row.c == 0.0) row.kind = kExplicit;
    return row;
  }
  const bool no_weight = asks_for(call, kLogLayerwise) && call.summary[0] == -math::kInfinity;
  if (state.log_eps == -math::kInfinity || no_weight ||
      math::log_head_square(state.log_n, call.include_bias) == -math::kInfinity) {
    row.c = 0.0;
  }
  return row;
}

// The sums over D that a direction is made of; of neuronwise or of a gradient norm.
struct DirectionSums {
  double delta2, mean2, top2, direction2;  // neuronwise
  double norm1, norm2, largest, from;      // gradient norms
};
struct MergeDirections {
  __device__ __forceinline__ DirectionSums operator()(const DirectionSums& a, const DirectionSums& b) const {
    return {a.delta2 + b.delta2,
            a.mean2 + b.mean2,
            a.top2 + b.top2,
            a.direction2 + b.direction2,
            a.norm1 + b.norm1,
            a.norm2 + b.norm2,
            LargerOf{}(a.largest, b.largest),
            a.from + b.from};
  }
};

// Component d of sum_j p_j (w_j - w_y), from differences, in the scale of the row's direction: where a sign, or which
// component is the largest, would come from the rounding of the product (csrc/cpu/head_metrics_backward_chunk.cpp).
template <class V>
__device__ __forceinline__ double exact_component(const HeadBackwardChunk& call, int64_t i, int64_t y, int64_t d) {
  const HeadRow& state = call.row_state[i];
  const V* q = static_cast<const V*>(call.q) + i * call.C;
  const bool top_label = y == state.m;
  const double own = element(call.weight, y, d);
  double sum = 0.0;
  FLATCORE_ROLLED
  for (int64_t j = 0; j < call.C; ++j) {
    const double rest = static_cast<double>(q[j]);  // GradientMix::share keeps the mix alive, which spills on sm_80
    const double share = top_label ? rest : j == state.m ? state.confidence : state.eps * rest;
    if (share != 0.0) sum += share * (element(call.weight, j, d) - own);
  }
  return sum * scalbn(1.0, static_cast<int>(call.summary[1]));
}

template <class V>
__global__ void __launch_bounds__(kThreads) chunk_directions(HeadBackwardChunk call) {
  const double scale = scalbn(1.0, static_cast<int>(call.summary[1]));
  const int64_t D = call.D;
  for (int64_t i = blockIdx.x; i < call.rows; i += gridDim.x) {
    HeadBackwardRow row = start_row(call, i);
    const HeadRow& state = call.row_state[i];
    const double* x = call.mean + i * D;
    V* direction = static_cast<V*>(call.direction) + i * D;
    V* top_row = call.top_row != nullptr ? static_cast<V*>(call.top_row) + i * D : nullptr;
    const bool gradient = is_gradient(call);
    const bool live = row.c != 0.0 && row.kind == kOrdinary;
    const int64_t m = live ? state.m : 0, y = live && gradient ? call.target[call.first + i] : m;
    const bool top_label = y == m;
    // as math::gradient_mix, whose record would spill here on sm_90
    const double alpha = top_label ? 0.0 : state.confidence, beta = top_label ? 1.0 : state.eps;
    const auto centered = [&](int64_t j, int64_t d) { return element(call.weight, j, d) * scale - call.center[d]; };
    const auto value_at = [&](int64_t d) { return alpha * centered(m, d) + beta * x[d] - centered(y, d); };
    DirectionSums sums{};
    for (int64_t d = threadIdx.x; live && d < D; d += kThreads) {
      const double top = centered(m, d);
      if (gradient) {
        const double a = fabs(value_at(d)), label = centered(y, d);
        sums = MergeDirections{}(sums, {0.0, 0.0, 0.0, 0.0, a, a * a, a, label * label + x[d] * x[d]});
      } else {
        const double delta = x[d] - top, p_mean = top + state.eps * delta;
        sums = MergeDirections{}(sums, {delta * delta, x[d] * x[d], top * top, p_mean * p_mean, 0.0, 0.0, 0.0, 0.0});
      }
    }
    sums = Block::merged(sums, MergeDirections{});
    const auto unsure = [&](int64_t d, double distance) {
      const double terms = fabs(alpha * centered(m, d)) + fabs(beta * x[d]) + fabs(centered(y, d));
      return math::component_is_unsure(distance, terms, sizeof(V) == 8);
    };
    const double found = sums.largest;
    const auto is_candidate = [&](int64_t d) { return unsure(d, (found - fabs(value_at(d))) * 0.5); };
    double ties = 1.0;
    bool several = false;                                   // components that may be the largest
    if (gradient && asks_for(call, kLogGradientNormInf)) {  // the same for all threads
      Sums<1> count{};
      for (int64_t d = threadIdx.x; live && d < D; d += kThreads) count.at[0] += is_candidate(d);
      several = Block::merged(count, AddSums{}).at[0] > 1.0;
      if (several) {
        double most = 0.0;
        for (int64_t d = threadIdx.x; d < D; d += kThreads) {
          if (is_candidate(d)) most = LargerOf{}(most, fabs(exact_component<V>(call, i, y, d)));
        }
        sums.largest = Block::merged(most, LargerOf{});
        count.at[0] = 0.0;
        for (int64_t d = threadIdx.x; d < D; d += kThreads) {
          count.at[0] +=
              is_candidate(d) && math::is_among_largest(fabs(exact_component<V>(call, i, y, d)), sums.largest);
        }
        ties = Block::merged(count, AddSums{}).at[0];
      }
    }
    const auto sign_at = [&](int64_t d) {  // of a component for l1; over the ties for the largest
      if (asks_for(call, kLogGradientNorm1)) {
        const double value = value_at(d);
        return math::sign_of(unsure(d, fabs(value)) ? exact_component<V>(call, i, y, d) : value);
      }
      if (!is_candidate(d)) return 0.0;
      const double value = several ? exact_component<V>(call, i, y, d) : value_at(d);
      return several && !math::is_among_largest(fabs(value), sums.largest) ? 0.0 : math::sign_of(value) / ties;
    };
    double bias_delta = 0.0;
    if (live && !gradient) {
      math::CenteredVariance variance{sums.delta2, sums.mean2, sums.top2};
      if (call.include_bias) {
        const double top = call.bias[m] * scale - call.center[D];
        bias_delta = state.bias_mean - top;
        row.bias = top + state.eps * bias_delta;
        variance.add_column(top, state.bias_mean);
        sums.direction2 += row.bias * row.bias;
      }
      const double inner = variance.inner(state.confidence, state.square_mean);
      const double magnitude = variance.magnitude(state.square_mean);
      if (call.runs[0] == call.C) {
        row.c = 0.0;
      } else if (!math::variance_is_left(inner, magnitude) && inner == inner) {
        row.kind = kExplicit;
      }
      row.inner = inner;
      row.delta2 = variance.top_mean2;
      row.direction2 = sums.direction2;
    } else if (live) {
      if (top_label && state.log_eps == -math::kInfinity) {
        row.c = 0.0;
      } else if (!math::gradient_is_left(sums.norm2, sums.from, state.square_mean) && sums.norm2 == sums.norm2) {
        row.kind = kExplicit;
      }
      row.inner = asks_for(call, kLogGradientNorm)    ? sqrt(sums.norm2)
                  : asks_for(call, kLogGradientNorm1) ? sums.norm1
                                                      : sums.largest;
    }
    const bool write = row.c != 0.0 && row.kind == kOrdinary;
    const double factor = write && !gradient ? -2.0 * row.c * state.confidence / row.inner * scale : 0.0;
    for (int64_t d = threadIdx.x; d < D; d += kThreads) {
      double along = 0.0, of_top = 0.0;
      if (write && gradient) {
        along = asks_for(call, kLogGradientNorm) ? value_at(d) / row.inner : sign_at(d);
      } else if (write) {
        const double top = centered(m, d), delta = x[d] - top;
        along = top + state.eps * delta;
        of_top = factor * delta;
      }
      direction[d] = static_cast<V>(along);
      if (top_row != nullptr) top_row[d] = static_cast<V>(of_top);
    }
    if (threadIdx.x == 0) {
      call.numbers[i] = row;
      if (call.top != nullptr) call.top[i] = write ? m : 0;
      if (call.top_bias != nullptr) call.top_bias[i] = factor * bias_delta;
    }
  }
}

// 2 c phi/||phi||^2, or zeros, or NaN.
template <class V>
__device__ __forceinline__ void norm_part(const HeadBackwardChunk& call, int64_t i, const HeadBackwardRow& row) {
  V* to = static_cast<V*>(call.d_features) + i * call.D;
  const bool none = row.c == 0.0 || row.kind == kPoisoned || is_gradient(call);
  // in two steps: ||phi||^-2 alone may leave the range
  const double half = none ? 0.0 : exp(-0.5 * math::log_head_square(call.row_state[i].log_n, call.include_bias));
  const double factor = 2.0 * row.c * half;
  for (int64_t d = threadIdx.x; d < call.D; d += kThreads) {
    to[d] = none ? static_cast<V>(row.kind == kPoisoned ? kNan : 0.0)
                 : static_cast<V>(factor * (half * element(call.features, call.first + i, d)));
  }
}

template <class V>
__global__ void __launch_bounds__(kThreads, 2) chunk_cotangent(HeadBackwardChunk call) {
  const double inverse_temperature = 1.0 / call.temperature;
  const double w_scale = scalbn(1.0, static_cast<int>(call.summary[1]));
  const bool weights = (call.fields & kWeightFields) != 0;
  for (int64_t i = blockIdx.x; i < call.rows; i += gridDim.x) {
    const HeadRow& state = call.row_state[i];
    V* q = static_cast<V*>(call.q) + i * call.C;
    V* g = static_cast<V*>(call.g) + i * call.C;
    const HeadBackwardRow row = weights ? call.numbers[i] : start_row(call, i);
    if (!weights && threadIdx.x == 0) call.numbers[i] = row;
    if (call.d_features != nullptr) norm_part<V>(call, i, row);
    const bool live = row.c != 0.0 && row.kind == kOrdinary;
    const double scale = row.c * inverse_temperature;
    Sums<1> sum{};
    if (!live) {
      const V value = static_cast<V>(row.kind == kPoisoned ? kNan : 0.0);
      for (int64_t j = threadIdx.x; j < call.C; j += kThreads) {
        g[j] = value;
        if (weights) q[j] = V{};
      }
    } else if (!weights) {
      for (int64_t j = threadIdx.x; j < call.C; j += kThreads) {
        const double share = static_cast<double>(q[j]);
        sum.at[0] += share * share;
      }
      sum = Block::merged(sum, AddSums{});
      const auto form = math::trace_cotangent<double>(state.confidence, state.eps, sum.at[0]);
      for (int64_t j = threadIdx.x; j < call.C; j += kThreads) {
        g[j] = static_cast<V>(scale * (j == state.m ? form.top : form.rest(static_cast<double>(q[j]))));
      }
    } else if (!is_gradient(call)) {
      const auto form = math::centered_variance_cotangent(scale, state.eps, row.inner);
      const double factor = 2.0 * row.c * form.inverse * w_scale;
      for (int64_t j = threadIdx.x; j < call.C; j += kThreads) {
        const double share = static_cast<double>(q[j]);
        double dot = static_cast<double>(g[j]);
        if (call.include_bias) dot += row.bias * (call.bias[j] * w_scale - call.center[call.D]);
        g[j] = static_cast<V>(j == state.m ? form.top(state.confidence, row.delta2)
                                           : form.rest(share, call.centered_squares[j], dot, row.direction2));
        q[j] = static_cast<V>(factor * share);
      }
    } else {
      const int64_t y = call.target[call.first + i];
      const bool top_label = y == state.m;
      const math::GradientMix mix = math::gradient_mix(top_label, state.confidence, state.eps);
      const double inverse = 1.0 / row.inner, own = static_cast<double>(g[y]);
      const double p_y = top_label ? state.confidence : state.eps * static_cast<double>(q[y]);
      const double norm = top_label ? state.eps * row.inner : row.inner;  // ||sum_j p_j (w_j - w_y)||
      __syncthreads();                                                    // g_y and q_y are overwritten
      for (int64_t j = threadIdx.x; j < call.C; j += kThreads) {
        const double share = mix.share(j == state.m, static_cast<double>(q[j]));
        double value = math::centered_norm_cotangent(scale, share, static_cast<double>(g[j]), own, norm, inverse);
        if (j == y) value = -scale * p_y;
        if (j != state.m) sum.at[0] += value;
        g[j] = static_cast<V>(value);
        q[j] = static_cast<V>(row.c * w_scale * inverse * (j != y ? share : top_label ? -1.0 : p_y - 1.0));
      }
      sum = Block::merged(sum, AddSums{});
      // a wrong label: the top class's share is all but 1 and its own term a difference of equals; the sum is 0
      if (!top_label && threadIdx.x == 0) g[state.m] = static_cast<V>(-sum.at[0]);
    }
  }
}

// A row from explicit differences to the row of W of the top class (neuronwise) or of the label: writes g, adds to
// d_weight and d_bias. By one block, rows one after the other.
template <class V>
__device__ __forceinline__ void explicit_row(const HeadBackwardChunk& call, int64_t i) {
  const int64_t C = call.C, D = call.D, n = call.first + i;
  const HeadRow& state = call.row_state[i];
  const double c = call.numbers[i].c, inverse_temperature = 1.0 / call.temperature;
  const double scale = scalbn(1.0, static_cast<int>(call.summary[1]));
  const bool gradient = is_gradient(call), with_bias = call.include_bias && !gradient;
  const int64_t columns = D + (with_bias ? 1 : 0);
  V* g = static_cast<V*>(call.g) + i * C;
  V* d_weight = static_cast<V*>(call.d_weight);
  double* z = call.scratch;
  double* u = z + C;
  double* direction = u + C;
  explicit_logits(call, n, z);
  const int64_t anchor = gradient ? call.target[n] : state.m;
  const double top = explicit_shares(call, with_bias, anchor, z, u);
  const ExplicitSum sum = explicit_sum(call, with_bias, anchor, scale, u, direction);
  const double log_share = (top - z[state.m]) * inverse_temperature - state.log1p_tau;
  const double share = top == -math::kInfinity ? 0.0 : math::exp_nonpositive(log_share < 0.0 ? log_share : 0.0);
  const double inner = sum.variance(gradient ? 0.0 : explicit_group(call, z, u, z[state.m], state.log1p_tau));
  const double norm = asks_for(call, kLogGradientNorm)    ? sqrt(sum.norm2_squared)
                      : asks_for(call, kLogGradientNorm1) ? sum.norm1
                                                          : sum.norm_inf;
  if (top == -math::kInfinity || !((gradient ? norm : inner) > 0.0)) {  // the value is 0: no gradient
    for (int64_t j = threadIdx.x; j < C; j += kExplicitThreads) g[j] = V{};
    for (int64_t d = threadIdx.x; d < D && call.d_features != nullptr; d += kExplicitThreads) {
      static_cast<V*>(call.d_features)[i * D + d] = V{};
    }
    return;
  }
  if (gradient) {  // the sum becomes its dual direction
    Sums<1> count{};
    for (int64_t d = threadIdx.x; d < D; d += kExplicitThreads) count.at[0] += fabs(direction[d]) == sum.norm_inf;
    const double ties = ExplicitBlock::merged(count, AddSums{}).at[0];
    for (int64_t d = threadIdx.x; d < D; d += kExplicitThreads) {
      direction[d] = math::dual_entry(norm_order(call.fields), direction[d], norm, ties);
    }
  }
  __syncthreads();
  const auto difference = [&](int64_t j, int64_t d) {
    return d < D ? (element(call.weight, j, d) - element(call.weight, anchor, d)) * scale
                 : (call.bias[j] - call.bias[anchor]) * scale;
  };
  const auto log_probability = [&](int64_t j) { return (z[j] - z[state.m]) * inverse_temperature - state.log1p_tau; };
  const auto twin_factor = [&](int64_t j) {
    const double log_c = call.log_coefficient != nullptr ? call.log_coefficient[n] : 0.0;
    return z[j] == -math::kInfinity ? 0.0
                                    : math::twin_factor(call.upstream[n], log_c, log_probability(j), log_share, norm);
  };
  const math::ExplicitVarianceCotangent form{c * inverse_temperature, share, sum.norm2_squared, inner};
  // A warp per class: dL/dz. Masked classes have logit -inf, and no share.
  using Warp = Team<kWarp>;
  Sums<2> totals{};  // of dL/dz apart from the top class; of the factors of the direction
  for (int64_t j = threadIdx.x / kWarp; j < C; j += kExplicitThreads / kWarp) {
    Sums<2> dots{};  // of the difference with itself and with the direction
    for (int64_t d = Warp::lane(); d < columns && u[j] > 0.0; d += kWarp) {
      const double x = difference(j, d);
      dots.at[0] += x * x;
      dots.at[1] += x * direction[d];
    }
    dots = Warp::merged(dots, AddSums{});
    if (Warp::lane() != 0) continue;
    double value = 0.0;
    if (u[j] < 0.0) {
      const double p = z[j] == -math::kInfinity ? 0.0 : exp(log_probability(j));
      value = gradient ? -c * inverse_temperature * p : form.twin(p);
      if (gradient && j != anchor) totals.at[1] += twin_factor(j);
    } else if (u[j] > 0.0) {
      if (gradient) {
        value = math::explicit_norm_cotangent(form.scale, u[j], dots.at[1], share, norm);
        totals.at[1] += c * u[j] / norm;
      } else {
        value = form.other(u[j], dots.at[0], dots.at[1]);
      }
    }
    g[j] = static_cast<V>(value);
    if (j != state.m) totals.at[0] += value;
  }
  totals = ExplicitBlock::merged(totals, AddSums{});
  if (gradient && u[state.m] >= 0.0 && threadIdx.x == 0) g[state.m] = static_cast<V>(-totals.at[0]);
  for (int64_t at = threadIdx.x; at < C * columns; at += kExplicitThreads) {
    const int64_t j = at / columns, d = at % columns;
    double value = 0.0;
    if (gradient) {
      double factor = u[j] > 0.0 ? c * u[j] / norm : 0.0;
      if (u[j] < 0.0) factor = twin_factor(j);
      if (j == anchor) factor = -totals.at[1];
      // by select: the factor may have left the range where the direction has no part
      value = direction[d] == 0.0 ? 0.0 : factor * scale * direction[d];
    } else {
      const double p = z[j] == -math::kInfinity ? 0.0 : u[j] < 0.0 ? exp(log_probability(j)) : 0.0;
      const double part = u[j] < 0.0   ? -p * direction[d]
                          : u[j] > 0.0 ? u[j] * (difference(j, d) - share * direction[d])
                                       : 0.0;
      value = 2.0 * c / inner * scale * part;
    }
    if (d == D) {
      if (call.d_bias != nullptr) call.d_bias[j] += value;
    } else if (d_weight != nullptr) {
      d_weight[j * D + d] += static_cast<V>(value);
    }
  }
}

template <class V>
__global__ void __launch_bounds__(kExplicitThreads) explicit_rows(HeadBackwardChunk call) {
  for (int64_t start = 0; start < call.rows; start += kExplicitThreads) {
    const int64_t mine = start + threadIdx.x;
    if (__syncthreads_or(mine < call.rows && call.numbers[mine].kind == kExplicit) == 0) continue;
    for (int64_t i = start; i < start + kExplicitThreads && i < call.rows; ++i) {
      if (call.numbers[i].kind != kExplicit) continue;
      explicit_row<V>(call, i);
      __syncthreads();  // the scratch is written again
    }
  }
}

template <class V>
Launched run_cotangent(const HeadBackwardChunk& call) {
  const Launched first =
      launch("head_chunk_cotangent", call.stream, grid_for(call.rows), kThreads, &chunk_cotangent<V>, call);
  if (first.error != nullptr || (call.fields & kWeightFields) == 0) return first;
  return launch("head_chunk_cotangent: explicit rows", call.stream, 1, kExplicitThreads, &explicit_rows<V>, call);
}

}  // namespace

Launched head_chunk_directions(const HeadBackwardChunk& call) {
  if (call.rows == 0) return {};
  const DeviceGuard guard(call.device);
  if (guard.status() != cudaSuccess) return launched(guard.status(), "head_chunk_directions: the device");
  const char* what = "head_chunk_directions";
  return call.double_compute ? launch(what, call.stream, grid_for(call.rows), kThreads, &chunk_directions<double>, call)
                             : launch(what, call.stream, grid_for(call.rows), kThreads, &chunk_directions<float>, call);
}

Launched head_chunk_cotangent(const HeadBackwardChunk& call) {
  if (call.rows == 0) return {};
  const DeviceGuard guard(call.device);
  if (guard.status() != cudaSuccess) return launched(guard.status(), "head_chunk_cotangent: the device");
  return call.double_compute ? run_cotangent<double>(call) : run_cotangent<float>(call);
}

}  // namespace flatcore::cuda
