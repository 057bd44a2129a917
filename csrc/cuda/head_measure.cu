// head_measure, small heads: rows' logs, then class weights, ignored rows, mean, sum or none, log or linear.
//
// Two launches: the rows over the grid, and one block that takes their logs in a fixed order. A last block that finds
// itself by a ticket would need the ticket zeroed first, which is a launch as well.
//
// Buffers: as cuda/head_measure.h says. Does not synchronise; two runs agree bit for bit.
// Numerics: products in float32 (float64 if an input is, or if features and weight differ in dtype), everything after
// them in float64, squares in range whatever their size. Neuronwise flatness and gradient norms from differences of
// rows of W, for every row: for few of them the table of distances costs more than it saves.
// Cost: features and W read once a tile of 4 rows; about 200 operations in float64 a row and class, and for neuronwise
// and the norms 6 C D more a row. Never run on a device yet: no figure is known.
#include "cuda/head_measure.h"
#include "cuda/head_measure_rows.h"
#include "cuda/launch.h"

namespace flatcore::cuda {
namespace {

constexpr int kTotalThreads = 256;

template <class X, class W, class V>
__global__ void __launch_bounds__(kThreads) measure_rows(HeadMeasure call, X x, W w, V zero) {
  __shared__ MeasureTile<kTileRows> tile;
  if (asks_for(call, kLogLayerwise)) put_weight_rows(call, w, call.workspace);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const double two_log_t = 2.0 * math::log_nonnegative(call.temperature);
  for (int64_t first = blockIdx.x * kTileRows; first < call.N; first += static_cast<int64_t>(gridDim.x) * kTileRows) {
    put_products(call, x, w, first, zero, tile);
    const int64_t n = first + warp;
    if (n < call.N) {
      const RowSoftmax row = row_softmax(call, n, tile.z[warp], tile.log_n[warp]);
      const double value = math::log_head_square(tile.log_n[warp], call.include_bias) +
                           split_of(call, row).log_one_minus_sum_p2 - two_log_t;
      if (Team<kWarp>::lane() == 0) call.row_logs[n] = row.bad ? kNan : value;
    }
    __syncthreads();  // the tile is written again
  }
}

// Neuronwise flatness and gradient norms: a block per row.
template <class X, class W, class V>
__global__ void __launch_bounds__(kThreads, 4) measure_anchored_rows(HeadMeasure call, X x, W w, V zero) {
  __shared__ MeasureTile<1> tile;
  __shared__ double u[kFusedClasses];
  const int exponent = weight_exponent(call, w);
  const double inverse_temperature = 1.0 / call.temperature;
  const bool gradient = is_gradient(call), with_bias = call.include_bias && !gradient;
  for (int64_t n = blockIdx.x; n < call.N; n += gridDim.x) {
    put_products(call, x, w, n, zero, tile);
    const RowSoftmax row = row_softmax(call, n, tile.z[0], tile.log_n[0]);  // every warp the same
    const Label label = label_of(call, n);
    double value = kNan;
    if (gradient && label == Label::kIgnored) {
      value = -math::kInfinity;
    } else if (!row.bad && (!gradient || label == Label::kValid)) {
      const double log1p_tau = split_of(call, row).log1p_tau;
      const Anchored sums = anchored(call, w, with_bias, gradient ? call.target[n] : row.tail.m, scalbn(1.0, exponent),
                                     row, log1p_tau, inverse_temperature, u, nullptr);
      // in the scale of W, over T
      const double log_unit = exponent * math::kLn2 + math::log_nonnegative(call.temperature);
      const double shift = (sums.top - row.tail.t) * inverse_temperature - log1p_tau;
      if (!gradient) {
        const double log_n = math::log_head_square(tile.log_n[0], call.include_bias);
        value = log_n + shift + math::log_nonnegative(sums.variance()) - 2.0 * log_unit;
        if (log_n == -math::kInfinity) value = -math::kInfinity;
      } else {
        const double norm = asks_for(call, kLogGradientNorm)    ? sums.norm2_squared
                            : asks_for(call, kLogGradientNorm1) ? sums.norm1
                                                                : sums.norm_inf;
        value = shift + (asks_for(call, kLogGradientNorm) ? 0.5 : 1.0) * math::log_nonnegative(norm) - log_unit;
      }
      if (sums.top == -math::kInfinity) value = -math::kInfinity;
    }
    if (threadIdx.x == 0) call.row_logs[n] = value;
    __syncthreads();  // the tile and u are written again
  }
}

__device__ __forceinline__ double sample_weight(const HeadMeasure& call, int64_t n) {
  if (call.sample_weights != nullptr) return call.sample_weights[n];
  const Label label = label_of(call, n);
  if (label == Label::kIgnored || label == Label::kBad) return label == Label::kIgnored ? 0.0 : kNan;
  if (label == Label::kNone || call.class_weight.data == nullptr) return 1.0;
  const double s = element(call.class_weight, 0, call.target[n]);
  return s < 0.0 ? kNan : s;
}

__device__ __forceinline__ void put_value(const HeadMeasure& call, int64_t n, double value) {
  if (call.double_value) {
    static_cast<double*>(call.value)[n] = value;
  } else {
    static_cast<float*>(call.value)[n] = static_cast<float>(value);
  }
}

__global__ void __launch_bounds__(kTotalThreads) measure_total(HeadMeasure call) {
  using Block = Team<kTotalThreads>;
  // layerwise: ||W||_F, which the rows' logs are still without
  const double log_weight =
      asks_for(call, kLogLayerwise) ? 0.5 * call.norm_power * log_weight_square(call, call.workspace) : 0.0;
  if (call.reduction == Reduction::kNone) {
    for (int64_t n = threadIdx.x; n < call.N; n += kTotalThreads) {
      const double s = sample_weight(call, n), log = call.row_logs[n] + log_weight;
      const double log_value = s == 0.0 ? -math::kInfinity : s == 1.0 ? log : log + math::log_nonnegative(s);
      put_value(call, n, call.log ? log_value : exp(log_value));
      call.row_logs[n] = call.log && log_value != -math::kInfinity ? log_value * 0.0 : log_value;
    }
    return;
  }
  double top = -math::kInfinity;
  Sums<1> divisor{}, sum{};
  for (int64_t n = threadIdx.x; n < call.N; n += kTotalThreads) {
    const double s = sample_weight(call, n), log = call.row_logs[n] + log_weight;
    divisor.at[0] += s;
    if (s != 0.0 && log > top) top = log;
  }
  top = Block::merged(top, LargerOf{});
  divisor = Block::merged(divisor, AddSums{});
  if (call.count_rows) divisor.at[0] = static_cast<double>(call.N);
  const double base = top == -math::kInfinity ? 0.0 : top;  // sums relative to it stay in range
  for (int64_t n = threadIdx.x; n < call.N; n += kTotalThreads) {
    const double s = sample_weight(call, n);
    if (s != 0.0) sum.at[0] += s * math::exp_nonpositive(call.row_logs[n] + log_weight - base);
  }
  sum = Block::merged(sum, AddSums{});
  const bool mean = call.reduction == Reduction::kMean, none = sum.at[0] == 0.0;
  const double log_sum = math::log_nonnegative(sum.at[0]);
  const double log_divisor = mean ? math::log_nonnegative(divisor.at[0]) : 0.0;
  if (threadIdx.x == 0) {
    double value = call.log ? base + log_sum - log_divisor : exp(base) * sum.at[0] / (mean ? divisor.at[0] : 1.0);
    if (none) value = call.log ? -math::kInfinity : 0.0;
    put_value(call, 0, mean && divisor.at[0] == 0.0 ? kNan : value);
  }
  const double log_slope = call.log ? -base - log_sum : -log_divisor;
  for (int64_t n = threadIdx.x; n < call.N; n += kTotalThreads) {
    const double s = sample_weight(call, n), log = call.row_logs[n] + log_weight;
    call.row_logs[n] = s == 0.0 || log == -math::kInfinity || none
                           ? -math::kInfinity
                           : log + (s == 1.0 ? 0.0 : math::log_nonnegative(s)) + log_slope;
  }
}

}  // namespace

Launched head_measure(const HeadMeasure& call) {
  if (call.C > kFusedClasses) return {"too many classes for the fused kernel", "head_measure"};
  const DeviceGuard guard(call.device);
  if (guard.status() != cudaSuccess) return launched(guard.status(), "head_measure: the device");
  const bool weights = (call.fields & kWeightFields) != 0;
  const unsigned grid = row_blocks(call);
  const Launched done = with_elements(call, [&](auto x, auto w, auto zero) {
    using X = decltype(x);
    using W = decltype(w);
    using V = decltype(zero);
    return launch("head_measure: rows", call.stream, grid, kThreads,
                  weights ? &measure_anchored_rows<X, W, V> : &measure_rows<X, W, V>, call, x, w, zero);
  });
  if (done.error != nullptr) return done;
  return launch("head_measure: total", call.stream, 1, kTotalThreads, &measure_total, call);
}

}  // namespace flatcore::cuda
