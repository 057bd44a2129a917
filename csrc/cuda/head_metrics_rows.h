// head_metrics, small heads (at most 32 classes): every statistic of every row from one fused read of the features.
//
// Buffers: as cuda/head_metrics.h says; outputs are overwritten. Does not synchronise.
// Numerics: products and ||phi||^2 in float32 (float64 if an input is), a lane's sums of D/32 terms merged pairwise;
// everything after them in float64, as on the CPU (csrc/cpu/head_metrics.cpp). Rows whose ||phi||^2 leaves the range
// are read again, scaled. Rows that need explicit differences between rows of W are marked for head_explicit. A row's
// value depends on nothing but the row; two runs agree bit for bit. Cost: N*D elements read once from memory; W, packed
// in the compute type, comes from the first-level cache, 4 rows of features for each read of it. A warp takes 32 rows:
// 4 at a time for the products, lanes over D, 16 bytes a load; then a lane per row for the softmax and its sums, about
// 25 C + 2 C^2 operations in float64. Never run on a device yet: no figure is known.
//
// Included by the files that compile it: one for each dtype of the features, so that they compile at the same time.
#pragma once

#include "cuda/head_metrics.h"
#include "cuda/head_other_norms.h"
#include "cuda/head_rows.h"
#include "cuda/launch.h"
#include "math/cancellation.h"
#include "math/centered_rows.h"
#include "math/table_rows.h"

namespace flatcore::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kRows = 4;  // rows whose products are formed together

// Sums `count` values over the lanes of a warp; afterwards a lane holds the sums of a few of them. Each step halves
// the values: a lane keeps one half and gives the other to its neighbour at `offset`.
template <int count, int offset, class V>
__device__ __forceinline__ void fold(V* values) {
  if constexpr (offset > 0) {
    constexpr int half = (count + 1) / 2;
    const bool upper = (threadIdx.x & offset) != 0;
    FLATCORE_UNROLL
    for (int i = 0; i < half; ++i) {
      const V low = values[i], high = i + half < count ? values[i + half] : V{};
      values[i] = (upper ? high : low) + __shfl_xor_sync(kAllLanes, upper ? low : high, offset);
    }
    fold<half, offset / 2>(values);
  }
}
// Which of the values slot 0, 1, ... of this lane is the sum of after `fold`; beyond `count` for none.
template <int count, int offset>
__device__ __forceinline__ int folded(int slot) {
  if constexpr (offset == 0) {
    return slot;
  } else {
    constexpr int half = (count + 1) / 2;
    const int at = folded<half, offset / 2>(slot);
    if (at >= half) return count;  // padding of a later step
    const int index = at + ((threadIdx.x & offset) != 0 ? half : 0);
    return index < count ? index : count;
  }
}
template <int count>
constexpr int kSlots = (count + kWarp - 1) / kWarp;

// Products of rows first..first+3 with `classes` packed rows of W from class c0 on, and (squares given) the rows' sums
// of squares, into the columns `column`.. of the warp's tiles (class, row).
template <class T, class V, int classes>
__device__ __forceinline__ void products(const HeadMetrics& call, int64_t first, int64_t c0, int column,
                                         double (*logits)[kWarp], double* squares) {
  constexpr int width = Pack<T>::kCount;
  constexpr int count = (classes + 1) * kRows;
  const int lane = Team<kWarp>::lane();
  const T* rows[kRows];
  bool whole = call.features.column_stride == 1;
  FLATCORE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const int64_t n = first + r < call.N ? first + r : call.N - 1;  // behind the last row: not written
    rows[r] = static_cast<const T*>(call.features.data) + n * call.features.row_stride;
    whole = whole && reinterpret_cast<uintptr_t>(rows[r]) % 16 == 0;
  }
  const V* w = static_cast<const V*>(call.packed) + c0 * call.packed_stride;
  V sums[count] = {};
  for (int64_t d = lane * width; d < call.packed_stride; d += kWarp * width) {
    V x[kRows][width];
    if (whole && d + width <= call.D) {
      Pack<T> loaded[kRows];
      FLATCORE_UNROLL
      for (int r = 0; r < kRows; ++r) loaded[r] = *reinterpret_cast<const Pack<T>*>(rows[r] + d);
      FLATCORE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        FLATCORE_UNROLL
        for (int e = 0; e < width; ++e) x[r][e] = static_cast<V>(widened(loaded[r].items[e]));
      }
    } else {
      FLATCORE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        FLATCORE_UNROLL
        for (int e = 0; e < width; ++e) {
          x[r][e] = d + e < call.D ? static_cast<V>(widened(rows[r][(d + e) * call.features.column_stride])) : V{};
        }
      }
    }
    FLATCORE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FLATCORE_UNROLL
      for (int e = 0; e < width; ++e) sums[classes * kRows + r] += x[r][e] * x[r][e];
    }
    FLATCORE_UNROLL
    for (int c = 0; c < classes; ++c) {
      FLATCORE_UNROLL
      for (int e = 0; e < width; e += Pack<V>::kCount) {
        const Pack<V> weights = *reinterpret_cast<const Pack<V>*>(w + c * call.packed_stride + d + e);
        FLATCORE_UNROLL
        for (int i = 0; i < Pack<V>::kCount; ++i) {
          FLATCORE_UNROLL
          for (int r = 0; r < kRows; ++r) sums[c * kRows + r] += x[r][e + i] * weights.items[i];
        }
      }
    }
  }
  fold<count, kWarp / 2>(sums);
  FLATCORE_UNROLL
  for (int slot = 0; slot < kSlots<count>; ++slot) {
    const int index = folded<count, kWarp / 2>(slot);
    if (index >= count) continue;
    const int c = index / kRows, row = column + index % kRows;
    if (c == classes) {
      if (c0 == 0) squares[row] = static_cast<double>(sums[slot]);
    } else if (c0 + c < call.C) {
      logits[c0 + c][row] = static_cast<double>(sums[slot]);
    }
  }
}

