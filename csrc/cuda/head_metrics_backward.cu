// head_metrics_backward: what lies between the library's matrix products, for tiles of classes outside and blocks of
// rows inside.
//
// Order of calls, in flatcore/_engine/chunked_cuda_backward.py: the loop of the values gives a block's row statistics
// and, for neuronwise and gradient norms, its sums over u (W - center). head_backward_rows turns those into one
// direction per row (the mean row of p, or the dual direction of the gradient). Then for each tile the library forms z
// = W_tile phi and direction (W_tile - center)^T, head_backward_tile writes dL/dz over the latter and the directions'
// factors over z, and the library adds up the gradients. Behind the last tile head_backward_tops adds what the top
// classes gain by themselves, and head_backward_explicit (head_backward_explicit.cu) the rows that need differences.
//
// Buffers: as cuda/head_metrics.h says. Does not synchronise. Two runs agree bit for bit.
// Numerics: as csrc/cpu/head_metrics_backward_chunk.cpp, per row in float64.
// Cost: directions read N x D numbers twice, a tile's cotangents 16 bytes at a time, once. Never run on a device yet:
// no figure is known.
#include "cuda/head_backward_direction.h"
#include "cuda/launch.h"
#include "math/cancellation.h"
#include "math/centered_rows.h"
#include "math/measure_cotangent.h"
#include "math/upstream.h"

