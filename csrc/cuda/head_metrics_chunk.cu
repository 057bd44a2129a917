// head_metrics, large heads: what lies between the library's two matrix products, for a chunk of rows at a time.
//
// Order of calls: head_weights once; then for each chunk the library forms z = W phi, head_chunk_statistics turns it
// into row statistics and q, the library forms q (W - center), head_chunk_weights finishes the fields that need it, and
// head_explicit the rows that it marks. flatcore/_engine/chunked_cuda.py is the loop.
//
// Buffers: as cuda/head_metrics.h says; q may be z itself. Does not synchronise.
// Numerics: a lane walks its classes once, online, with float64 sums relative to its best logit but one; lanes merge by
// the monoid (csrc/math/softmax_tail.h). The exponentials are in float32, of exact differences, where the logits are
// float32 numbers as they stand (no bias to add, T = 1), else in float64. q in pieces: each piece is the rest rounded
// to W's 16-bit type, so that the library multiplies without widening W: two of float16 (22 bits) or three of bfloat16
// (24 bits); two of bfloat16 would leave 1.5e-5.
// Cost: z read twice, the second time from the second-level cache for rows of up to some 100,000 classes, and q written
// once; two exponentials a logit. A warp per row of up to 1024 classes, a block of 256 threads for longer ones. Never
// run on a device yet: no figure is known.
#include "cuda/head_metrics.h"
#include "cuda/head_rows.h"
#include "cuda/launch.h"
#include "math/cancellation.h"
#include "math/centered_rows.h"

namespace flatcore::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kShort = 1024;

// A row's logits. Compute types: float where they are used as they stand, double for everything else.
template <class Z, class V>
struct LogitRow {
  const Z* z;
  const double* bias;
  bool given;
  double inverse_temperature;

  __device__ __forceinline__ V at(int64_t j) const {
    if constexpr (sizeof(V) == 4) {
      return z[j];
    } else {
      return bias != nullptr ? static_cast<V>(z[j]) + bias[j] : static_cast<V>(z[j]);
    }
  }
  // a product that overflowed is not a masked class
  __device__ __forceinline__ bool overflowed(int64_t j) const {
    return !given && !(static_cast<double>(z[j]) * 0.0 == 0.0);
  }
  // exp((x - top)/T) for finite top; 0 for x = -inf
  __device__ __forceinline__ double share(V x, V top) const {
    if constexpr (sizeof(V) == 4) {
      return static_cast<double>(math::exp_difference_float(x, top));
    } else {
      return math::exp_nonpositive((x - top) * inverse_temperature);
    }
  }
};

// The statistics of a lane's classes, met in ascending order.
template <class Row, class V>
struct LaneTail {
  V t = -static_cast<V>(math::kInfinity), r = -static_cast<V>(math::kInfinity);
  int64_t m = math::kNoClass;
  double u1 = 0.0, u2 = 0.0;

  __device__ __forceinline__ void lift(const Row& row, V top) {  // the best of the rest becomes `top`
    const double f = r == -static_cast<V>(math::kInfinity) ? 0.0 : row.share(r, top);
    u1 = u1 * f + 1.0;
    u2 = u2 * f * f + 1.0;
    r = top;
  }
  __device__ __forceinline__ void take(const Row& row, int64_t j, V z) {
    if (!(z < static_cast<V>(math::kInfinity)) || row.overflowed(j)) {
      u1 = kNan;
    } else if (z > t) {
      if (m != math::kNoClass) lift(row, t);
      t = z;
      m = j;
    } else if (z > r) {
      lift(row, z);
    } else if (z > -static_cast<V>(math::kInfinity)) {
      const double u = row.share(z, r);
      u1 += u;
      u2 += u * u;
    }
  }
  __device__ __forceinline__ math::SoftmaxTail tail() const {
    return {static_cast<double>(t), m, static_cast<double>(r), u1, u2};
  }
};

