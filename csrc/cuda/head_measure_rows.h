// What the measure of a small head and its gradient share: a tile's logits, and a row's softmax with a lane per class;
// included by .cu files only.
#pragma once

#include "cuda/head_measure.h"
#include "cuda/head_rows.h"
#include "math/epsilon_split.h"
#include "math/explicit_rows.h"

namespace flatcore::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTileRows = kWarps;  // a warp per row once the logits are there
constexpr int kGroup = 4;          // classes whose products a warp forms together
static_assert(kFusedClasses == kWarp, "a lane per class");

// Blocks that go over the rows: one a tile, or one a row where rows of W are needed; beyond 1,024, seven to each of an
// H100's processors, a block goes on to further ones.
inline unsigned row_blocks(const HeadProblem& call) {
  constexpr int64_t most = 1 << 10;
  const int64_t blocks = (call.fields & kWeightFields) != 0 ? call.N : (call.N + kTileRows - 1) / kTileRows;
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks < most ? blocks : most);
}

// A matrix whose elements' type is known, and one that asks for it each time.
template <class T>
struct Elements {
  const T* data;
  int64_t row_stride, column_stride;

  __device__ __forceinline__ auto at(int64_t row, int64_t column) const {
    return widened(data[row * row_stride + column * column_stride]);
  }
};
struct AnyElements {
  Matrix matrix;
  __device__ __forceinline__ double at(int64_t row, int64_t column) const { return element(matrix, row, column); }
};

// run(features, weight, a number of the compute type): by one dtype of both, or, where they differ, in float64.
template <class T, class V, class Run>
Launched of_one_dtype(const HeadProblem& call, Run run) {
  const auto elements = [](const Matrix& a) {
    return Elements<T>{static_cast<const T*>(a.data), a.row_stride, a.column_stride};
  };
  return run(elements(call.features), elements(call.weight), V{});
}
template <class Run>
Launched with_elements(const HeadProblem& call, Run run) {
  const Dtype dtype = call.features.dtype;
  if (dtype == call.weight.dtype && call.double_compute == (dtype == Dtype::kFloat64)) {
    switch (dtype) {
      case Dtype::kFloat16:
        return of_one_dtype<Half, float>(call, run);
      case Dtype::kBFloat16:
        return of_one_dtype<BHalf, float>(call, run);
      case Dtype::kFloat32:
        return of_one_dtype<float, float>(call, run);
      case Dtype::kFloat64:
        return of_one_dtype<double, double>(call, run);
    }
  }
  return run(AnyElements{call.features}, AnyElements{call.weight}, double{});
}

// log sum x_d^2 of a row by a team, known to its lanes: NaN and infinity as they come, no square leaves the range.
template <int width, class X>
__device__ __forceinline__ double log_row_squares(const X& x, int64_t row, int64_t D) {
  RowPartial partial;
  for (int64_t d = Team<width>::lane(); d < D; d += width) partial.take(static_cast<double>(x.at(row, d)), 1.0);
  partial = Team<width>::merged(partial, MergePartials{});
  if (partial.sum != partial.sum) return kNan;
  if (partial.largest == 0.0) return -math::kInfinity;
  if (!(partial.largest < math::kInfinity)) return math::kInfinity;
  if (math::squares_in_range<double>(partial.squares)) return math::log_nonnegative(partial.squares);
  const PowerOfTwo scale = inverse_power(partial.largest);
  const double exponent = static_cast<double>(ilogb(partial.largest));
  RowPartial scaled;
  for (int64_t d = Team<width>::lane(); d < D; d += width) {
    scaled.take(static_cast<double>(x.at(row, d)) * scale.first, scale.second);
  }
  scaled = Team<width>::merged(scaled, MergePartials{});
  return math::log_nonnegative(scaled.squares) + 2.0 * exponent * math::kLn2;
}

// The logs of ||w_j||^2, a row of W each: the grid's blocks share them.
template <class W>
__device__ __forceinline__ void put_weight_rows(const HeadProblem& call, const W& w, double* logs) {
  for (int64_t j = blockIdx.x; j < call.C; j += gridDim.x) {
    const double log_square = log_row_squares<kThreads>(w, j, call.D);
    if (threadIdx.x == 0) logs[j] = log_square;
  }
}
// log ||W||_F^2 of them, with the bias where it counts as a column; by a warp, known to its lanes.
__device__ __forceinline__ double log_weight_square(const HeadProblem& call, const double* logs) {
  const int j = Team<kWarp>::lane();
  const bool mine = j < call.C;
  const double row = mine ? logs[j] : -math::kInfinity;
  const double bias = mine && call.include_bias ? 2.0 * math::log_nonnegative(fabs(call.bias[j])) : -math::kInfinity;
  const double top = Team<kWarp>::merged(LargerOf{}(row, bias), LargerOf{});
  if (!(top > -math::kInfinity && top < math::kInfinity)) return top;
  const Sums<1> sum{{math::exp_nonpositive(row - top) + math::exp_nonpositive(bias - top)}};
  return top + math::log_nonnegative(Team<kWarp>::merged(sum, AddSums{}).at[0]);
}

