// head_metrics, small heads (at most 32 classes): every statistic of every row from one fused read of the features.
//
// Buffers: as cuda/head_metrics.h says; outputs are overwritten. Does not synchronise.
// Numerics: products and ||phi||^2 in float32 (float64 if an input is): beside 16-bit features, unless L1 or L-infinity
// norms are asked for, on tensor cores, whose sums are cut off and therefore short (cuda/head_products_tensor.h), else
// a lane's sums of D/32 terms merged pairwise; everything after them in float64, as on the CPU
// (csrc/cpu/head_metrics.cpp). Rows whose ||phi||^2 leaves the range are read again, scaled. Rows that need explicit
// differences between rows of W are marked for head_explicit. A row's value depends on nothing but the row; two runs
// agree bit for bit. Cost: N*D elements read once from memory; W, packed as the products take it, comes from the
// first-level cache: once for 32 rows on tensor cores, else once for 4. A warp takes 32 rows, then a lane per row for
// the softmax and its sums, about 25 C + 2 C^2 operations in float64. Shared memory is 8 bytes for each row and class
// there may be (of 2 to 32, as C asks), and a ring of 6 KiB a warp.
// Never run on a device yet: no figure is known.
//
// Included by the files that compile it: one for each dtype of the features, so that they compile at the same time.
#pragma once

#include "cuda/head_metrics.h"
#include "cuda/head_other_norms.h"
#include "cuda/head_products.h"
#include "cuda/head_products_tensor.h"
#include "cuda/head_rows.h"
#include "cuda/launch.h"
#include "math/cancellation.h"
#include "math/centered_rows.h"
#include "math/table_rows.h"

namespace flatcore::cuda {
namespace {

constexpr int kWarps = 2;
constexpr int kThreads = kWarps * kWarp;

// One lane's row: its logits stand in column `lane` of the tile, which is overwritten with u_j = exp((z_j - r)/T), and
// those with the coefficients of the other norms (head_other_norms.h), whose unit comes back; NaN where none are
// wanted.
template <class Products>
__device__ __forceinline__ double row_statistics(const HeadMetrics& call, int64_t n, double log_n, int lane,
                                                 double (*tile)[kWarp]) {
  constexpr bool given = Products::kGiven;
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
      if (Products::kOtherNorms && (call.fields & kOtherNorms) != 0) {
        const math::GradientMix mix = math::gradient_mix(top_label, split.confidence, split.eps);
        unit = (top_label ? split.log_eps : 0.0) - 0.5 * two_log_t;
        for (int j = 0; j < classes; ++j) {
          put_coefficient<typename Products::Compute>(tile[j][lane], mix.share(j == tail.m, tile[j][lane] * inverse));
        }
      }
    }
  }
  call.special[n] = special;
  return unit;
}

// How the products of 32 rows are formed, for heads of at most kClasses; kBlocks to a multiprocessor at least. With
// lanes over D, `classes` at a time; none for given logits, whose features are read for their squares alone.
template <class T, class V, int classes, int most>
struct LaneProducts {
  using Feature = T;
  using Compute = V;
  using Buffer = std::conditional_t<FLATCORE_SINCE_80 != 0, Ring<T>, NoRing>;
  static constexpr bool kGiven = classes == 0, kOtherNorms = true;
  static constexpr int kClasses = most, kBlocks = sizeof(T) == 2 ? 4 : 6;

  static __device__ __forceinline__ void put(const HeadMetrics& call, int64_t first, double (*logits)[kWarp],
                                             double* squares, Buffer& buffer) {
    lane_products<T, V, classes, (most > classes)>(call, first, logits, squares, buffer);
  }
};
// On tensor cores; code for 7.5 has none.
template <class T, int groups, int pieces>
struct TensorProducts {
  using Feature = T;
  using Compute = float;
  static constexpr bool kGiven = false, kOtherNorms = false;  // W stands in pieces
  static constexpr int kClasses = groups * kBlockClasses;
  static constexpr bool kMany = groups == 2 || (pieces == 3 && sizeof(typename PieceOf<T>::type) == 4);  // registers
  static constexpr int kBlocks = FLATCORE_SINCE_80 == 0 || kMany ? 4 : 6;
  static constexpr int kBlock = groups == 1 ? 10 : 8;
  using Buffer = NoRing;

  static __device__ __forceinline__ void put(const HeadMetrics& call, int64_t first, double (*logits)[kWarp],
                                             double* squares, Buffer& buffer) {
    if (since_80()) {
      tensor_products<T, groups, pieces>(call, first, logits, squares);
    } else {
      lane_products<T, float, kBlock, true>(call, first, logits, squares, buffer);
    }
  }
};

