// Small heads: L1 and L-infinity norms of sum_j p_j (w_j - w_y), by a warp for the 32 rows whose coefficients stand in
// its tile; included by .cu files only.
//
// Numerics: differences, products and sums over the classes in the compute type, over the columns in float64; where too
// little is left of the terms' magnitudes the row is marked for head_explicit. Cost: 3 N C D operations, and a read of
// W from the first-level cache for every two rows.
#pragma once

#include "cuda/head_metrics.h"
#include "cuda/head_rows.h"
#include "math/cancellation.h"

namespace flatcore::cuda {

// A coefficient as the loop over the columns reads it, in the place of a number of the tile.
template <class V>
__device__ __forceinline__ void put_coefficient(double& slot, double value) {
  const V narrow = static_cast<V>(value);
  memcpy(&slot, &narrow, sizeof(V));
}
template <class V>
__device__ __forceinline__ V coefficient(const double& slot) {
  V value;
  memcpy(&value, &slot, sizeof(V));
  return value;
}

struct OtherNorms {
  double norm1, terms1, largest, terms_of_largest;
};
struct MergeOtherNorms {
  __device__ __forceinline__ OtherNorms operator()(const OtherNorms& a, const OtherNorms& b) const {
    const bool second = !(a.largest >= b.largest);
    return {a.norm1 + b.norm1, a.terms1 + b.terms1, second ? b.largest : a.largest,
            second ? b.terms_of_largest : a.terms_of_largest};
  }
};

// Rows first..first+31: coefficients of the classes in the columns of `tile`, the log of their unit in `units`; NaN
// where nothing is to be done.
template <class V>
__device__ __forceinline__ void put_other_norms(const HeadMetrics& call, int64_t first, const double (*tile)[kWarp],
                                                const double* units) {
  using Warp = Team<kWarp>;
  constexpr int width = Pack<V>::kCount, kTogether = 2;
  const V* w = static_cast<const V*>(call.packed);
  const int classes = static_cast<int>(call.C);
  const Values values(call);
  FLATCORE_ROLLED
  for (int row = 0; row < kWarp; row += kTogether) {
    bool any = false;
    const V* own[kTogether];
    OtherNorms norms[kTogether];
    FLATCORE_UNROLL
    for (int r = 0; r < kTogether; ++r) {
      const bool here = units[row + r] == units[row + r];
      any = any || here;
      own[r] = w + (here ? call.target[first + row + r] : 0) * call.packed_stride;
      norms[r] = {0.0, 0.0, 0.0, 0.0};
    }
    if (!any) continue;
    FLATCORE_ROLLED
    for (int64_t d = Warp::lane() * width; d < call.packed_stride; d += kWarp * width) {  // zeros behind D
      Pack<V> anchors[kTogether];
      V sums[kTogether][width] = {}, terms[kTogether][width] = {};
      FLATCORE_UNROLL
      for (int r = 0; r < kTogether; ++r) anchors[r] = *reinterpret_cast<const Pack<V>*>(own[r] + d);
      FLATCORE_ROLLED
      for (int j = 0; j < classes; ++j) {
        const Pack<V> weights = *reinterpret_cast<const Pack<V>*>(w + j * call.packed_stride + d);
        FLATCORE_UNROLL
        for (int r = 0; r < kTogether; ++r) {
          const V p = coefficient<V>(tile[j][row + r]);
          FLATCORE_UNROLL
          for (int e = 0; e < width; ++e) {
            const V apart = weights.items[e] - anchors[r].items[e];
            sums[r][e] += p * apart;
            terms[r][e] += p * (apart < V{} ? -apart : apart);
          }
        }
      }
      FLATCORE_UNROLL
      for (int r = 0; r < kTogether; ++r) {
        FLATCORE_UNROLL
        for (int e = 0; e < width; ++e) {
          const double size = fabs(static_cast<double>(sums[r][e])), of = static_cast<double>(terms[r][e]);
          norms[r] = MergeOtherNorms{}(norms[r], {size, of, size, of});
        }
      }
    }
    FLATCORE_UNROLL
    for (int r = 0; r < kTogether; ++r) {
      const OtherNorms all = Warp::merged(norms[r], MergeOtherNorms{});
      const double unit = units[row + r];
      if (Warp::lane() != 0 || unit != unit) continue;
      const int64_t n = first + row + r;
      const bool left = math::summed_norm_is_left(all.norm1, all.terms1, call.double_compute) &&
                        math::summed_norm_is_left(all.largest, all.terms_of_largest, call.double_compute);
      if (left || unit == -math::kInfinity) {
        values.put(kLogGradientNorm1, n, left ? unit + math::log_nonnegative(all.norm1) : unit);
        values.put(kLogGradientNormInf, n, left ? unit + math::log_nonnegative(all.largest) : unit);
      } else {
        call.special[n] |= kSpecialGradient;
      }
    }
  }
}

}  // namespace flatcore::cuda
