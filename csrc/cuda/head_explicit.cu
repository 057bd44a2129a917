// head_explicit: the marked rows' neuronwise flatness and gradient norms, from float64 logits and differences of rows.
//
// Buffers: as cuda/head_metrics.h says. Does not synchronise. Numerics: csrc/cuda/explicit_row.h.
// Cost: a byte per row to find them; a marked row takes a block and about 6 C D operations in float64. They are rare:
// rows of W that nearly coincide with the top one, or gradient norms other than L2. Never run on a device yet.
#include "cuda/explicit_row.h"
#include "cuda/head_metrics.h"
#include "cuda/launch.h"

namespace flatcore::cuda {
namespace {

__device__ __forceinline__ void explicit_row(const HeadExplicit& call, int64_t n, unsigned special, double* z,
                                             double* u) {
  const Values values(call);
  explicit_logits(call, n, z);
  const math::SoftmaxTail tail = explicit_tail(call, z);
  const double inverse_temperature = 1.0 / call.temperature;
  const auto split = math::epsilon_split<double>(tail.t, tail.r, tail.u1, tail.u2, inverse_temperature);
  const double log_t = math::log_nonnegative(call.temperature);
  const double log_scale = call.summary[1] * math::kLn2, scale = scalbn(1.0, static_cast<int>(call.summary[1]));
  if ((special & kSpecialNeuronwise) != 0) {
    const double top = explicit_shares(call, call.include_bias, tail.m, z, u);
    const ExplicitSum sum = explicit_sum(call, call.include_bias, tail.m, scale, u, nullptr);
    const double group = explicit_group(call, z, u, tail.t, split.log1p_tau);
    const double log_n = math::log_head_square(log_feature_squares<kExplicitThreads>(call, n), call.include_bias);
    if (threadIdx.x == 0) {
      const double log_share = (top - tail.t) * inverse_temperature - split.log1p_tau;
      const double inner = sum.variance(group);
      const bool zero = top == -math::kInfinity || log_n == -math::kInfinity;
      values.put(
          kLogNeuronwise, n,
          zero ? -math::kInfinity : log_n + log_share + math::log_nonnegative(inner) - 2.0 * (log_scale + log_t));
    }
    __syncthreads();  // u is written again
  }
  if ((special & kSpecialGradient) != 0) {
    const int64_t y = call.target[n];
    const double top = explicit_shares(call, false, y, z, u);
    const ExplicitSum sum = explicit_sum(call, false, y, scale, u, nullptr);
    if (threadIdx.x == 0) {
      const bool none = top == -math::kInfinity;
      const double shift = (top - tail.t) * inverse_temperature - split.log1p_tau - log_scale - log_t;
      values.put(kLogGradientNorm, n, none ? -math::kInfinity : shift + 0.5 * math::log_nonnegative(sum.norm2_squared));
      values.put(kLogGradientNorm1, n, none ? -math::kInfinity : shift + math::log_nonnegative(sum.norm1));
      values.put(kLogGradientNormInf, n, none ? -math::kInfinity : shift + math::log_nonnegative(sum.norm_inf));
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kExplicitThreads) explicit_rows(HeadExplicit call) {
  double* z = call.scratch + static_cast<int64_t>(blockIdx.x) * 2 * call.C;
  double* u = z + call.C;
  // a block looks at as many marks as it has threads, and does the marked rows one after the other
  const int64_t step = static_cast<int64_t>(gridDim.x) * kExplicitThreads;
  for (int64_t start = static_cast<int64_t>(blockIdx.x) * kExplicitThreads; start < call.rows; start += step) {
    const int64_t mine = start + threadIdx.x;
    if (__syncthreads_or(mine < call.rows && call.special[mine] != 0) == 0) continue;
    const int64_t end = start + kExplicitThreads < call.rows ? start + kExplicitThreads : call.rows;
    for (int64_t i = start; i < end; ++i) {
      if (call.special[i] != 0) explicit_row(call, call.first + i, call.special[i], z, u);
    }
  }
}

}  // namespace

Launched head_explicit(const HeadExplicit& call) {
  if (call.rows == 0) return {};
  const DeviceGuard guard(call.device);
  if (guard.status() != cudaSuccess) return launched(guard.status(), "head_explicit: the device");
  return launch("head_explicit", call.stream, grid_for(call.slots), kExplicitThreads, &explicit_rows, call);
}

}  // namespace flatcore::cuda