namespace flatcore::cuda {
namespace {

constexpr int kThreads = 256;
using Block = Team<kThreads>;

// c of the row with what makes it 0 or poison.
__device__ __forceinline__ HeadBackwardRow start_row(const HeadBackwardLoop& call, int64_t n, int64_t i) {
  const HeadRow& state = call.row_state[i];
  HeadBackwardRow row{0.0, 1.0, 0.0, 0.0, 0.0, kOrdinary, 0.0, 0.0};
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

// 2 c phi/||phi||^2, or zeros, or NaN.
template <class V>
__device__ __forceinline__ void norm_part(const HeadBackwardLoop& call, int64_t n, int64_t i,
                                          const HeadBackwardRow& row) {
  V* to = static_cast<V*>(call.d_features) + n * call.D;
  const bool none = row.c == 0.0 || row.kind == kPoisoned || is_gradient(call);
  // in two steps: ||phi||^-2 alone may leave the range
  const double half = none ? 0.0 : exp(-0.5 * math::log_head_square(call.row_state[i].log_n, call.include_bias));
  const double factor = 2.0 * row.c * half;
  for (int64_t d = threadIdx.x; d < call.D; d += kThreads) {
    to[d] = none ? static_cast<V>(row.kind == kPoisoned ? kNan : 0.0)
                 : static_cast<V>(factor * (half * element(call.features, n, d)));
  }
}

template <class V>
__global__ void __launch_bounds__(kThreads) backward_rows(HeadBackwardLoop call, int64_t first, int64_t rows) {
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    const HeadBackwardRow row = start_row(call, first + i, i);
    if (threadIdx.x == 0) call.numbers[i] = row;
    if (call.d_features != nullptr) norm_part<V>(call, first + i, i, row);
  }
}

template <class V>
__global__ void __launch_bounds__(kThreads) backward_directions(HeadBackwardLoop call, int64_t first, int64_t rows) {
  const int64_t D = call.D;
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    HeadBackwardRow row = start_row(call, first + i, i);
    const HeadRow& state = call.row_state[i];
    V* direction = static_cast<V*>(call.direction) + i * D;
    V* top_row = call.top_row != nullptr ? static_cast<V*>(call.top_row) + i * D : nullptr;
    const bool gradient = is_gradient(call);
    const bool live = row.c != 0.0 && row.kind == kOrdinary;
    const Direction<V> of(call, first + i, i, live);
    DirectionSums sums{};
    for (int64_t d = threadIdx.x; live && d < D; d += kThreads) {
      const double top = of.centered(of.m, d), x = of.x(d);
      if (gradient) {
        const double a = fabs(of.value_at(d)), label = of.centered(of.y, d);
        sums = MergeDirections{}(sums, {0.0, 0.0, 0.0, 0.0, a, a * a, a, label * label + x * x});
      } else {
        const double delta = x - top, p_mean = top + state.eps * delta;
        sums = MergeDirections{}(sums, {delta * delta, x * x, top * top, p_mean * p_mean, 0.0, 0.0, 0.0, 0.0});
      }
    }
    sums = Block::merged(sums, MergeDirections{});
    double bias_delta = 0.0;
    if (live && !gradient) {
      math::CenteredVariance variance{sums.delta2, sums.mean2, sums.top2};
      if (call.include_bias) {
        const double top = call.bias[of.m] * of.scale - call.center[D];
        bias_delta = state.bias_mean - top;
        row.bias = top + state.eps * bias_delta;
        variance.add_column(top, state.bias_mean);
        sums.direction2 += row.bias * row.bias;
      }
      const double inner = variance.inner(state.confidence, state.square_mean);
      const double magnitude = variance.magnitude(state.square_mean);
      if (call.found[kSameRows] != 0) {
        row.c = 0.0;
      } else if (!math::variance_is_left(inner, magnitude) && inner == inner) {
        row.kind = kExplicit;
      }
      row.inner = inner;
      row.delta2 = variance.top_mean2;
      row.direction2 = sums.direction2;
    } else if (live) {
      if (of.top_label && state.log_eps == -math::kInfinity) {
        row.c = 0.0;
      } else if (!math::gradient_is_left(sums.norm2, sums.from, state.square_mean) && sums.norm2 == sums.norm2) {
        row.kind = kExplicit;
      }
      row.inner = asks_for(call, kLogGradientNorm)    ? sqrt(sums.norm2)
                  : asks_for(call, kLogGradientNorm1) ? sums.norm1
                                                      : sums.largest;
    }
    const bool write = row.c != 0.0 && row.kind == kOrdinary;
    const double factor = write && !gradient ? -2.0 * row.c * state.confidence / row.inner * of.scale : 0.0;
    Sums<2> found{};  // components that are unsure; the direction's product with the label's row of W
    for (int64_t d = threadIdx.x; d < D; d += kThreads) {
      double along = 0.0, of_top = 0.0;
      if (write && gradient) {
        const double value = of.value_at(d);
        if (asks_for(call, kLogGradientNorm)) {
          along = value / row.inner;
        } else if (asks_for(call, kLogGradientNorm1)) {
          along = math::sign_of(value);
          found.at[0] += of.is_unsure(d, fabs(value)) ? 2.0 : 0.0;
        } else if (of.may_be_largest(d, sums.largest)) {
          along = math::sign_of(value);
          found.at[0] += 1.0;
        }
        found.at[1] += static_cast<double>(static_cast<V>(along)) * of.centered(of.y, d);
      } else if (write) {
        const double top = of.centered(of.m, d), delta = of.x(d) - top;
        along = top + state.eps * delta;
        of_top = factor * delta;
      }
      direction[d] = static_cast<V>(along);
      if (top_row != nullptr) top_row[d] = static_cast<V>(of_top);
    }
    found = Block::merged(found, AddSums{});
    row.own = found.at[1];
    if (call.d_features != nullptr) norm_part<V>(call, first + i, i, row);
    if (threadIdx.x != 0) continue;
    if (write && found.at[0] > 1.0) row.kind = kUnsure;
    call.special[i] = row.kind != kExplicit ? 0 : gradient ? kSpecialGradient : kSpecialNeuronwise;
    call.numbers[i] = row;
    call.top[i] = write && !(gradient && of.top_label) ? of.m : math::kNoClass;
    if (call.top_bias != nullptr) call.top_bias[i] = factor * bias_delta;
  }
}

template <class Z, class V, int width>
__global__ void __launch_bounds__(kThreads) backward_tile(HeadBackwardLoop call, HeadBackwardTile tile) {
  using Group = Team<width>;
  constexpr int teams = kThreads / width, kPack = Pack<Z>::kCount;
  const double inverse_temperature = 1.0 / call.temperature;
  const bool weights = (call.fields & kWeightFields) != 0, gradient = is_gradient(call);
  const double w_scale = scalbn(1.0, static_cast<int>(call.summary[1]));
  const int64_t padded = padded_classes(tile.classes);
  const int64_t step = static_cast<int64_t>(gridDim.x) * teams;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * teams + threadIdx.x / width; i < tile.rows; i += step) {
    const int64_t n = tile.first + i;
    const HeadRow& state = call.row_state[i];
    const HeadTail& kept = call.tails[(call.all_tails ? tile.first : 0) + i];
    const math::SoftmaxTail& tail = kept.tail;
    HeadBackwardRow& row = call.numbers[i];
    auto* z = reinterpret_cast<Pack<Z>*>(static_cast<Z*>(tile.z) + i * padded);
    auto* g = reinterpret_cast<Pack<Z>*>(static_cast<Z*>(tile.g) + i * padded);
    const bool live = row.c != 0.0 && row.kind == kOrdinary;
    const Z dead = static_cast<Z>(row.kind == kPoisoned ? kNan : 0.0);
    const double* bias = call.bias != nullptr && call.logits.data == nullptr ? call.bias + tile.first_class : nullptr;
    const RowShares<V> shares = shares_of<V>(call, tail);
    const double scale = row.c * inverse_temperature, inverse = 1.0 / row.inner;
    const int64_t top = state.m - tile.first_class;  // may lie outside
    const auto trace =
        math::trace_cotangent<double>(state.confidence, state.eps, tail.u1 > 0.0 ? tail.u2 / (tail.u1 * tail.u1) : 0.0);
    const auto variance = math::centered_variance_cotangent(scale, state.eps, row.inner);
    const int64_t y = live && gradient ? call.target[n] : 0, label = gradient ? y - tile.first_class : -1;
    const bool top_label = y == state.m;
    const math::GradientMix mix = math::gradient_mix(top_label, state.confidence, state.eps);
    double p_y = state.confidence;
    if (live && gradient && !top_label) {
      p_y = state.eps * math::tail_scale(kept.own, shares.base, inverse_temperature) * shares.inverse_sum;
    }
    const double norm = top_label ? state.eps * row.inner : row.inner;  // ||sum_j p_j (w_j - w_y)||
    const double own = row.own;
    Sums<1> others{};
    for (int64_t pack = Group::lane(); pack < padded / kPack; pack += width) {
      Pack<Z> logits = z[pack], cotangents = weights ? g[pack] : logits;
      FLATCORE_UNROLL
      for (int e = 0; e < kPack; ++e) {
        const int64_t k = pack * kPack + e;
        double of_logit = static_cast<double>(dead), along = 0.0;
        if (live && k < tile.classes) {
          V logit = static_cast<V>(logits.items[e]);
          if constexpr (sizeof(V) == 8) {
            if (bias != nullptr) logit += bias[k];
          }
          const double q = k == top ? 0.0 : shares.share(logit);
          if (!weights) {
            of_logit = scale * (k == top ? trace.top : trace.rest(q));
          } else if (!gradient) {
            double dot = static_cast<double>(cotangents.items[e]);
            if (call.include_bias) dot += row.bias * (call.bias[tile.first_class + k] * w_scale - call.center[call.D]);
            of_logit = k == top ? variance.top(state.confidence, row.delta2)
                                : variance.rest(q, call.centered_squares[tile.first_class + k], dot, row.direction2);
            along = 2.0 * row.c * inverse * w_scale * q;
          } else {
            const double share = mix.share(k == top, q);
            const double dot = static_cast<double>(cotangents.items[e]);
            of_logit = math::centered_norm_cotangent(scale, share, dot, own, norm, inverse);
            if (k == label) of_logit = -scale * p_y;
            if (k != top) others.at[0] += of_logit;
            // a wrong label: its share is all but 1 and its own term a difference of equals; the sum is 0
            if (k == top && !top_label) of_logit = 0.0;
            along = row.c * w_scale * inverse * (k != label ? share : top_label ? -1.0 : p_y - 1.0);
          }
        }
        cotangents.items[e] = static_cast<Z>(of_logit);
        logits.items[e] = static_cast<Z>(along);
      }
      g[pack] = cotangents;
      if (weights) z[pack] = logits;
    }
    if (!weights || !gradient) continue;
    others = Group::merged(others, AddSums{});
    if (live && Group::lane() == 0) row.others += others.at[0];
  }
}