// e of 2^e W, which keeps squares of differences in range; by the block.
template <class W>
__device__ __forceinline__ int weight_exponent(const HeadProblem& call, const W& w) {
  double most = 0.0;
  for (int64_t j = threadIdx.x / kWarp; j < call.C; j += kWarps) {
    for (int64_t d = Team<kWarp>::lane(); d < call.D; d += kWarp) {
      const double a = fabs(static_cast<double>(w.at(j, d)));
      most = a > most ? a : most;
    }
    const double b = call.include_bias ? fabs(call.bias[j]) : 0.0;
    most = b > most && b < math::kInfinity ? b : most;
  }
  return math::scaling_exponent(Team<kThreads>::merged(most, LargerOf{}), call.double_compute);
}

template <class V, int count>
struct Products {
  V at[count];
};
struct AddProducts {
  template <class V, int count>
  __device__ __forceinline__ Products<V, count> operator()(const Products<V, count>& a,
                                                           const Products<V, count>& b) const {
    Products<V, count> both;
    FLATCORE_UNROLL
    for (int i = 0; i < count; ++i) both.at[i] = a.at[i] + b.at[i];
    return both;
  }
};

template <int rows>
struct MeasureTile {
  double z[rows][kFusedClasses];  // W phi, without the bias
  double log_n[rows];             // log ||phi||^2
};

// Rows first..first+rows: a warp forms the products of four classes, or one row's squares.
template <int rows, class X, class W, class V>
__device__ __forceinline__ void put_products(const HeadProblem& call, const X& x, const W& w, int64_t first, V,
                                             MeasureTile<rows>& tile) {
  using Warp = Team<kWarp>;
  const int C = static_cast<int>(call.C);
  const int groups = call.logits.data != nullptr ? 0 : (C + kGroup - 1) / kGroup;
  for (int task = static_cast<int>(threadIdx.x) / kWarp; task < groups + rows; task += kWarps) {
    if (task >= groups) {
      const int64_t n = first + (task - groups);
      const double log_n = log_row_squares<kWarp>(x, n < call.N ? n : call.N - 1, call.D);
      if (Warp::lane() == 0) tile.log_n[task - groups] = log_n;
      continue;
    }
    const int c0 = task * kGroup;
    Products<V, rows * kGroup> sums{};
    for (int64_t d = Warp::lane(); d < call.D; d += kWarp) {
      V weights[kGroup];
      FLATCORE_UNROLL
      for (int c = 0; c < kGroup; ++c) weights[c] = static_cast<V>(w.at(c0 + c < C ? c0 + c : C - 1, d));
      FLATCORE_UNROLL
      for (int r = 0; r < rows; ++r) {  // behind the last row: that row again, not used
        const V value = static_cast<V>(x.at(first + r < call.N ? first + r : call.N - 1, d));
        FLATCORE_UNROLL
        for (int c = 0; c < kGroup; ++c) sums.at[r * kGroup + c] += value * weights[c];
      }
    }
    sums = Warp::merged(sums, AddProducts{});
    FLATCORE_UNROLL
    for (int i = 0; i < rows * kGroup; ++i) {
      const int c = c0 + i % kGroup;
      if (Warp::lane() == i && c < C) tile.z[i / kGroup][c] = static_cast<double>(sums.at[i]);
    }
  }
  __syncthreads();
}

struct CombineTops {
  __device__ __forceinline__ math::SoftmaxTail operator()(const math::SoftmaxTail& a,
                                                          const math::SoftmaxTail& b) const {
    return math::combine_tops(a, b);
  }
};

// A row's softmax by a warp: z and u = exp((z - r)/T) are of the lane's class (-inf and 0 beyond C, u 0 for the top
// one), all else is known to every lane.
struct RowSoftmax {
  double z, u;
  math::SoftmaxTail tail;
  bool bad;
};
__device__ __forceinline__ RowSoftmax row_softmax(const HeadProblem& call, int64_t n, const double* products,
                                                  double log_n) {
  using Warp = Team<kWarp>;
  const int j = Warp::lane();
  RowSoftmax row{-math::kInfinity, 0.0, {}, !(log_n == -math::kInfinity || log_n * 0.0 == 0.0)};
  if (j < call.C) {
    if (call.logits.data != nullptr) {
      row.z = element(call.logits, n, j);
    } else {
      row.z = products[j];
      row.bad = row.bad || !(row.z * 0.0 == 0.0);  // an overflow is not a masked class
      if (call.bias != nullptr) row.z += call.bias[j];
    }
    row.bad = row.bad || !(row.z < math::kInfinity);
  }
  row.bad = __any_sync(kAllLanes, row.bad) != 0;
  row.tail = math::empty_tail();
  if (row.z > -math::kInfinity) row.tail.t = row.z, row.tail.m = j;
  row.tail = Warp::merged(row.tail, CombineTops{});
  row.bad = row.bad || row.tail.m == math::kNoClass;
  if (j < call.C && j != row.tail.m) row.u = math::tail_scale(row.z, row.tail.r, 1.0 / call.temperature);
  const Sums<2> sums = Warp::merged(Sums<2>{{row.u, row.u * row.u}}, AddSums{});
  row.tail.u1 = sums.at[0];
  row.tail.u2 = sums.at[1];
  return row;
}
__device__ __forceinline__ math::EpsilonSplit<double> split_of(const HeadProblem& call, const RowSoftmax& row) {
  return math::epsilon_split<double>(row.tail.t, row.tail.r, row.tail.u1, row.tail.u2, 1.0 / call.temperature);
}