template <class Products>
__global__ void __launch_bounds__(kThreads, Products::kBlocks) head_rows(HeadMetrics call) {
  using T = typename Products::Feature;
  __shared__ double tiles[kWarps][Products::kClasses][kWarp];
  __shared__ double all_squares[kWarps][kWarp];
  __shared__ typename Products::Buffer buffers[kWarps];
  const int lane = Team<kWarp>::lane(), warp = static_cast<int>(threadIdx.x) / kWarp;
  double (*tile)[kWarp] = tiles[warp];
  double* squares = all_squares[warp];
  const int64_t groups = (call.N + kWarp - 1) / kWarp, step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t group = static_cast<int64_t>(blockIdx.x) * kWarps + warp; group < groups; group += step) {
    const int64_t first = group * kWarp;
    Products::put(call, first, tile, squares, buffers[warp]);
    __syncwarp();
    // squares that overflowed or lost digits: once more, by the whole warp
    const double square = squares[lane];
    double log_n = math::log_nonnegative(square);
    unsigned again = __ballot_sync(kAllLanes, !math::squares_in_range<typename Products::Compute>(square));
    for (int other = 0; again != 0; ++other, again >>= 1) {
      if ((again & 1U) == 0) continue;
      const int64_t n = first + other < call.N ? first + other : call.N - 1;
      const T* row = static_cast<const T*>(call.features.data) + n * call.features.row_stride;
      const double value = log_squares<kWarp, true>(row, call.features.column_stride, call.D);
      if (other == lane) log_n = value;
    }
    const double unit = first + lane < call.N ? row_statistics<Products>(call, first + lane, log_n, lane, tile) : kNan;
    if constexpr (Products::kOtherNorms) {
      if ((call.fields & kOtherNorms) != 0) {
        squares[lane] = unit;
        __syncwarp();
        put_other_norms<typename Products::Compute>(call, first, tile, squares);
      }
    }
    __syncwarp();  // the tile is written again
  }
}

template <class Products>
Launched run_products(const HeadMetrics& call) {
  const int64_t groups = (call.N + kWarp - 1) / kWarp;
  return launch("head_metrics", call.stream, grid_for((groups + kWarps - 1) / kWarps), kThreads, &head_rows<Products>,
                call);
}
// Shared memory for 16 classes or for 32.
template <class T, class V, int classes>
Launched run_lanes(const HeadMetrics& call) {
  return call.C <= 16 ? run_products<LaneProducts<T, V, classes, 16>>(call)
                      : run_products<LaneProducts<T, V, classes, kFusedClasses>>(call);
}
template <class T, int pieces>
Launched run_pieces(const HeadMetrics& call) {
  return piece_groups(call) == 1 ? run_products<TensorProducts<T, 1, pieces>>(call)
                                 : run_products<TensorProducts<T, 2, pieces>>(call);
}

template <class T>
Launched run(const HeadMetrics& call) {
  if (call.double_compute) {
    return call.logits.data != nullptr ? run_lanes<T, double, 0>(call) : run_lanes<T, double, 4>(call);
  }
  if constexpr (sizeof(T) <= 4) {
    if (call.logits.data != nullptr) return run_lanes<T, float, 0>(call);
  }
  if constexpr (sizeof(T) == 2) {
    if (!takes_pieces(call)) return run_lanes<T, float, kWholeBlock>(call);
    return piece_count(call) == 1 ? run_pieces<T, 1>(call) : run_pieces<T, 3>(call);
  }
  if constexpr (sizeof(T) == 4) {
    const int block = head_class_block(call.C, false);
    if (call.C > block) {  // 4 for 11 and 12 classes, 10 from 17 on
      return block == 4    ? run_products<LaneProducts<T, float, 4, 16>>(call)
             : block == 10 ? run_products<LaneProducts<T, float, 10, kFusedClasses>>(call)
                           : run_lanes<T, float, 8>(call);
    }
    switch (block) {
      case 10:
        return run_products<LaneProducts<T, float, 10, 10>>(call);
      case 8:
        return run_products<LaneProducts<T, float, 8, 8>>(call);
      case 4:
        return run_products<LaneProducts<T, float, 4, 4>>(call);
      default:
        return run_products<LaneProducts<T, float, 2, 2>>(call);
    }
  }
  return {"float64 features need float64 products", "head_metrics"};
}

}  // namespace
}  // namespace flatcore::cuda