// What row `top` of W gains by itself, and the bias and the features with it. A block per row; of the rows with one top
// class the first adds what all of them give, in their order: no atomics, whatever the order of the blocks.
template <class V>
__global__ void __launch_bounds__(kThreads, 2) backward_tops(HeadBackwardLoop call, int64_t first, int64_t rows) {
  const bool gradient = is_gradient(call), given = call.logits.data != nullptr;
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    const int64_t m = call.top[i];
    const auto adds = [&](int64_t k) {  // an explicit row is done elsewhere
      return call.top[k] == m && call.numbers[k].kind == kOrdinary;
    };
    if (m == math::kNoClass || !adds(i)) continue;
    const double of_top = gradient ? -call.numbers[i].others : 0.0;
    if (gradient && given && threadIdx.x == 0 && call.d_logits != nullptr) {
      static_cast<V*>(call.d_logits)[(first + i) * call.C + m] = static_cast<V>(of_top);
    }
    if (gradient && !given && call.d_features != nullptr) {
      V* to = static_cast<V*>(call.d_features) + (first + i) * call.D;
      for (int64_t d = threadIdx.x; d < call.D; d += kThreads) {
        to[d] += static_cast<V>(of_top * element(call.weight, m, d));
      }
    }
    if (gradient && given) continue;
    int earlier = 0;
    for (int64_t k = threadIdx.x; k < i; k += kThreads) earlier |= adds(k) ? 1 : 0;
    if (__syncthreads_or(earlier) != 0) continue;
    for (int64_t d = threadIdx.x; d < call.D && call.d_weight != nullptr; d += kThreads) {
      double sum = 0.0;
      for (int64_t k = i; k < rows; ++k) {
        if (!adds(k)) continue;
        sum += gradient ? -call.numbers[k].others * element(call.features, first + k, d)
                        : static_cast<double>(static_cast<const V*>(call.top_row)[k * call.D + d]);
      }
      static_cast<V*>(call.d_weight)[m * call.D + d] += static_cast<V>(sum);
    }
    if (threadIdx.x == 0 && call.d_bias != nullptr && (gradient || call.include_bias)) {
      double sum = 0.0;
      for (int64_t k = i; k < rows; ++k) {
        if (adds(k)) sum += gradient ? -call.numbers[k].others : call.top_bias[k];
      }
      call.d_bias[m] += sum;
    }
  }
}