// Neuronwise flatness and gradient norms, by a block: a row's sums over differences w_j - w_a to the row of W of its
// anchor, the top class or the label (math/explicit_rows.h).
struct Anchored {
  double top;    // best logit of the classes whose row differs; -inf if none does
  double group;  // sum of p_j over the others
  double total;  // sum_j u_j
  // times 2^e (squares 2^(2e)): spread about the mean, norms of sum_j u_j (w_j - w_a)
  double spread, norm1, norm2_squared, norm_inf;

  __device__ __forceinline__ double variance() const {
    return math::explicit_variance(spread, group, norm2_squared, total);
  }
};
struct AnchoredSums {
  double spread, norm1, norm2_squared, norm_inf;
};
struct MergeAnchored {
  __device__ __forceinline__ AnchoredSums operator()(const AnchoredSums& a, const AnchoredSums& b) const {
    return {a.spread + b.spread, a.norm1 + b.norm1, a.norm2_squared + b.norm2_squared,
            LargerOf{}(a.norm_inf, b.norm_inf)};
  }
};

// `row` is of the softmax with the lane's logit; u becomes exp((z_j - top)/T) of the classes that differ, -1 of the
// others; `direction` (D doubles, the bias's entry behind) the sum itself, unless null.
template <class W>
__device__ __forceinline__ Anchored anchored(const HeadProblem& call, const W& w, bool with_bias, int64_t anchor,
                                             double scale, const RowSoftmax& row, double log1p_tau,
                                             double inverse_temperature, double* u, double* direction) {
  using Warp = Team<kWarp>;
  const int lane = Warp::lane(), C = static_cast<int>(call.C);
  for (int j = static_cast<int>(threadIdx.x) / kWarp; j < C; j += kWarps) {
    bool differs = with_bias && call.bias[j] != call.bias[anchor];
    for (int64_t start = 0; start < call.D && !differs; start += kWarp) {
      const int64_t d = start + lane;
      differs = __any_sync(kAllLanes, d < call.D && w.at(j, d) != w.at(anchor, d)) != 0;
    }
    if (lane == 0) u[j] = differs ? 1.0 : -1.0;
  }
  __syncthreads();
  const bool mine = lane < C, differs = mine && u[lane] > 0.0;
  Anchored found{};
  found.top = Warp::merged(differs ? row.z : -math::kInfinity, LargerOf{});
  const double share = differs ? math::tail_scale(row.z, found.top, inverse_temperature) : -1.0;
  const bool twin = mine && !differs && row.z > -math::kInfinity;
  const Sums<2> sums =
      Warp::merged(Sums<2>{{twin ? math::exp_nonpositive((row.z - row.tail.t) * inverse_temperature - log1p_tau) : 0.0,
                            math::explicit_share_counts(share) ? share : 0.0}},
                   AddSums{});
  found.group = sums.at[0];
  found.total = sums.at[1];
  __syncthreads();
  if (threadIdx.x < call.C) u[threadIdx.x] = share;
  __syncthreads();
  const double inverse = found.total > 0.0 ? 1.0 / found.total : 0.0;
  AnchoredSums part{};
  for (int64_t d = threadIdx.x; d < call.D + (with_bias ? 1 : 0); d += kThreads) {
    const bool is_bias = d == call.D;
    const double own = is_bias ? call.bias[anchor] : static_cast<double>(w.at(anchor, d));
    const auto difference = [&](int j) {
      return ((is_bias ? call.bias[j] : static_cast<double>(w.at(j, d))) - own) * scale;
    };
    double value = 0.0;
    for (int j = 0; j < C; ++j) {
      if (math::explicit_share_counts(u[j])) value += u[j] * difference(j);
    }
    const double mean = value * inverse;
    for (int j = 0; j < C; ++j) {
      if (!math::explicit_share_counts(u[j])) continue;
      const double apart = difference(j) - mean;
      part.spread += u[j] * apart * apart;
    }
    if (direction != nullptr) direction[d] = value;
    const double a = fabs(value);
    part = MergeAnchored{}(part, {0.0, a, a * a, a});
  }
  part = Team<kThreads>::merged(part, MergeAnchored{});
  found.spread = part.spread;
  found.norm1 = part.norm1;
  found.norm2_squared = part.norm2_squared;
  found.norm_inf = part.norm_inf;
  return found;
}

}  // namespace
}  // namespace flatcore::cuda
