// head_metrics, large heads: what is left of a row behind the last tile of classes (head_metrics_chunk.cu).
//
// Buffers: as cuda/head_metrics.h says. Does not synchronise.
// Numerics: float64, from the row's statistics and, for neuronwise and gradient norms, the library's sums over
// u (W - center); rows where too little is left of those are marked for head_explicit.
// Cost: 200 bytes a row; with W's rows a block per row, which reads D sums and two rows of W. Never run on a device
// yet: no figure is known.
#include "cuda/head_metrics.h"
#include "cuda/head_rows.h"
#include "cuda/launch.h"
#include "math/cancellation.h"
#include "math/centered_rows.h"
#include "math/table_rows.h"

namespace flatcore::cuda {
namespace {

constexpr int kThreads = 256;

// What the last tile leaves: everything that needs no rows of W, and the row's numbers for what does. A thread per row.
__global__ void __launch_bounds__(kThreads) loop_values(HeadLoop call, int64_t first, int64_t rows) {
  const double inverse_temperature = 1.0 / call.temperature;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < rows; i += step) {
    const int64_t n = first + i;
    const HeadTail& state = call.tails[(call.all_tails ? first : 0) + i];
    const math::SoftmaxTail& tail = state.tail;
    const bool bad = tail.u1 != tail.u1 || tail.m == math::kNoClass;
    const auto split = math::epsilon_split<double>(tail.t, tail.r, tail.u1, tail.u2, inverse_temperature);
    if (call.row_state != nullptr) {
      const bool weights = call.centered_squares != nullptr;
      // of one class there is none
      const double sum = (weights || call.distances != nullptr) && state.share_sum > 0.0 ? state.share_sum : 1.0;
      call.row_state[i] = {split.log1p_tau,
                           split.eps,
                           split.log_eps,
                           split.confidence,
                           state.log_n,
                           weights ? state.square_sum / sum : 0.0,
                           weights ? state.bias_sum / sum : 0.0,
                           bad ? math::kNoClass : tail.m,
                           sum};
    }
    if (call.values != nullptr) {
      put_softmax_fields(call, Values(call), n, bad, tail, split, state.log_n, call.summary[0], label_of(call, n),
                         state.own);
    }
  }
}

// What is needed of u (W - center) and of two rows of W about the same center.
struct MeanSums {
  double mean2;                    // ||x||^2, x = u (W - center) over the sum of u
  double top2, label2;             // ||w_m - center||^2, ||w_y - center||^2
  double top_mean2;                // ||w_m - center - x||^2
  double norm1, norm22, norm_inf;  // of the gradient's mix of them, norm22 squared
  double center2;                  // ||center||^2
};
struct MergeMeanSums {
  __device__ __forceinline__ MeanSums operator()(const MeanSums& a, const MeanSums& b) const {
    return {a.mean2 + b.mean2,
            a.top2 + b.top2,
            a.label2 + b.label2,
            a.top_mean2 + b.top_mean2,
            a.norm1 + b.norm1,
            a.norm22 + b.norm22,
            LargerOf{}(a.norm_inf, b.norm_inf),
            a.center2 + b.center2};
  }
};

template <class Z>
__global__ void __launch_bounds__(kThreads) loop_weights(HeadLoop call, int64_t first, int64_t rows) {
  using Block = Team<kThreads>;
  const Values values(call);
  const bool gradients = (call.fields & kGradientFields) != 0;
  const double log_t = math::log_nonnegative(call.temperature);
  const double scale = scalbn(1.0, static_cast<int>(call.summary[1])), log_scale = call.summary[1] * math::kLn2;
  const bool raw = call.pieces != 0;  // mean is the pieces' product with W itself
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    const int64_t n = first + i;
    const HeadRow& state = call.row_state[i];
    const Label label = label_of(call, n);
    if (state.m == math::kNoClass) {
      if (Block::lane() == 0) {
        values.put(kLogNeuronwise, n, kNan);
        put_gradient_norms(values, n, label == Label::kIgnored ? -math::kInfinity : kNan);
        call.special[i] = 0;
      }
      continue;
    }
    const bool valid = label == Label::kValid;
    const int64_t y = valid ? call.target[n] : state.m;
    const bool top_label = y == state.m;
    const math::GradientMix mix = math::gradient_mix(top_label, state.confidence, state.eps);
    const double inverse = (raw ? scale / piece_scale(call, call.pieces) : 1.0) / state.q_sum,
                 has_center = raw ? 1.0 : 0.0;
    const Z* mean = static_cast<const Z*>(call.mean) + i * call.D;
    MeanSums sums{};
    for (int64_t d = Block::lane(); d < call.D; d += kThreads) {
      const double center = call.center[d];
      const double x = static_cast<double>(mean[d]) * inverse - has_center * center;
      const double a = element(call.weight, state.m, d) * scale - center;
      const double b = element(call.weight, y, d) * scale - center;
      const double gradient = fabs(mix.top * a + mix.rest * x - b);
      sums = MergeMeanSums{}(sums, MeanSums{x * x, a * a, b * b, (a - x) * (a - x), gradient, gradient * gradient,
                                            gradient, center * center});
    }
    sums = Block::merged(sums, MergeMeanSums{});
    if (Block::lane() != 0) continue;

    // a scaled W has left float32's range in the product
    const double least =
        raw ? (call.summary[1] != 0.0 ? math::kInfinity : math::least_beside_common_row(sums.center2)) : 0.0;
    uint8_t special = 0;
    if (values.wants(kLogNeuronwise)) {
      math::CenteredVariance variance{sums.top_mean2, sums.mean2, sums.top2};
      if (call.include_bias) variance.add_column(call.bias[state.m] * scale - call.center[call.D], state.bias_mean);
      const double inner = variance.inner(state.confidence, state.square_mean);
      const double magnitude = variance.magnitude(state.square_mean);
      const double log_n = math::log_head_square(state.log_n, call.include_bias);
      double value = log_n + state.log_eps + math::log_nonnegative(inner) - 2.0 * (log_scale + log_t);
      if (state.log_eps == -math::kInfinity || call.found[kSameRows] != 0 || log_n == -math::kInfinity) {
        value = -math::kInfinity;
      } else if (!(math::variance_is_left(inner, magnitude) && inner > least) && inner == inner) {
        special |= kSpecialNeuronwise;
      }
      values.put(kLogNeuronwise, n, value);
    }
    if (gradients) {
      if (label == Label::kIgnored) {
        put_gradient_norms(values, n, -math::kInfinity);
      } else if (!valid) {
        put_gradient_norms(values, n, kNan);
      } else if (top_label && state.log_eps == -math::kInfinity) {
        put_gradient_norms(values, n, -math::kInfinity);
      } else if (math::gradient_is_left(sums.norm22, sums.label2 + sums.mean2, state.square_mean) &&
                 sums.norm22 > least) {
        const double shift = (top_label ? state.log_eps : 0.0) - log_t - log_scale;
        values.put(kLogGradientNorm, n, shift + 0.5 * math::log_nonnegative(sums.norm22));
        values.put(kLogGradientNorm1, n, shift + math::log_nonnegative(sums.norm1));
        values.put(kLogGradientNormInf, n, shift + math::log_nonnegative(sums.norm_inf));
      } else {
        special |= kSpecialGradient;
      }
    }
    call.special[i] = special;
  }
}