template <class Z, class V, int width>
__global__ void __launch_bounds__(kThreads, 2) chunk_statistics(HeadChunk call) {
  using Group = Team<width>;
  constexpr int rows = kThreads / width;
  const bool given = call.logits.data != nullptr;
  const double inverse_temperature = 1.0 / call.temperature;
  const int64_t step = static_cast<int64_t>(gridDim.x) * rows;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * rows + threadIdx.x / width; i < call.rows; i += step) {
    const int64_t n = call.first + i;
    const LogitRow<Z, V> row{static_cast<const Z*>(call.z) + i * call.z_stride, given ? nullptr : call.bias, given,
                             inverse_temperature};
    const double log_n = log_feature_squares<width>(call, n);
    LaneTail<LogitRow<Z, V>, V> mine;
    for (int64_t j = Group::lane(); j < call.C; j += width) mine.take(row, j, row.at(j));
    const math::SoftmaxTail tail = Group::merged(mine.tail(), CombineTails{inverse_temperature});
    const bool bad = log_n != log_n || tail.u1 != tail.u1 || tail.m == math::kNoClass;
    const auto split = math::epsilon_split<double>(tail.t, tail.r, tail.u1, tail.u2, inverse_temperature);
    const Label label = label_of(call, n);
    const double own = label == Label::kValid ? static_cast<double>(row.at(call.target[n])) : 0.0;
    Group::sync();  // z_y is read before q overwrites it

    Sums<3> means{};  // of the centred squares, the centred bias, and of 1 (q as stored)
    if (call.q != nullptr || call.q_pieces != nullptr) {
      const double inverse = tail.u1 > 0.0 ? 1.0 / tail.u1 : 0.0;
      const V base = tail.r == -math::kInfinity ? V{} : static_cast<V>(tail.r);
      const double scale = scalbn(1.0, static_cast<int>(call.summary[1]));
      Z* q = call.q != nullptr ? static_cast<Z*>(call.q) + i * call.C : nullptr;
      for (int64_t j = Group::lane(); j < call.C; j += width) {
        // a poisoned row's values are NaN already; zeros keep it out of the product's other rows on every library
        const V z = row.at(j);
        const bool none = bad || j == tail.m || !(z > -static_cast<V>(math::kInfinity));
        double value = none ? 0.0 : row.share(z, base) * inverse;
        if (q != nullptr) q[j] = static_cast<Z>(value);
        if (call.q_pieces != nullptr) {
          const int64_t at = i * call.C + j, step_between = call.rows * call.C;
          value = call.weight.dtype == Dtype::kFloat16
                      ? put_pieces(static_cast<Half*>(call.q_pieces) + at, step_between, call.pieces, value)
                      : put_pieces(static_cast<BHalf*>(call.q_pieces) + at, step_between, call.pieces, value);
          means.at[2] += value;
        }
        if (none) continue;
        if (call.centered_squares != nullptr) means.at[0] += value * call.centered_squares[j];
        if (call.include_bias && call.center != nullptr) {
          means.at[1] += value * (call.bias[j] * scale - call.center[call.D]);
        }
      }
      means = Group::merged(means, AddSums{});
    }
    if (Group::lane() != 0) continue;
    if (call.row_state != nullptr) {
      call.row_state[i] = {tail.t, tail.r,      split.log1p_tau, split.eps,         split.log_eps, split.confidence,
                           log_n,  means.at[0], means.at[1],     bad ? -1 : tail.m, means.at[2]};
    }
    if (call.values != nullptr) {
      put_softmax_fields(call, Values(call), n, bad, tail, split, log_n, call.summary[0], label, own);
    }
  }
}

// What is needed of q (W - center) and of two rows of W about the same center.
struct MeanSums {
  double mean2;                    // ||x||^2, x = q (W - center)
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

__global__ void __launch_bounds__(kThreads) chunk_weights(HeadChunk call) {
  using Block = Team<kThreads>;
  const Values values(call);
  const bool gradients = (call.fields & kGradientFields) != 0;
  const double log_t = math::log_nonnegative(call.temperature);
  const double scale = scalbn(1.0, static_cast<int>(call.summary[1])), log_scale = call.summary[1] * math::kLn2;
  const bool raw = call.q_pieces != nullptr;  // mean is the pieces' product with W itself
  const double raw_scale = !raw                                   ? 1.0
                           : call.weight.dtype == Dtype::kFloat16 ? scale / kPieceScale<Half>
                                                                  : scale / kPieceScale<BHalf>;
  for (int64_t i = blockIdx.x; i < call.rows; i += gridDim.x) {
    const int64_t n = call.first + i;
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
    const double q_sum = raw ? state.q_sum : 0.0;
    MeanSums sums{};
    for (int64_t d = Block::lane(); d < call.D; d += kThreads) {
      const double center = call.center[d];
      const double x = call.mean[i * call.D + d] * raw_scale - q_sum * center;
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
      if (state.log_eps == -math::kInfinity || call.runs[0] == call.C || log_n == -math::kInfinity) {
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

template <class Z, class V>
Launched run(const HeadChunk& call) {
  const char* what = "head_chunk_statistics";
  constexpr int64_t warps = kThreads / kWarp;
  if (call.C <= kShort) {
    return launch(what, call.stream, grid_for((call.rows + warps - 1) / warps), kThreads,
                  &chunk_statistics<Z, V, kWarp>, call);
  }
  return launch(what, call.stream, grid_for(call.rows), kThreads, &chunk_statistics<Z, V, kThreads>, call);
}

}  // namespace

Launched head_chunk_statistics(const HeadChunk& call) {
  if (call.rows == 0) return {};
  const DeviceGuard guard(call.device);
  if (guard.status() != cudaSuccess) return launched(guard.status(), "head_chunk_statistics: the device");
  if (call.double_compute) return run<double, double>(call);
  const bool as_they_stand = call.temperature == 1.0 && (call.bias == nullptr || call.logits.data != nullptr);
  return as_they_stand ? run<float, float>(call) : run<float, double>(call);
}

Launched head_chunk_weights(const HeadChunk& call) {
  if (call.rows == 0) return {};
  const DeviceGuard guard(call.device);
  if (guard.status() != cudaSuccess) return launched(guard.status(), "head_chunk_weights: the device");
  return launch("head_chunk_weights", call.stream, grid_for(call.rows), kThreads, &chunk_weights, call);
}

}  // namespace flatcore::cuda