template <class Z, class V>
Launched run_tile(const HeadBackwardLoop& call, const HeadBackwardTile& tile) {
  const char* what = "head_backward_tile";
  constexpr int64_t warps = kThreads / kWarp;
  if (tile.classes <= kWarp * 8) {
    return launch(what, call.stream, grid_for((tile.rows + warps - 1) / warps), kThreads, &backward_tile<Z, V, kWarp>,
                  call, tile);
  }
  return launch(what, call.stream, grid_for(tile.rows), kThreads, &backward_tile<Z, V, kThreads>, call, tile);
}

template <class V>
Launched run_rows(const HeadBackwardLoop& call, int64_t first, int64_t rows) {
  const auto kernel = (call.fields & kWeightFields) != 0 ? &backward_directions<V> : &backward_rows<V>;
  return launch("head_backward_rows", call.stream, grid_for(rows), kThreads, kernel, call, first, rows);
}

}  // namespace

Launched head_backward_rows(const HeadBackwardLoop& call, int64_t first, int64_t rows) {
  if (rows == 0) return {};
  const DeviceGuard guard(call.device);
  if (guard.status() != cudaSuccess) return launched(guard.status(), "head_backward_rows: the device");
  return call.double_compute ? run_rows<double>(call, first, rows) : run_rows<float>(call, first, rows);
}

Launched head_backward_tile(const HeadBackwardLoop& call, const HeadBackwardTile& tile) {
  if (tile.rows == 0) return {};
  const DeviceGuard guard(call.device);
  if (guard.status() != cudaSuccess) return launched(guard.status(), "head_backward_tile: the device");
  if (call.double_compute) return run_tile<double, double>(call, tile);
  return used_as_they_stand(call) ? run_tile<float, float>(call, tile) : run_tile<float, double>(call, tile);
}

Launched head_backward_tops(const HeadBackwardLoop& call, int64_t first, int64_t rows) {
  if (rows == 0) return {};
  const DeviceGuard guard(call.device);
  if (guard.status() != cudaSuccess) return launched(guard.status(), "head_backward_tops: the device");
  const char* what = "head_backward_tops";
  return call.double_compute
             ? launch(what, call.stream, grid_for(rows), kThreads, &backward_tops<double>, call, first, rows)
             : launch(what, call.stream, grid_for(rows), kThreads, &backward_tops<float>, call, first, rows);
}

}  // namespace flatcore::cuda
