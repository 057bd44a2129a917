// head_metrics_backward: rows from explicit differences, where the sums over u (W - center) leave too little of what
// they were taken from.
//
// Buffers: as cuda/head_metrics.h says. Does not synchronise. Two runs agree bit for bit: such rows add to W's
// gradient, so one block does them one after the other. Numerics: csrc/cuda/explicit_row.h, from float64 logits. Cost:
// a look at each row's kind; a row takes about 12 C D operations in float64. Never run on a device yet: no figure is
// known.
#include "cuda/explicit_row.h"
#include "cuda/head_backward_direction.h"
#include "cuda/launch.h"
#include "math/upstream.h"

namespace flatcore::cuda {
namespace {

// A row from explicit differences to the row of W of the top class (neuronwise) or of the label: all that it adds. By
// one block, rows one after the other.
template <class V>
__device__ __forceinline__ void explicit_row(const HeadBackwardLoop& call, int64_t n, int64_t i) {
  const int64_t C = call.C, D = call.D;
  const HeadRow& state = call.row_state[i];
  const double c = call.numbers[i].c, inverse_temperature = 1.0 / call.temperature;
  const double scale = scalbn(1.0, static_cast<int>(call.summary[1]));
  const bool gradient = is_gradient(call), with_bias = call.include_bias && !gradient;
  const int64_t columns = D + (with_bias ? 1 : 0);
  const bool given = call.logits.data != nullptr;
  V* d_features = call.d_features != nullptr ? static_cast<V*>(call.d_features) + n * D : nullptr;
  V* d_weight = static_cast<V*>(call.d_weight);
  double* z = call.scratch;
  double* u = z + C;
  double* g = u + C;  // dL/dz
  double* direction = g + C;
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
    for (int64_t d = threadIdx.x; d < D && d_features != nullptr; d += kExplicitThreads) d_features[d] = V{};
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
    g[j] = value;
    if (j != state.m) totals.at[0] += value;
  }
  totals = ExplicitBlock::merged(totals, AddSums{});
  if (gradient && u[state.m] >= 0.0 && threadIdx.x == 0) g[state.m] = -totals.at[0];
  __syncthreads();  // what a warp wrote of g is read by all
  for (int64_t j = threadIdx.x; j < C && call.d_logits != nullptr; j += kExplicitThreads) {
    static_cast<V*>(call.d_logits)[n * C + j] = static_cast<V>(g[j]);
  }
  for (int64_t d = threadIdx.x; d < D && d_features != nullptr && !given; d += kExplicitThreads) {
    double value = 0.0;
    for (int64_t j = 0; j < C; ++j) {
      if (g[j] != 0.0) value += g[j] * element(call.weight, j, d);
    }
    d_features[d] += static_cast<V>(value);
  }
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
      if (!given && g[j] != 0.0) value += g[j] * element(call.features, n, d);
      d_weight[j * D + d] += static_cast<V>(value);
    }
  }
  if (given || call.d_bias == nullptr) return;
  __syncthreads();  // the bias as a column was added by other threads
  for (int64_t j = threadIdx.x; j < C; j += kExplicitThreads) call.d_bias[j] += g[j];
}

template <class V>
__global__ void __launch_bounds__(kExplicitThreads) explicit_rows(HeadBackwardLoop call, int64_t first, int64_t rows) {
  for (int64_t start = 0; start < rows; start += kExplicitThreads) {
    const int64_t mine = start + threadIdx.x;
    if (__syncthreads_or(mine < rows && call.numbers[mine].kind == kExplicit) == 0) continue;
    for (int64_t i = start; i < start + kExplicitThreads && i < rows; ++i) {
      if (call.numbers[i].kind != kExplicit) continue;
      explicit_row<V>(call, first + i, i);
      __syncthreads();  // the scratch is written again
    }
  }
}

}  // namespace

Launched head_backward_explicit(const HeadBackwardLoop& call, int64_t first, int64_t rows) {
  if (rows == 0) return {};
  const DeviceGuard guard(call.device);
  if (guard.status() != cudaSuccess) return launched(guard.status(), "head_backward_explicit: the device");
  const char* what = "head_backward_explicit";
  return call.double_compute ? launch(what, call.stream, 1, kExplicitThreads, &explicit_rows<double>, call, first, rows)
                             : launch(what, call.stream, 1, kExplicitThreads, &explicit_rows<float>, call, first, rows);
}

}  // namespace flatcore::cuda