// One lane's row: its logits stand in column `lane` of the tile, which is overwritten with u_j = exp((z_j - r)/T), and
// those with the coefficients of the other norms (head_other_norms.h), whose unit comes back; NaN where none are
// wanted.
template <class V>
__device__ __forceinline__ double row_statistics(const HeadMetrics& call, int64_t n, double log_n, int lane,
                                                 double (*tile)[kWarp]) {
  const bool given = call.logits.data != nullptr;
  const double inverse_temperature = 1.0 / call.temperature;
  const int classes = static_cast<int>(call.C);
  math::SoftmaxTail tail = math::empty_tail();
  double poison = log_n == -math::kInfinity ? 0.0 : log_n * 0.0;
  for (int j = 0; j < classes; ++j) {
    double z = given ? element(call.logits, n, j) : tile[j][lane];
    if (!given) {
      poison += z * 0.0;  // an overflow is not a masked class
      if (call.bias != nullptr) z += call.bias[j];
    }
    tile[j][lane] = z;
    if (!(z < math::kInfinity)) poison = kNan;
    if (z > tail.t) {
      tail.r = tail.t;
      tail.t = z;
      tail.m = j;
    } else if (z > tail.r) {
      tail.r = z;
    }
  }
  const bool bad = poison != poison || tail.m == math::kNoClass;
  const Label label = label_of(call, n);
  const int y = label == Label::kValid ? static_cast<int>(call.target[n]) : 0;
  const double own = tile[y][lane];
  const double base = tail.r == -math::kInfinity ? 0.0 : tail.r;
  for (int j = 0; j < classes; ++j) {
    const double u = j == tail.m ? 0.0 : math::exp_nonpositive((tile[j][lane] - base) * inverse_temperature);
    tile[j][lane] = u;
    tail.u1 += u;
    tail.u2 += u * u;
  }
  const auto split = math::epsilon_split<double>(tail.t, tail.r, tail.u1, tail.u2, inverse_temperature);
  const Values values(call);
  put_softmax_fields(call, values, n, bad, tail, split, log_n, call.summary[0], label, own);
  if (call.distances == nullptr) return kNan;

  uint8_t special = 0;
  double unit = kNan;
  const double two_log_t = 2.0 * math::log_nonnegative(call.temperature);
  const double log_scale = call.summary[1] * math::kLn2;
  const double inverse = tail.u1 > 0.0 ? 1.0 / tail.u1 : 0.0;
  // the sum over pairs, and the mean distances to the top class and to the label; every term >= 0
  const auto sums_over = [&](const double* distances, double& pairs, double& from_top, double& from_label) {
    pairs = from_top = from_label = 0.0;
    for (int j = 0; j < classes; ++j) {
      double s = 0.0;
      for (int k = 0; k < classes; ++k) s += __ldg(distances + j * classes + k) * tile[k][lane];
      pairs += tile[j][lane] * s;
      if (j == tail.m) from_top = s;
      if (j == y) from_label = s;
    }
    pairs *= 0.5 * inverse * inverse;
    from_top *= inverse;
    from_label *= inverse;
  };
  double pairs = 0.0, from_top = 0.0, from_label = 0.0;
  if (values.wants(kLogNeuronwise)) {
    sums_over(call.include_bias ? call.bias_distances : call.distances, pairs, from_top, from_label);
    const double inner = math::table_variance(split.confidence, from_top, split.eps, pairs);
    const double log_n_head = math::log_head_square(log_n, call.include_bias);
    double value = log_n_head + split.log_eps + math::log_nonnegative(inner) - two_log_t - 2.0 * log_scale;
    if (log_n_head == -math::kInfinity || split.log_eps == -math::kInfinity) {
      value = -math::kInfinity;
    } else if (!bad && !math::table_variance_is_in_range(inner)) {
      special |= kSpecialNeuronwise;  // the classes that differ from the top one may have underflowed in u
    }
    values.put(kLogNeuronwise, n, bad ? kNan : value);
  }
  if ((call.fields & kGradientFields) != 0) {
    if (label == Label::kIgnored) {
      put_gradient_norms(values, n, -math::kInfinity);
    } else if (bad || label != Label::kValid) {
      put_gradient_norms(values, n, kNan);
    } else {
      const bool top_label = y == tail.m, l2 = values.wants(kLogGradientNorm);
      if (l2 && (call.include_bias || !values.wants(kLogNeuronwise))) {
        sums_over(call.distances, pairs, from_top, from_label);
      }
      // ||sum_j p_j (w_j - w_y)||^2 from the table; `total` is what the difference was taken from
      const auto [total, square] = math::table_gradient(top_label, split.confidence, split.eps, from_top, from_label,
                                                        call.distances[tail.m * classes + y], pairs);
      if (l2 && math::table_gradient_is_left(square, total, call.double_compute)) {
        values.put(
            kLogGradientNorm, n,
            0.5 * math::log_nonnegative(square) + (top_label ? split.log_eps : 0.0) - log_scale - 0.5 * two_log_t);
      } else if (l2) {
        special |= kSpecialGradient;
      }
      if ((call.fields & kOtherNorms) != 0) {
        const math::GradientMix mix = math::gradient_mix(top_label, split.confidence, split.eps);
        unit = (top_label ? split.log_eps : 0.0) - 0.5 * two_log_t;
        for (int j = 0; j < classes; ++j) {
          put_coefficient<V>(tile[j][lane], mix.share(j == tail.m, tile[j][lane] * inverse));
        }
      }
    }
  }
  call.special[n] = special;
  return unit;
}

