// head_measure_backward, small heads: the gradients of features, weight, bias and logits from the inputs alone. The
// logits are formed again (2NDC operations), which costs less than to keep them.
//
// Two launches: rows over the grid leave dL/dz (N, C) in the workspace and write what belongs to a row; then columns
// over the grid sum over the rows for W and the bias. One launch with partial sums that a last block merges would need
// its ticket zeroed, a launch as well, and would leave the merge to one of the device's processors.
//
// Buffers: as cuda/head_measure.h says. Does not synchronise; every sum comes in a fixed order, without atomics.
// Numerics: as csrc/cpu/head_metrics_backward.cpp, dL/dz in float64 relative to the value; at most 16 rows of W's
// gradient are summed in the compute type before they are carried into float64. Neuronwise flatness and gradient norms
// from differences of rows of W for every row, a block each.
// Cost: features and W read once a tile of 4 rows, features once more for W's gradient; 6NDC operations, for neuronwise
// and the norms about 12NDC more in float64. Never run on a device yet: no figure is known.
#include "cuda/head_measure.h"
#include "cuda/head_measure_rows.h"
#include "cuda/launch.h"
#include "math/measure_cotangent.h"
#include "math/upstream.h"

namespace flatcore::cuda {
namespace {

constexpr int kSumThreads = 256;
constexpr int kSumWarps = kSumThreads / kWarp;
constexpr int kFoldRows = 16;
constexpr int kMergedClasses = 8;

// What the rows leave for the sums over them.
struct Kept {
  double* c;           // (N,): 0 where a row adds nothing by its features, NaN where it poisons
  double* g;           // (N, C): dL/dz
  double* weight_log;  // (C,): log ||w_j||^2; layerwise
  // neuronwise and gradient norms: row j of W's gradient gains along direction + apart 2^e (w_j - w_anchor)
  double* along;      // (N, C)
  double* apart;      // (N, C); neuronwise
  double* bias_part;  // (N, C): what d_bias gains; neuronwise
  double* scale;      // (1,): 2^e, its square over Var_p(w) may leave the range; neuronwise
  double* direction;  // (N, D + 1)
  int64_t* anchor;    // (N,)
};
__host__ __device__ __forceinline__ Kept kept_in(double* workspace, const HeadProblem& call, int64_t* size) {
  const bool weights = (call.fields & kWeightFields) != 0, neuronwise = (call.fields >> kLogNeuronwise & 1U) != 0;
  int64_t at = 0;
  const auto place = [&](int64_t count) {
    at += count;
    return workspace + (at - count);
  };
  Kept kept{};
  kept.c = place(call.N);
  kept.g = place(call.N * call.C);
  kept.weight_log = place(call.C);
  if (weights) {
    kept.along = place(call.N * call.C);
    kept.direction = place(call.N * (call.D + 1));
    kept.anchor = reinterpret_cast<int64_t*>(place(call.N));
  }
  if (neuronwise) {
    kept.apart = place(call.N * call.C);
    kept.bias_part = place(call.N * call.C);
    kept.scale = place(1);
  }
  if (size != nullptr) *size = at;
  return kept;
}

// Rounded to the output's dtype as the framework does: by way of float32, beyond float16's range to infinity.
__device__ __forceinline__ void put(const Matrix& out, int64_t at, double value) {
  const auto single = static_cast<float>(value);
  void* data = const_cast<void*>(out.data);
  switch (out.dtype) {
    case Dtype::kFloat16:
      static_cast<Half*>(data)[at] = fabs(value) >= 65520.0 ? Half{static_cast<uint16_t>(value < 0.0 ? 0xfc00 : 0x7c00)}
                                                            : Narrowed<Half>::of(single);
      break;
    case Dtype::kBFloat16:
      static_cast<BHalf*>(data)[at] = Narrowed<BHalf>::of(single);
      break;
    case Dtype::kFloat32:
      static_cast<float*>(data)[at] = single;
      break;
    case Dtype::kFloat64:
      static_cast<double*>(data)[at] = value;
      break;
  }
}

// As csrc/cpu/head_metrics_backward.h has it: of a gradient norm's row with c = 0 a twin of the label still has a part.
struct RowUpstream {
  double upstream, log_coefficient, c;
  bool live;
};
__device__ __forceinline__ RowUpstream row_upstream(const HeadMeasureBackward& call, int64_t n) {
  RowUpstream row{element(call.upstream, 0, n), 0.0, 0.0, false};
  if (call.log_coefficient != nullptr) row.log_coefficient = call.log_coefficient[n];
  if (math::counts_as_nothing(row.upstream, row.log_coefficient, call.double_compute)) return row;
  if (is_gradient(call) && label_of(call, n) == Label::kIgnored) return row;
  row.c = math::row_derivative(row.upstream, row.log_coefficient);
  row.live = row.c != 0.0 || is_gradient(call);
  return row;
}

// How a row's features enter its own gradient: factor phi, in two steps of `half` and the rest where the factor alone
// may leave the range.
struct RowPart {
  double factor, half;
  bool poisoned;
};
__device__ __forceinline__ RowPart row_part(bool poisoned, double c, double log_n, bool norm) {
  if (poisoned || !norm || c == 0.0) return {0.0, 0.0, poisoned};
  const double half = exp(-0.5 * log_n);
  return {2.0 * c * half, half, false};
}

// The rows' own gradients: factor phi + sum_j g_j w_j.
template <int rows, class X, class W, class V>
__device__ __forceinline__ void put_features(const HeadMeasureBackward& call, const X& x, const W& w, int64_t first, V,
                                             const RowPart* parts, const double (*g)[kFusedClasses]) {
  if (call.d_features.data == nullptr) return;
  const bool given = call.logits.data != nullptr;
  for (int64_t d = threadIdx.x; d < call.D; d += kThreads) {
    V sums[rows] = {};
    for (int j = 0; j < call.C && !given; ++j) {
      const V weight = static_cast<V>(w.at(j, d));
      FLATCORE_UNROLL
      for (int r = 0; r < rows; ++r) sums[r] += static_cast<V>(g[r][j]) * weight;
    }
    FLATCORE_UNROLL
    for (int r = 0; r < rows; ++r) {
      const RowPart part = parts[r];
      if (first + r >= call.N) continue;
      double value = static_cast<double>(sums[r]);
      if (part.factor != 0.0) value += part.factor * (part.half * static_cast<double>(x.at(first + r, d)));
      put(call.d_features, (first + r) * call.D + d, part.poisoned ? kNan : value);
    }
  }
}

// Whether no entry of W is left, nor of the bias where it counts: layerwise is 0 then.
template <class W>
__device__ __forceinline__ bool weight_is_zero(const HeadProblem& call, const W& w) {
  for (int64_t j = 0; j < call.C; ++j) {
    if (call.include_bias && call.bias[j] != 0.0) return false;
    for (int64_t start = 0; start < call.D; start += kThreads) {
      const int64_t d = start + threadIdx.x;
      if (__syncthreads_or(d < call.D && static_cast<double>(w.at(j, d)) != 0.0) != 0) return false;
    }
  }
  return true;
}

template <class X, class W, class V>
__global__ void __launch_bounds__(kThreads) backward_rows(HeadMeasureBackward call, X x, W w, V zero) {
  __shared__ MeasureTile<kTileRows> tile;
  __shared__ double g[kTileRows][kFusedClasses];
  __shared__ RowPart parts[kTileRows];
  const Kept kept = kept_in(call.workspace, call, nullptr);
  const bool layerwise = asks_for(call, kLogLayerwise);
  if (layerwise) put_weight_rows(call, w, kept.weight_log);
  const bool no_weight = layerwise && weight_is_zero(call, w);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, j = Team<kWarp>::lane();
  for (int64_t first = blockIdx.x * kTileRows; first < call.N; first += static_cast<int64_t>(gridDim.x) * kTileRows) {
    put_products(call, x, w, first, zero, tile);
    const int64_t n = first + warp;
    if (n < call.N) {
      const RowUpstream up = row_upstream(call, n);
      const double log_n = math::log_head_square(tile.log_n[warp], call.include_bias);
      const RowSoftmax row = row_softmax(call, n, tile.z[warp], tile.log_n[warp]);
      const auto split = split_of(call, row);
      const bool poisoned = up.live && (row.bad || up.c != up.c);
      const bool none =
          !up.live || poisoned || no_weight || log_n == -math::kInfinity || split.log_eps == -math::kInfinity;
      const double c = none ? 0.0 : up.c, inverse = row.tail.u1 > 0.0 ? 1.0 / row.tail.u1 : 0.0;
      const auto form = math::trace_cotangent<double>(split.confidence, split.eps, row.tail.u2 * inverse * inverse);
      const double value =
          none ? 0.0 : c / call.temperature * (j == row.tail.m ? form.top : form.rest(row.u * inverse));
      if (j < call.C) {
        g[warp][j] = value;
        kept.g[n * call.C + j] = value;
        if (call.d_logits.data != nullptr) put(call.d_logits, n * call.C + j, poisoned ? kNan : value);
      }
      if (j == 0) {
        kept.c[n] = poisoned ? kNan : c;
        parts[warp] = row_part(poisoned, c, log_n, true);
      }
    }
    __syncthreads();
    put_features<kTileRows>(call, x, w, first, zero, parts, g);
    __syncthreads();  // the tile is written again
  }
}

// dL/dz of a row and its part of W's gradient, by the block; false where its value is 0.
template <class W>
__device__ __forceinline__ bool put_anchored_row(const HeadMeasureBackward& call, const W& w, const Kept& kept,
                                                 int64_t n, int64_t anchor, double scale, const RowUpstream& up,
                                                 const RowSoftmax& row, double log1p_tau, double* u, double* g) {
  using Warp = Team<kWarp>;
  const bool gradient = is_gradient(call), with_bias = call.include_bias && !gradient;
  const double inverse_temperature = 1.0 / call.temperature;
  const int64_t at = n * call.C, columns = call.D + (with_bias ? 1 : 0);
  double* direction = kept.direction + n * (call.D + 1);
  const Anchored sums = anchored(call, w, with_bias, anchor, scale, row, log1p_tau, inverse_temperature, u, direction);
  // what the row is divided by: the norm, or Var_p(w), over the best share of those that differ
  const double size = !gradient                           ? sums.variance()
                      : asks_for(call, kLogGradientNorm)  ? sqrt(sums.norm2_squared)
                      : asks_for(call, kLogGradientNorm1) ? sums.norm1
                                                          : sums.norm_inf;
  if (sums.top == -math::kInfinity || !(size > 0.0)) return false;
  const double log_share = (sums.top - row.tail.t) * inverse_temperature - log1p_tau;
  const double share = math::exp_nonpositive(log_share < 0.0 ? log_share : 0.0);
  if (gradient) {  // the sum becomes its dual direction
    Sums<1> count{};
    for (int64_t d = threadIdx.x; d < call.D; d += kThreads) count.at[0] += fabs(direction[d]) == sums.norm_inf;
    const double ties = Team<kThreads>::merged(count, AddSums{}).at[0];
    for (int64_t d = threadIdx.x; d < call.D; d += kThreads) {
      direction[d] = math::dual_entry(norm_order(call.fields), direction[d], size, ties);
    }
  }
  __syncthreads();
  // the differences' squares and their products with the direction: a warp per class, lane j keeps those of class j
  Sums<2> mine{};
  __shared__ Sums<2> dots[kFusedClasses];
  for (int64_t j = threadIdx.x / kWarp; j < call.C; j += kWarps) {
    Sums<2> dot{};
    for (int64_t d = Warp::lane(); d < columns && u[j] > 0.0; d += kWarp) {
      const double apart = (d < call.D ? static_cast<double>(w.at(j, d)) - static_cast<double>(w.at(anchor, d))
                                       : call.bias[j] - call.bias[anchor]) *
                           scale;
      dot.at[0] += apart * apart;
      dot.at[1] += apart * direction[d];
    }
    dot = Warp::merged(dot, AddSums{});
    if (Warp::lane() == 0) dots[j] = dot;
  }
  __syncthreads();
  // then a lane per class, every warp the same
  const int j = Warp::lane();
  const bool is_class = j < call.C;
  const double shared_u = is_class ? u[j] : 0.0;
  if (is_class) mine = dots[j];
  const double inverse = 1.0 / size, k = 2.0 * up.c * inverse * scale;
  double value = 0.0, along = 0.0, apart = 0.0;
  if (shared_u < 0.0 && row.z > -math::kInfinity) {
    const double log_p = (row.z - row.tail.t) * inverse_temperature - log1p_tau;
    const double p = exp(log_p);
    if (!gradient) {
      value = math::ExplicitVarianceCotangent{up.c * inverse_temperature, share, sums.norm2_squared, size}.twin(p);
      along = -k * p;
    } else {
      value = -up.c * inverse_temperature * p;
      if (j != anchor) along = math::twin_factor(up.upstream, up.log_coefficient, log_p, log_share, size);
    }
  } else if (shared_u > 0.0) {
    if (!gradient) {
      value = math::ExplicitVarianceCotangent{up.c * inverse_temperature, share, sums.norm2_squared, size}.other(
          shared_u, mine.at[0], mine.at[1]);
      along = -k * shared_u * share;
      apart = k * shared_u;
    } else {
      value = math::explicit_norm_cotangent(up.c * inverse_temperature, shared_u, mine.at[1], share, size);
      along = up.c * shared_u * inverse;
    }
  }
  if (gradient) {
    const Sums<2> totals = Warp::merged(Sums<2>{{j != row.tail.m ? value : 0.0, along}}, AddSums{});
    // a wrong label: the top class's share is all but 1 and its own term a difference of equals; the sum is 0
    if (j == row.tail.m && shared_u >= 0.0) value = -totals.at[0];
    if (j == anchor) along = -totals.at[1];
    along *= scale;
  }
  if (threadIdx.x < call.C) {
    g[j] = value;
    kept.along[at + j] = along;
    if (kept.apart != nullptr) {
      kept.apart[at + j] = apart;
      kept.bias_part[at + j] =
          with_bias ? along * direction[call.D] + apart * ((call.bias[j] - call.bias[anchor]) * scale) : 0.0;
    }
  }
  return true;
}

template <class X, class W, class V>
__global__ void __launch_bounds__(kThreads, 4) backward_anchored_rows(HeadMeasureBackward call, X x, W w, V zero) {
  __shared__ MeasureTile<1> tile;
  __shared__ double u[kFusedClasses], g[1][kFusedClasses];
  const Kept kept = kept_in(call.workspace, call, nullptr);
  const double scale = scalbn(1.0, weight_exponent(call, w));
  if (kept.scale != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *kept.scale = scale;
  const bool gradient = is_gradient(call);
  for (int64_t n = blockIdx.x; n < call.N; n += gridDim.x) {
    put_products(call, x, w, n, zero, tile);
    const RowUpstream up = row_upstream(call, n);
    const double log_n = math::log_head_square(tile.log_n[0], call.include_bias);
    const RowSoftmax row = row_softmax(call, n, tile.z[0], tile.log_n[0]);  // every warp the same
    const auto split = split_of(call, row);
    const bool bad = row.bad || (gradient && label_of(call, n) != Label::kValid);
    const bool poisoned = up.live && (bad || up.c != up.c);
    bool adds = up.live && !poisoned && (gradient || (log_n != -math::kInfinity && split.log_eps != -math::kInfinity));
    const int64_t anchor = adds ? (gradient ? call.target[n] : row.tail.m) : 0;
    if (adds) adds = put_anchored_row(call, w, kept, n, anchor, scale, up, row, split.log1p_tau, u, g[0]);
    const double c = adds ? up.c : 0.0;
    if (threadIdx.x < call.C) {
      const int64_t at = n * call.C + threadIdx.x;
      if (!adds) {
        g[0][threadIdx.x] = kept.along[at] = 0.0;
        if (kept.apart != nullptr) kept.apart[at] = kept.bias_part[at] = 0.0;
      }
      const double value = g[0][threadIdx.x];
      kept.g[at] = value;
      if (call.d_logits.data != nullptr) put(call.d_logits, at, poisoned ? kNan : value);
    }
    if (threadIdx.x == 0) {
      kept.c[n] = poisoned ? kNan : c;
      kept.anchor[n] = anchor;
    }
    __syncthreads();
    const RowPart part = row_part(poisoned, c, log_n, !gradient);
    put_features<1>(call, x, w, n, zero, &part, g);
    __syncthreads();  // the tile, u and g are written again
  }
}

// Merges the warps' sums of 8 classes at a time and hands each to finish(class, sum).
template <int most, class Finish>
__device__ __forceinline__ void merge_classes(int64_t C, const double* sums, Finish finish) {
  __shared__ double slots[kSumWarps][kMergedClasses][kWarp];
  static_assert(kSumWarps == kMergedClasses, "a warp per class");
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = Team<kWarp>::lane();
  FLATCORE_UNROLL
  for (int c0 = 0; c0 < most; c0 += kMergedClasses) {
    if (c0 < C) {
      FLATCORE_UNROLL
      for (int i = 0; i < kMergedClasses; ++i) slots[warp][i][lane] = sums[c0 + i];
      __syncthreads();
      double total = 0.0;
      for (int other = 0; other < kSumWarps; ++other) total += slots[other][warp][lane];
      if (c0 + warp < C) finish(c0 + warp, total);
      __syncthreads();
    }
  }
}

// A block per 32 columns of W's gradient, a warp per part of the rows; the last block has the bias's, a lane per class.
template <int most, class X, class W, class V>
__global__ void __launch_bounds__(kSumThreads) backward_sums(HeadMeasureBackward call, X x, W w, V) {
  const Kept kept = kept_in(call.workspace, call, nullptr);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = Team<kWarp>::lane();
  const int64_t C = call.C, columns = (call.D + kWarp - 1) / kWarp;
  const bool given = call.logits.data != nullptr, weights = kept.along != nullptr;
  Sums<2> rows{};  // of c, and of the rows that poison
  for (int64_t n = threadIdx.x; n < call.N; n += kSumThreads) {
    const double c = kept.c[n];
    if (c == c) rows.at[0] += c;
    if (c != c) rows.at[1] += 1.0;
  }
  rows = Team<kSumThreads>::merged(rows, AddSums{});
  const double poison = rows.at[1] > 0.0 ? kNan : 0.0, scale = kept.scale != nullptr ? *kept.scale : 1.0;
  // layerwise, in two steps: ||W||_F^-2 alone may leave the range; W = 0 has no gradient
  double half = 0.0, layer = 0.0;
  if (asks_for(call, kLogLayerwise)) {
    const double log_square = log_weight_square(call, kept.weight_log);
    half = log_square == -math::kInfinity ? 0.0 : exp(-0.5 * log_square);
    layer = call.norm_power * rows.at[0] * half;
  }
  const int64_t from = warp * call.N / kSumWarps, to = (warp + 1) * call.N / kSumWarps;
  for (int64_t block = blockIdx.x; block <= columns; block += gridDim.x) {
    if (block == columns) {
      if (call.d_bias.data == nullptr) continue;
      __shared__ double bias_sums[kSumWarps][kWarp];
      double sum = 0.0;
      for (int64_t n = from; n < to && lane < C; ++n) {
        if (!given) sum += kept.g[n * C + lane];
        if (kept.bias_part != nullptr) sum += kept.bias_part[n * C + lane];
      }
      bias_sums[warp][lane] = sum;
      __syncthreads();
      double total = 0.0;
      for (int other = 0; other < kSumWarps; ++other) total += bias_sums[other][lane];
      if (warp == 0 && lane < C) {
        const double own = layer != 0.0 && call.include_bias ? call.bias[lane] * half * layer : 0.0;
        put(call.d_bias, lane, total + own + poison);
      }
      continue;
    }
    if (call.d_weight.data == nullptr) continue;
    const int64_t d = block * kWarp + lane;
    const bool mine = d < call.D;
    double sums[most] = {};
    for (int64_t start = from; start < to && !given; start += kFoldRows) {
      V part[most] = {};
      for (int64_t n = start; n < start + kFoldRows && n < to; ++n) {
        const double c = kept.c[n];
        // a row that adds nothing stays out, whatever stands in it
        const V value = mine && c == c && c != 0.0 ? static_cast<V>(x.at(n, d)) : V{};
        FLATCORE_UNROLL
        for (int j = 0; j < most; ++j) {
          if (j < C) part[j] += static_cast<V>(kept.g[n * C + j]) * value;
        }
      }
      FLATCORE_UNROLL
      for (int j = 0; j < most; ++j) sums[j] += static_cast<double>(part[j]);
    }
    for (int64_t n = from; n < to && weights && mine; ++n) {
      const double along = kept.direction[n * (call.D + 1) + d], own = static_cast<double>(w.at(kept.anchor[n], d));
      FLATCORE_UNROLL
      for (int j = 0; j < most; ++j) {
        if (j >= C) continue;
        // by select: the factor may have left the range where the direction has no part, or may stand for no direction
        const double factor = kept.along[n * C + j];
        if (factor != 0.0 && along != 0.0) sums[j] += factor * along;
        if (kept.apart == nullptr) continue;
        const double apart = kept.apart[n * C + j];
        if (apart != 0.0) sums[j] += apart * ((static_cast<double>(w.at(j, d)) - own) * scale);
      }
    }
    merge_classes<most>(C, sums, [&](int j, double total) {
      if (!mine) return;
      const double own = layer != 0.0 ? static_cast<double>(w.at(j, d)) * half * layer : 0.0;
      put(call.d_weight, j * call.D + d, total + own + poison);
    });
  }
}

}  // namespace

int64_t head_measure_backward_workspace(const HeadProblem& problem) {
  int64_t size = 0;
  kept_in(nullptr, problem, &size);
  return size;
}

Launched head_measure_backward(const HeadMeasureBackward& call) {
  if (call.C > kFusedClasses) return {"too many classes for the fused kernel", "head_measure_backward"};
  const DeviceGuard guard(call.device);
  if (guard.status() != cudaSuccess) return launched(guard.status(), "head_measure_backward: the device");
  const bool weights = (call.fields & kWeightFields) != 0;
  const unsigned grid = row_blocks(call);
  return with_elements(call, [&](auto x, auto w, auto zero) {
    using X = decltype(x);
    using W = decltype(w);
    using V = decltype(zero);
    const Launched done =
        launch("head_measure_backward: rows", call.stream, grid, kThreads,
               weights ? &backward_anchored_rows<X, W, V> : &backward_rows<X, W, V>, call, x, w, zero);
    if (done.error != nullptr || (call.d_weight.data == nullptr && call.d_bias.data == nullptr)) return done;
    const unsigned columns = grid_for((call.D + kWarp - 1) / kWarp + 1);
    const char* what = "head_measure_backward: sums";
    if (call.C <= 16) {
      return launch(what, call.stream, columns, kSumThreads, &backward_sums<16, X, W, V>, call, x, w, zero);
    }
    return launch(what, call.stream, columns, kSumThreads, &backward_sums<32, X, W, V>, call, x, w, zero);
  });
}

}  // namespace flatcore::cuda
