// A row from float64 logits and explicit differences between rows of W, by a whole block: for the rare rows where a
// shared table or centre is not accurate enough; included by .cu files only.
#pragma once

#include "cuda/head_rows.h"
#include "math/explicit_rows.h"

namespace flatcore::cuda {

constexpr int kExplicitThreads = 128;
using ExplicitBlock = Team<kExplicitThreads>;

// Logits of row n in float64, z (C,), for all threads to see.
__device__ __forceinline__ void explicit_logits(const HeadProblem& call, int64_t n, double* z) {
  using Warp = Team<kWarp>;
  if (call.logits.data != nullptr) {
    for (int64_t j = threadIdx.x; j < call.C; j += kExplicitThreads) z[j] = element(call.logits, n, j);
  } else {
    for (int64_t j = threadIdx.x / kWarp; j < call.C; j += kExplicitThreads / kWarp) {
      Sums<1> sum{};
      for (int64_t d = Warp::lane(); d < call.D; d += kWarp) {
        sum.at[0] += element(call.features, n, d) * element(call.weight, j, d);
      }
      sum = Warp::merged(sum, AddSums{});
      if (Warp::lane() == 0) z[j] = call.bias != nullptr ? sum.at[0] + call.bias[j] : sum.at[0];
    }
  }
  __syncthreads();
}

__device__ __forceinline__ math::SoftmaxTail explicit_tail(const HeadProblem& call, const double* z) {
  const CombineTails combine{1.0 / call.temperature};
  math::SoftmaxTail tail = math::empty_tail();
  for (int64_t j = threadIdx.x; j < call.C; j += kExplicitThreads) tail = combine(tail, math::leaf_tail(j, z[j]));
  return ExplicitBlock::merged(tail, combine);
}

// u_j = exp((z_j - top)/T) of the classes whose row of W differs from the anchor's (the largest is 1), -1 for the
// others; returns top, -inf if no class differs.
__device__ __forceinline__ double explicit_shares(const HeadProblem& call, bool with_bias, int64_t anchor,
                                                  const double* z, double* u) {
  using Warp = Team<kWarp>;
  double top = -math::kInfinity;
  for (int64_t j = threadIdx.x / kWarp; j < call.C; j += kExplicitThreads / kWarp) {
    int differs = with_bias && call.bias[j] != call.bias[anchor];
    for (int64_t d = Warp::lane(); d < call.D && differs == 0; d += kWarp) {
      differs = element(call.weight, j, d) != element(call.weight, anchor, d);
    }
    const bool any = __any_sync(kAllLanes, differs) != 0;
    if (Warp::lane() == 0) u[j] = any ? 1.0 : -1.0;
    if (any && z[j] > top) top = z[j];
  }
  top = ExplicitBlock::merged(top, LargerOf{});
  for (int64_t j = threadIdx.x; j < call.C; j += kExplicitThreads) {
    if (u[j] > 0.0) u[j] = math::tail_scale(z[j], top, 1.0 / call.temperature);
  }
  __syncthreads();
  return top;
}

// Sum of p_j over the classes whose row equals the anchor's.
__device__ __forceinline__ double explicit_group(const HeadProblem& call, const double* z, const double* u, double t,
                                                 double log1p_tau) {
  Sums<1> group{};
  for (int64_t j = threadIdx.x; j < call.C; j += kExplicitThreads) {
    if (u[j] < 0.0 && z[j] > -math::kInfinity) group.at[0] += exp((z[j] - t) / call.temperature - log1p_tau);
  }
  return ExplicitBlock::merged(group, AddSums{}).at[0];
}

// Sums over the classes that differ: sum_j u_j (w_j - w_a) by its norms, and the spread of the w_j about their mean,
// times 2^e each (squares 2^(2e)). `direction` (D doubles, the bias's entry behind) keeps the sum itself, unless null.
struct ExplicitSum {
  double spread, total, norm1, norm2_squared, norm_inf;

  __device__ __forceinline__ double variance(double group) const {
    return math::explicit_variance(spread, group, norm2_squared, total);
  }
};
struct MergeExplicit {
  __device__ __forceinline__ ExplicitSum operator()(const ExplicitSum& a, const ExplicitSum& b) const {
    return {a.spread + b.spread, LargerOf{}(a.total, b.total), a.norm1 + b.norm1, a.norm2_squared + b.norm2_squared,
            LargerOf{}(a.norm_inf, b.norm_inf)};
  }
};
__device__ __forceinline__ ExplicitSum explicit_sum(const HeadProblem& call, bool with_bias, int64_t anchor,
                                                    double scale, const double* u, double* direction) {
  ExplicitSum sum{};
  for (int64_t d = threadIdx.x; d < call.D + (with_bias ? 1 : 0); d += kExplicitThreads) {
    const bool is_bias = d == call.D;
    const double own = is_bias ? call.bias[anchor] : element(call.weight, anchor, d);
    const auto difference = [&](int64_t j) {
      return ((is_bias ? call.bias[j] : element(call.weight, j, d)) - own) * scale;
    };
    double value = 0.0, total = 0.0;  // the total is the same for every d
    for (int64_t j = 0; j < call.C; ++j) {
      if (!math::explicit_share_counts(u[j])) continue;
      value += u[j] * difference(j);
      total += u[j];
    }
    const double mean = total > 0.0 ? value / total : 0.0;
    for (int64_t j = 0; j < call.C; ++j) {
      if (!math::explicit_share_counts(u[j])) continue;
      const double apart = difference(j) - mean;
      sum.spread += u[j] * apart * apart;
    }
    sum.total = total;
    if (direction != nullptr) direction[d] = value;
    const double a = fabs(value);
    sum.norm1 += a;
    sum.norm2_squared += a * a;
    sum.norm_inf = LargerOf{}(sum.norm_inf, a);
  }
  return ExplicitBlock::merged(sum, MergeExplicit{});
}

}  // namespace flatcore::cuda