template <class T, class V, int classes>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 2 : 3) head_rows(HeadMetrics call) {
  __shared__ double tiles[kWarps][kFusedClasses][kWarp];
  __shared__ double all_squares[kWarps][kWarp];
  const int lane = Team<kWarp>::lane(), warp = static_cast<int>(threadIdx.x) / kWarp;
  double (*tile)[kWarp] = tiles[warp];
  double* squares = all_squares[warp];
  const int64_t groups = (call.N + kWarp - 1) / kWarp, step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t group = static_cast<int64_t>(blockIdx.x) * kWarps + warp; group < groups; group += step) {
    const int64_t first = group * kWarp;
    for (int column = 0; column < kWarp; column += kRows) {
      int64_t c0 = 0;
      do {  // given logits (no classes): once, for the squares
        products<T, V, classes>(call, first + column, c0, column, tile, squares);
        c0 += classes;
      } while (classes > 0 && c0 < call.C);
    }
    __syncwarp();
    // squares that overflowed or lost digits in V: once more, by the whole warp
    const double square = squares[lane];
    double log_n = math::log_nonnegative(square);
    unsigned again = __ballot_sync(kAllLanes, !math::squares_in_range<V>(square));
    for (int other = 0; again != 0; ++other, again >>= 1) {
      if ((again & 1U) == 0) continue;
      const int64_t n = first + other < call.N ? first + other : call.N - 1;
      const double value = log_feature_squares<kWarp>(call, n);
      if (other == lane) log_n = value;
    }
    squares[lane] = first + lane < call.N ? row_statistics<V>(call, first + lane, log_n, lane, tile) : kNan;
    __syncwarp();
    if ((call.fields & kOtherNorms) != 0) put_other_norms<V>(call, first, tile, squares);
    __syncwarp();  // the tile is written again
  }
}

template <class T, class V, int classes>
Launched run_block(const HeadMetrics& call) {
  const int64_t groups = (call.N + kWarp - 1) / kWarp;
  return launch("head_metrics", call.stream, grid_for((groups + kWarps - 1) / kWarps), kThreads,
                &head_rows<T, V, classes>, call);
}

template <class T>
Launched run(const HeadMetrics& call) {
  if (call.double_compute) {
    return call.logits.data != nullptr ? run_block<T, double, 0>(call) : run_block<T, double, 4>(call);
  }
  if constexpr (sizeof(T) <= 4) {
    if (call.logits.data != nullptr) return run_block<T, float, 0>(call);
    switch (head_class_block(call.C, false)) {
      case 10:
        return run_block<T, float, 10>(call);
      case 8:
        return run_block<T, float, 8>(call);
      case 4:
        return run_block<T, float, 4>(call);
      default:
        return run_block<T, float, 2>(call);
    }
  }
  return {"float64 features need float64 products", "head_metrics"};
}

}  // namespace
}  // namespace flatcore::cuda