// Neuronwise and the L2 norm from the table of distances: a warp per row, over the row's shares and their product with
// the table.
template <class Z>
__global__ void __launch_bounds__(kThreads) loop_table(HeadLoop call, HeadTable table) {
  using Warp = Team<kWarp>;
  constexpr int warps = kThreads / kWarp;
  constexpr bool in_float = sizeof(Z) == 4;
  const Values values(call);
  const double log_t = math::log_nonnegative(call.temperature), log_scale = call.summary[1] * math::kLn2;
  const int64_t step = static_cast<int64_t>(gridDim.x) * warps, padded = padded_classes(call.C);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / kWarp; i < table.rows; i += step) {
    const int64_t n = table.first + i;
    const HeadRow& state = call.row_state[i];
    const Label label = label_of(call, n);
    const bool bad = state.m == math::kNoClass, valid = label == Label::kValid;
    const Z* u = static_cast<const Z*>(table.shares) + i * padded;
    const Z* sums = static_cast<const Z*>(table.sums) + i * call.C;
    const Z* bias_sums = table.bias_sums != nullptr ? static_cast<const Z*>(table.bias_sums) + i * call.C : sums;
    Sums<2> pairs{};  // of the neuronwise table, and of the gradient's
    for (int64_t j = Warp::lane(); j < call.C && !bad; j += kWarp) {
      const double share = static_cast<double>(u[j]);
      pairs.at[0] += share * static_cast<double>(bias_sums[j]);
      pairs.at[1] += share * static_cast<double>(sums[j]);
    }
    pairs = Warp::merged(pairs, AddSums{});
    if (Warp::lane() != 0) continue;
    const double inverse = 1.0 / state.q_sum, half = 0.5 * inverse * inverse;
    const int64_t m = bad ? 0 : state.m, y = valid ? call.target[n] : m;
    uint8_t special = 0;
    if (values.wants(kLogNeuronwise)) {
      const double from_top = static_cast<double>(bias_sums[m]) * inverse;
      const double inner = math::table_variance(state.confidence, from_top, state.eps, pairs.at[0] * half);
      const double log_n = math::log_head_square(state.log_n, call.include_bias);
      double value = log_n + state.log_eps + math::log_nonnegative(inner) - 2.0 * (log_scale + log_t);
      if (state.log_eps == -math::kInfinity || log_n == -math::kInfinity) {
        value = -math::kInfinity;
      } else if (!bad && !math::table_variance_is_in_range(inner, in_float) && inner == inner) {
        special |= kSpecialNeuronwise;
      }
      values.put(kLogNeuronwise, n, bad ? kNan : value);
    }
    if (values.wants(kLogGradientNorm)) {
      const bool top_label = y == m;
      const auto [total, square] = math::table_gradient(
          top_label, state.confidence, state.eps, static_cast<double>(sums[m]) * inverse,
          static_cast<double>(sums[y]) * inverse, call.distances[m * call.C + y], pairs.at[1] * half);
      const bool left = in_float ? math::table_product_gradient_is_left(square, total)
                                 : math::table_gradient_is_left(square, total, true);
      double value = 0.5 * math::log_nonnegative(square) + (top_label ? state.log_eps : 0.0) - log_scale - log_t;
      if (label == Label::kIgnored || (!bad && valid && top_label && state.log_eps == -math::kInfinity)) {
        value = -math::kInfinity;
      } else if (bad || !valid) {
        value = kNan;
      } else if (!left && square == square) {
        special |= kSpecialGradient;
      }
      values.put(kLogGradientNorm, n, value);
    }
    call.special[i] = special;
  }
}

}  // namespace

Launched head_loop_table(const HeadLoop& call, const HeadTable& table) {
  if (table.rows == 0) return {};
  const DeviceGuard guard(call.device);
  if (guard.status() != cudaSuccess) return launched(guard.status(), "head_loop_table: the device");
  constexpr int64_t warps = kThreads / kWarp;
  return launch("head_loop_table", call.stream, grid_for((table.rows + warps - 1) / warps), kThreads,
                call.double_compute ? &loop_table<double> : &loop_table<float>, call, table);
}

Launched head_loop_values(const HeadLoop& call, int64_t first, int64_t rows) {
  if (rows == 0) return {};
  const DeviceGuard guard(call.device);
  if (guard.status() != cudaSuccess) return launched(guard.status(), "head_loop_values: the device");
  const char* what = "head_loop_values";
  const unsigned grid = grid_for((rows + kThreads - 1) / kThreads);
  const Launched done = launch(what, call.stream, grid, kThreads, &loop_values, call, first, rows);
  if (done.error != nullptr || call.centered_squares == nullptr || call.values == nullptr) return done;
  return call.double_compute
             ? launch(what, call.stream, grid_for(rows), kThreads, &loop_weights<double>, call, first, rows)
             : launch(what, call.stream, grid_for(rows), kThreads, &loop_weights<float>, call, first, rows);
}

}  // namespace flatcore::cuda
