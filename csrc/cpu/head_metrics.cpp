// head_metrics, small heads: every statistic of every row from one fused read of the features.
//
// Who allocates: the caller, outputs and workspace; both are overwritten. Inputs may not overlap them. 64-bit offsets.
//
// Numerics: products and ||phi||^2 in float32 (float64 if an input is), at most 64 terms per lane before the sums are
// carried into float64; everything after the product in float64: the bias, the top two, exp and log, the distances
// between rows of W (from differences). No 1 - p, no 1 - sum p^2 and no difference of squares: math/epsilon_split.h.
// Rows whose ||phi||^2 leaves the range of float, and rows where a sum over the table of distances would cancel
// (duplicated or nearly duplicated rows of W), are done again explicitly.
//
// Cost: N*D elements of features read once, 2NDC + 2ND operations for the products, about 25 C per row in float64 for
// the softmax, and 2NC^2 in float64 where distances are needed. W is packed once per call.
// A row's value depends on nothing but the row: neighbours, thread count and position leave every bit as it is.
//
// Ladder and measurements: docs/performance.md.
#include "cpu/head_metrics.h"

#include <cstring>

#include "cpu/head_distances.h"
#include "cpu/head_rows.h"
#include "cpu/parallel.h"

namespace flatcore::cpu {

// Rows handled together: two AVX-512 vectors of doubles. The statistics run with rows across lanes.
constexpr int kTile = 16;

namespace {

struct Layout {
  int64_t packed_stride;  // elements of a packed row of W
  // byte offsets
  int64_t packed, distances, bias_distances, row_sums, threads, per_thread, total;
};

inline int64_t align(int64_t bytes) { return (bytes + 63) & ~int64_t{63}; }

inline Layout layout_of(const HeadProblem& problem) {
  Layout layout{};
  const int64_t element = problem.double_compute ? 8 : 4;
  layout.packed_stride = align(problem.D * element) / element;
  const bool table = (problem.fields & kWeightFields) != 0;
  int64_t at = 0;
  layout.packed = at;
  at += align(problem.C * layout.packed_stride * element);
  layout.distances = at;
  at += table ? align(problem.C * problem.C * 8) : 0;
  layout.bias_distances = at;
  at += table && problem.include_bias ? align(problem.C * problem.C * 8) : 0;
  layout.row_sums = at;
  at += align(problem.C * 8);
  layout.threads = at;
  // logits, u and mean distances of a tile (with and without the bias), and scratch for explicit rows
  layout.per_thread = align((4 * problem.C * kTile + 2 * problem.C + problem.D + 8) * 8) +
                      align(kTile * problem.D * 8) + align(kTile * 64);
  layout.total = at + layout.per_thread * problem.threads;
  return layout;
}

}  // namespace

namespace FLATCORE_TARGET {
namespace {

#if defined(FLATCORE_TARGET_avx512)
constexpr int kRowBlock = 4;  // 4 x 5 accumulators, 4 + 5 loads for 20 multiply-adds: fits 32 registers
#else
constexpr int kRowBlock = 2;  // 2 x 5 accumulators of 16 registers
#endif
constexpr int kAhead = 4;  // rows fetched ahead, into the second-level cache: the first holds W
constexpr int kClassBlock = 5;
constexpr int64_t kVectorsPerBlock = 64;

// Adds neighbouring accumulators pairwise until one vector holds all their sums, in order; `spread` lanes still hold
// parts of one sum.
template <class C, int count, int spread>
FLATCORE_INLINE void fold(typename VectorOf<C>::Type* acc, C* sums) {
  using V = typename VectorOf<C>::Type;
  using Index = typename VectorOf<C>::Index;
  constexpr int lanes = VectorOf<C>::kLanes;
  if constexpr (spread == 1) {
#pragma GCC unroll 32
    for (int i = 0; i < count; ++i) store_unaligned(sums + i * lanes, acc[i]);
  } else {
    Index even = {}, odd = {};
    for (int lane = 0; lane < lanes; ++lane) {
      even[lane] = 2 * lane;
      odd[lane] = 2 * lane + 1;
    }
    constexpr int half = (count + 1) / 2;
#pragma GCC unroll 32
    for (int i = 0; i < half; ++i) {
      const V a = acc[2 * i];
      const V b = acc[2 * i + 1 < count ? 2 * i + 1 : 2 * i];
      acc[i] = __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
    }
    fold<C, half, spread / 2>(acc, sums);
  }
}

// Dot products of RB rows of features with CB rows of packed W over `vectors` whole vectors and perhaps a zero-padded
// tail; `norms` adds the rows' sums of squares. sums: [class][row], squares: [row].
template <class C, class T, int RB, int CB, bool norms>
FLATCORE_INLINE void dot_block(const T* const* rows, const T* const* tails, const T* const* next, int64_t vectors,
                               const C* w, int64_t w_stride, C* sums, C* squares) {
  using V = typename VectorOf<C>::Type;
  constexpr int lanes = VectorOf<C>::kLanes;
  V acc[CB > 0 ? CB * RB : 1] = {};
  V square[RB] = {};
  const auto step = [&](const T* const* from, int64_t at, int64_t w_at) __attribute__((always_inline)) {
    V x[RB];
#pragma GCC unroll 8
    for (int r = 0; r < RB; ++r) x[r] = Load<C>::from(from[r] + at);
    if constexpr (norms) {
#pragma GCC unroll 8
      for (int r = 0; r < RB; ++r) square[r] += x[r] * x[r];
    }
#pragma GCC unroll 8
    for (int c = 0; c < CB; ++c) {
      const V wc = load_unaligned<V>(w + c * w_stride + w_at);
#pragma GCC unroll 8
      for (int r = 0; r < RB; ++r) acc[c * RB + r] += x[r] * wc;
    }
  };
  for (int64_t i = 0; i < vectors; ++i) {
    if constexpr (norms) {
      // Rows are short streams (2 KiB at D = 512) that the hardware prefetcher meets too late: W1 336 -> 207 ns a row.
      // Into the second level: prefetched into the first, they push W out of it (280 ns).
#pragma GCC unroll 8
      for (int r = 0; r < RB; ++r) __builtin_prefetch(next[r] + i * lanes, 0, 2);
    }
    step(rows, i * lanes, i * lanes);
  }
  if (tails != nullptr) step(tails, 0, vectors * lanes);
  if constexpr (CB > 0) fold<C, CB * RB, lanes>(acc, sums);
  if constexpr (norms) fold<C, RB, lanes>(square, squares);
}

template <class C, class T, bool norms>
FLATCORE_INLINE void dot_classes(int classes, const T* const* rows, const T* const* tails, const T* const* next,
                                 int64_t vectors, const C* w, int64_t w_stride, C* sums, C* squares) {
  switch (classes) {
    case 5:
      return dot_block<C, T, kRowBlock, 5, norms>(rows, tails, next, vectors, w, w_stride, sums, squares);
    case 4:
      return dot_block<C, T, kRowBlock, 4, norms>(rows, tails, next, vectors, w, w_stride, sums, squares);
    case 3:
      return dot_block<C, T, kRowBlock, 3, norms>(rows, tails, next, vectors, w, w_stride, sums, squares);
    case 2:
      return dot_block<C, T, kRowBlock, 2, norms>(rows, tails, next, vectors, w, w_stride, sums, squares);
    case 1:
      return dot_block<C, T, kRowBlock, 1, norms>(rows, tails, next, vectors, w, w_stride, sums, squares);
    default:
      return dot_block<C, T, kRowBlock, 0, norms>(rows, tails, next, vectors, w, w_stride, sums, squares);
  }
}

// One thread's buffers.
struct Buffers {
  double* z;       // (C, kTile) logits before the division by T
  double* u;       // (C, kTile) exp((z_j - r)/T), 0 for the top class
  double* s;       // (C, kTile) sum_k D_jk u_k
  double* s_bias;  // the same for the bias's distances
  double* row;     // 2 C + D: scratch for explicit rows
  void* packed;    // (kTile, D) rows whose elements are not adjacent
  void* tails;     // (kTile, lanes) zero-padded ends of rows

  Buffers(const HeadMetrics& call, const Layout& layout, int thread) {
    char* base = static_cast<char*>(call.workspace) + layout.threads + thread * layout.per_thread;
    z = reinterpret_cast<double*>(base);
    u = z + call.C * kTile;
    s = u + call.C * kTile;
    s_bias = s + call.C * kTile;
    row = s_bias + call.C * kTile;
    base += align((4 * call.C * kTile + 2 * call.C + call.D + 8) * 8);
    packed = base;
    tails = base + align(kTile * call.D * 8);
  }
};

struct TileRows {
  int64_t first;
  int count;
  bool bad[kTile];
  double log_n[kTile];  // log ||phi||^2
};

// Logits (unless given) and log ||phi||^2 of a tile.
template <class C, class T>
void tile_products(const HeadMetrics& call, const Layout& layout, const Buffers& buffers, TileRows& tile) {
  constexpr int lanes = VectorOf<C>::kLanes;
  const C* packed_w = reinterpret_cast<const C*>(static_cast<char*>(call.workspace) + layout.packed);
  const T* x = static_cast<const T*>(call.features.data);
  const T* rows[kTile];
  const T* tails[kTile];
  const int64_t whole = call.D / lanes;
  const int64_t rest = call.D - whole * lanes;
  T* packed = static_cast<T*>(buffers.packed);
  T* ends = static_cast<T*>(buffers.tails);
  for (int i = 0; i < kTile; ++i) {
    // lanes past the end repeat the last row; their results are not written
    const int64_t n = tile.first + (i < tile.count ? i : tile.count - 1);
    rows[i] = x + n * call.features.row_stride;
    if (call.features.column_stride != 1) {
      T* to = packed + i * call.D;
      for (int64_t d = 0; d < call.D; ++d) to[d] = rows[i][d * call.features.column_stride];
      rows[i] = to;
    }
    if (rest > 0) {
      T* to = ends + i * lanes;
      std::memset(static_cast<void*>(to), 0, lanes * sizeof(T));
      std::memcpy(static_cast<void*>(to), rows[i] + whole * lanes, static_cast<size_t>(rest) * sizeof(T));
      tails[i] = to;
    }
  }
  const bool products = call.logits.data == nullptr;
  double squares[kTile] = {};
  if (products) std::memset(buffers.z, 0, static_cast<size_t>(call.C) * kTile * sizeof(double));
  for (int64_t start = 0; start < whole || start == 0; start += kVectorsPerBlock) {
    const int64_t vectors = whole - start < kVectorsPerBlock ? whole - start : kVectorsPerBlock;
    const bool last = start + vectors == whole;
    for (int i = 0; i < kTile; i += kRowBlock) {
      const T* from[kRowBlock];
      const T* next[kRowBlock];  // what is read after this block; behind the last row a harmless hint
      for (int r = 0; r < kRowBlock; ++r) {
        from[r] = rows[i + r] + start * lanes;
        const int64_t n = tile.first + i + r + kAhead < call.N ? tile.first + i + r + kAhead : call.N - 1;
        next[r] = x + n * call.features.row_stride + start * lanes;
      }
      const T* const* ends_of_block = last && rest > 0 ? tails + i : nullptr;
      C sums[kClassBlock * kRowBlock + 2 * lanes] = {};
      C row_squares[kRowBlock + lanes] = {};
      int64_t c = 0;
      do {
        const int64_t left = products ? call.C - c : 0;
        const int classes = static_cast<int>(left < kClassBlock ? left : kClassBlock);
        const C* w = packed_w + c * layout.packed_stride + start * lanes;
        if (c == 0) {
          dot_classes<C, T, true>(classes, from, ends_of_block, next, vectors, w, layout.packed_stride, sums,
                                  row_squares);
          for (int r = 0; r < kRowBlock; ++r) squares[i + r] += static_cast<double>(row_squares[r]);
        } else {
          dot_classes<C, T, false>(classes, from, ends_of_block, next, vectors, w, layout.packed_stride, sums,
                                   row_squares);
        }
        for (int j = 0; j < classes; ++j) {
          double* to = buffers.z + (c + j) * kTile + i;
          for (int r = 0; r < kRowBlock; ++r) to[r] += static_cast<double>(sums[j * kRowBlock + r]);
        }
        c += kClassBlock;
      } while (products && c < call.C);
    }
  }
  // Outside these bounds squares may have overflowed or lost digits in C: once more, scaled.
  constexpr double low = sizeof(C) == 4 ? 1e-30 : 1e-280;
  constexpr double high = sizeof(C) == 4 ? 1e36 : 1e300;
  for (int i = 0; i < tile.count; ++i) {
    tile.log_n[i] = squares[i] > low && squares[i] < high ? 0.0 : log_sum_squares(rows[i], 1, call.D);
  }
  for (int i = 0; i < kTile; i += kDoubles) {
    const DoubleV logs = math::log_nonnegative(load_unaligned<DoubleV>(squares + i));
    for (int lane = 0; lane < kDoubles; ++lane) {
      if (squares[i + lane] > low && squares[i + lane] < high) tile.log_n[i + lane] = logs[lane];
    }
  }
  for (int i = 0; i < kTile; ++i) tile.bad[i] = tile.log_n[i] != tile.log_n[i];
}

void tile_given_logits(const HeadMetrics& call, const Buffers& buffers, TileRows& tile) {
  with_element(call.logits.dtype, [&](auto* type) {
    using T = ElementOf<decltype(type)>;
    const T* logits = static_cast<const T*>(call.logits.data);
    for (int i = 0; i < kTile; ++i) {
      const int64_t n = tile.first + (i < tile.count ? i : tile.count - 1);
      const T* from = logits + n * call.logits.row_stride;
      for (int64_t j = 0; j < call.C; ++j) {
        buffers.z[j * kTile + i] = static_cast<double>(widen(from[j * call.logits.column_stride]));
      }
    }
  });
}

// s_j = sum_k D_jk u_k for all classes j and the rows of a tile, every term >= 0.
void tile_mean_distances(const double* distances, int64_t C, const double* u, double* s) {
  constexpr int kJ = 4;
  constexpr int kV = kTile / kDoubles < 2 ? 1 : 2;
  for (int v = 0; v < kTile; v += kV * kDoubles) {
    int64_t j = 0;
    for (; j + kJ <= C; j += kJ) {
      DoubleV acc[kJ][kV] = {};
      for (int64_t k = 0; k < C; ++k) {
        DoubleV uk[kV];
#pragma GCC unroll 2
        for (int i = 0; i < kV; ++i) uk[i] = load_unaligned<DoubleV>(u + k * kTile + v + i * kDoubles);
#pragma GCC unroll 4
        for (int a = 0; a < kJ; ++a) {
          const double d = distances[(j + a) * C + k];
#pragma GCC unroll 2
          for (int i = 0; i < kV; ++i) acc[a][i] += uk[i] * d;
        }
      }
      for (int a = 0; a < kJ; ++a) {
        for (int i = 0; i < kV; ++i) store_unaligned(s + (j + a) * kTile + v + i * kDoubles, acc[a][i]);
      }
    }
    for (; j < C; ++j) {
      DoubleV acc[kV] = {};
      for (int64_t k = 0; k < C; ++k) {
        for (int i = 0; i < kV; ++i) {
          acc[i] += load_unaligned<DoubleV>(u + k * kTile + v + i * kDoubles) * distances[j * C + k];
        }
      }
      for (int i = 0; i < kV; ++i) store_unaligned(s + j * kTile + v + i * kDoubles, acc[i]);
    }
  }
}

// What a whole call shares.
struct Shared {
  const double* distances;       // (C, C), times 2^(2 exponent); null if not needed
  const double* bias_distances;  // the same with the bias as a column; null unless include_bias
  int exponent;
  double log_layer;  // norm_power log ||W||_F
  Values values;
};

void tile_statistics(const HeadMetrics& call, const Shared& shared, const Buffers& buffers, TileRows& tile,
                     FirstBadRow& bad_label) {
  const int64_t C = call.C;
  const bool given = call.logits.data != nullptr;
  const double inverse_temperature = 1.0 / call.temperature;
  const double two_log_t = 2.0 * std::log(call.temperature);
  alignas(64) double t[kTile], m[kTile], r[kTile], u1[kTile], u2[kTile], us[kTile], us_bias[kTile];
  alignas(64) double margin[kTile], confidence[kTile], eps[kTile], log_eps[kTile], log1p_tau[kTile], log_sum_p2[kTile];

  for (int v = 0; v < kTile; v += kDoubles) {
    DoubleV top = DoubleV{} - math::kInfinity, rest = top, index = DoubleV{} - 1.0, poison = {};
    for (int64_t j = 0; j < C; ++j) {
      DoubleV z = load_unaligned<DoubleV>(buffers.z + j * kTile + v);
      if (!given) {
        poison += z * 0.0;  // NaN if the product is not finite: an overflow is not a masked class
        if (call.bias != nullptr) {
          z += call.bias[j];
          store_unaligned(buffers.z + j * kTile + v, z);
        }
      }
      poison = z < math::kInfinity ? poison : DoubleV{} + kNan;
      const auto higher = z > top;
      const DoubleV second = z > rest ? z : rest;
      rest = higher ? top : second;
      index = higher ? DoubleV{} + static_cast<double>(j) : index;
      top = higher ? z : top;
    }
    poison = top == -math::kInfinity ? DoubleV{} + kNan : poison;
    const DoubleV anchor = rest == -math::kInfinity ? DoubleV{} : rest;
    DoubleV sum = {}, squares = {};
    for (int64_t j = 0; j < C; ++j) {
      const DoubleV z = load_unaligned<DoubleV>(buffers.z + j * kTile + v);
      const DoubleV e = math::exp_nonpositive((z - anchor) * inverse_temperature);
      const DoubleV uj = index == static_cast<double>(j) ? DoubleV{} : e;
      store_unaligned(buffers.u + j * kTile + v, uj);
      sum += uj;
      squares += uj * uj;
    }
    const auto split = math::epsilon_split<DoubleV>(top, rest, sum, squares, inverse_temperature);
    store_unaligned(t + v, top);
    store_unaligned(r + v, rest);
    store_unaligned(m + v, index);
    store_unaligned(u1 + v, sum);
    store_unaligned(u2 + v, squares);
    store_unaligned(margin + v, split.margin);
    store_unaligned(confidence + v, split.confidence);
    store_unaligned(eps + v, split.eps);
    store_unaligned(log_eps + v, split.log_eps);
    store_unaligned(log1p_tau + v, split.log1p_tau);
    store_unaligned(log_sum_p2 + v, split.log_one_minus_sum_p2);
    for (int lane = 0; lane < kDoubles; ++lane) tile.bad[v + lane] |= poison[lane] != poison[lane];
  }

  const int64_t n0 = tile.first;
  const int count = tile.count;
  const Values& values = shared.values;
  alignas(64) double log_n_head[kTile], out[kTile];
  for (int i = 0; i < kTile; ++i) {
    // log(||phi||^2 + 1) from log ||phi||^2, without leaving the range
    const double x = tile.log_n[i];
    log_n_head[i] = !call.include_bias ? x : x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x));
  }
  const auto put = [&](Field field) {
    for (int i = 0; i < count; ++i) out[i] = tile.bad[i] ? kNan : out[i];
    values.put(field, n0, out, count);
  };
  const auto put_from = [&](Field field, const double* from) {
    if (!values.wants(field)) return;
    std::memcpy(out, from, sizeof(out));
    put(field);
  };
  put_from(kConfidence, confidence);
  put_from(kMargin, margin);
  put_from(kLogOneMinusConfidence, log_eps);
  if (values.wants(kLogFeatureNorm)) {
    for (int i = 0; i < kTile; ++i) out[i] = 0.5 * tile.log_n[i];
    put(kLogFeatureNorm);
  }
  if (values.wants(kLogHessianTrace)) {
    for (int i = 0; i < kTile; ++i) out[i] = log_n_head[i] + log_sum_p2[i] - two_log_t;
    put(kLogHessianTrace);
  }
  if (values.wants(kLogLayerwise)) {
    for (int i = 0; i < kTile; ++i) out[i] = log_n_head[i] + log_sum_p2[i] - two_log_t + shared.log_layer;
    put(kLogLayerwise);
  }
  for (int i = 0; i < count; ++i) call.prediction[n0 + i] = tile.bad[i] ? -1 : static_cast<int64_t>(m[i]);

  Label labels[kTile];
  int64_t y[kTile];
  for (int i = 0; i < kTile; ++i) {
    labels[i] = i < count ? label_of(call, n0 + i) : Label::kNone;
    if (labels[i] == Label::kBad) bad_label.report(n0 + i);
    y[i] = labels[i] == Label::kValid ? call.target[n0 + i] : 0;
  }
  if (values.wants(kLoss)) {
    for (int i = 0; i < count; ++i) {
      const double loss = (t[i] - buffers.z[y[i] * kTile + i]) * inverse_temperature + log1p_tau[i];
      const double value = labels[i] == Label::kIgnored ? 0.0 : tile.bad[i] ? kNan : loss;
      values.put(kLoss, n0 + i, value);
    }
  }
  if (shared.distances == nullptr) return;

  const auto sums_over = [&](const double* distances, double* s, double* total) {
    tile_mean_distances(distances, C, buffers.u, s);
    for (int v = 0; v < kTile; v += kDoubles) {
      DoubleV sum = {};
      for (int64_t j = 0; j < C; ++j) {
        sum += load_unaligned<DoubleV>(buffers.u + j * kTile + v) * load_unaligned<DoubleV>(s + j * kTile + v);
      }
      store_unaligned(total + v, 0.5 * sum);
    }
  };
  const auto explicit_row = [&](int i, int64_t about, bool with_bias) {
    double* z = buffers.row;
    for (int64_t j = 0; j < C; ++j) z[j] = buffers.z[j * kTile + i];
    return explicit_sum(call, with_bias, about, shared.exponent, z, t[i], log1p_tau[i], buffers.row + 2 * C,
                        buffers.row + C);
  };
  const bool gradients = (call.fields & kGradientFields) != 0 && call.target != nullptr;
  if (gradients || !call.include_bias) sums_over(shared.distances, buffers.s, us);
  if (values.wants(kLogNeuronwise)) {
    const double* s = buffers.s;
    const double* pairs = us;
    if (call.include_bias) {
      sums_over(shared.bias_distances, buffers.s_bias, us_bias);
      s = buffers.s_bias;
      pairs = us_bias;
    }
    alignas(64) double inner[kTile];
    for (int i = 0; i < kTile; ++i) {
      const double s_top = m[i] >= 0 ? s[static_cast<int64_t>(m[i]) * kTile + i] : kNan;
      const double inverse = u1[i] > 0 ? 1.0 / u1[i] : 0.0;
      inner[i] = confidence[i] * s_top * inverse + eps[i] * pairs[i] * inverse * inverse;
    }
    for (int v = 0; v < kTile; v += kDoubles) {
      const DoubleV logs = math::log_nonnegative(load_unaligned<DoubleV>(inner + v));
      const DoubleV value = load_unaligned<DoubleV>(log_n_head + v) + load_unaligned<DoubleV>(log_eps + v) + logs;
      store_unaligned(out + v, value - (two_log_t + 2.0 * shared.exponent * kLn2));
    }
    for (int i = 0; i < count; ++i) {
      // Below this the classes that differ from the top one may have underflowed in u.
      if (tile.bad[i] || inner[i] > 1e-250 || log_eps[i] == -math::kInfinity) continue;
      const ExplicitSum sum = explicit_row(i, static_cast<int64_t>(m[i]), call.include_bias);
      out[i] = log_n_head[i] + log_variance(sum, shared.exponent) - two_log_t;
    }
    for (int i = 0; i < count; ++i) {
      // phi = 0 with a value of 0 otherwise: -inf in any order
      if (log_n_head[i] == -math::kInfinity) out[i] = -math::kInfinity;
    }
    put(kLogNeuronwise);
  }
  if (!gradients) {
    if (call.fields & kGradientFields) {
      for (int i = 0; i < count; ++i) put_gradient_norms(values, n0 + i, kNan);
    }
    return;
  }

  const bool only_l2 = (call.fields & kGradientFields) == 1U << kLogGradientNorm;
  const double* s = buffers.s;
  alignas(64) double square[kTile], total[kTile];
  for (int i = 0; i < kTile; ++i) {
    // ||sum_j p_j (w_j - w_y)||^2 from the table; `total` is what the difference was taken from
    square[i] = total[i] = 0.0;
    if (i >= count || tile.bad[i] || labels[i] != Label::kValid) continue;
    const int64_t top = static_cast<int64_t>(m[i]);
    const double inverse = u1[i] > 0 ? 1.0 / u1[i] : 0.0;
    const double pairs = us[i] * inverse * inverse;
    if (y[i] == top) {
      total[i] = s[top * kTile + i] * inverse;
      square[i] = total[i] - pairs;
    } else {
      const double s_top = s[top * kTile + i] * inverse;
      total[i] = confidence[i] * shared.distances[top * C + y[i]] + eps[i] * s[y[i] * kTile + i] * inverse;
      square[i] = total[i] - eps[i] * (confidence[i] * s_top + eps[i] * pairs);
    }
  }
  for (int v = 0; v < kTile; v += kDoubles) {
    store_unaligned(out + v, 0.5 * math::log_nonnegative(load_unaligned<DoubleV>(square + v)));
  }
  // The table is right to about 1e-15, so this share of the total may be left by the difference before digits that a
  // float32 (1e-7) or a float64 result (1e-12) shows are lost.
  const double floor = call.double_compute ? 1e-2 : 1e-6;
  for (int i = 0; i < count; ++i) {
    if (labels[i] == Label::kIgnored) {
      put_gradient_norms(values, n0 + i, -math::kInfinity);
    } else if (tile.bad[i] || labels[i] != Label::kValid) {
      put_gradient_norms(values, n0 + i, kNan);
    } else if (only_l2 && square[i] > floor * total[i] && square[i] > 1e-250) {
      const double scale = y[i] == static_cast<int64_t>(m[i]) ? log_eps[i] : 0.0;
      values.put(kLogGradientNorm, n0 + i, out[i] + scale - shared.exponent * kLn2 - 0.5 * two_log_t);
    } else {
      put_gradient_norms(call, values, n0 + i, explicit_row(i, y[i], false), shared.exponent);
    }
  }
  return;
}

template <class C, class T>
void pack_rows(const HeadMetrics& call, const Layout& layout, C* packed, double* row_sums) {
  const T* w = static_cast<const T*>(call.weight.data);
  parallel_for(call.C * call.D < (1 << 16) ? 1 : call.threads, call.C, [&](int64_t j, int) {
    const T* from = w + j * call.weight.row_stride;
    C* to = packed + j * layout.packed_stride;
    double largest = 0.0;
    for (int64_t d = 0; d < call.D; ++d) {
      to[d] = static_cast<C>(widen(from[d * call.weight.column_stride]));
      const double a = std::fabs(static_cast<double>(to[d]));
      largest = a > largest ? a : largest;
    }
    for (int64_t d = call.D; d < layout.packed_stride; ++d) to[d] = C{};
    row_sums[j] = largest;
  });
}

template <class C>
Outcome run(const HeadMetrics& call) {
  const Layout layout = layout_of(call);
  char* base = static_cast<char*>(call.workspace);
  C* packed = reinterpret_cast<C*>(base + layout.packed);
  double* largest_of_row = reinterpret_cast<double*>(base + layout.row_sums);
  with_element(call.weight.dtype, [&](auto* type) {
    using T = ElementOf<decltype(type)>;
    if constexpr (sizeof(T) <= sizeof(C)) pack_rows<C, T>(call, layout, packed, largest_of_row);
  });
  double largest = 0.0;
  for (int64_t j = 0; j < call.C; ++j) largest = largest_of_row[j] > largest ? largest_of_row[j] : largest;
  if (call.include_bias) {
    for (int64_t j = 0; j < call.C; ++j) {
      const double a = std::fabs(call.bias[j]);
      if (a > largest && a < math::kInfinity) largest = a;
    }
  }
  Shared shared{nullptr, nullptr, scaling_exponent(largest, 1000), 0.0, Values(call)};
  const double scale = std::scalbn(1.0, shared.exponent);

  if (shared.values.wants(kLogLayerwise)) {
    double total = 0.0;
    for (int64_t j = 0; j < call.C; ++j) {
      const C* w = packed + j * layout.packed_stride;
      DoubleV sum = {};
      for (int64_t d = 0; d < layout.packed_stride; d += kDoubles) {
        const DoubleV x = Load<double>::from(w + d) * scale;
        sum += x * x;
      }
      total += sum_lanes(sum);
      if (call.include_bias) total += call.bias[j] * scale * (call.bias[j] * scale);
    }
    shared.log_layer = 0.5 * call.norm_power * (std::log(total) - 2.0 * shared.exponent * kLn2);
  }
  if (call.fields & kWeightFields) {
    double* table = reinterpret_cast<double*>(base + layout.distances);
    constexpr int64_t rows = 8;
    const int threads = call.C * call.C * call.D < (1 << 18) ? 1 : call.threads;
    parallel_for(threads, (call.C + rows - 1) / rows, [&](int64_t task, int) {
      const int64_t last = (task + 1) * rows < call.C ? (task + 1) * rows : call.C;
      distance_rows<double, C>(packed, layout.packed_stride, call.C, layout.packed_stride, scale, task * rows, last,
                               table);
    });
    shared.distances = table;
    if (call.include_bias) {
      double* with_bias = reinterpret_cast<double*>(base + layout.bias_distances);
      for (int64_t j = 0; j < call.C; ++j) {
        for (int64_t k = 0; k < call.C; ++k) {
          const double difference = (call.bias[j] - call.bias[k]) * scale;
          with_bias[j * call.C + k] = table[j * call.C + k] + difference * difference;
        }
      }
      shared.bias_distances = with_bias;
    }
  }

  // Tasks of a few tiles: enough of them to balance threads, large enough (about 20 us) to hide a task's hand-out.
  const int64_t tiles = (call.N + kTile - 1) / kTile;
  const int64_t work = kTile * (call.D + 64) * (call.C + 4);
  const int64_t tiles_per_task = work > (1 << 20) ? 1 : (1 << 20) / work;
  const int64_t per_task =
      tiles_per_task * 2 * call.threads > tiles ? (tiles + 2 * call.threads - 1) / (2 * call.threads) : tiles_per_task;
  const int threads = call.N * (call.D + 64) * (call.C + 4) < (1 << 18) ? 1 : call.threads;
  const int64_t tasks = per_task > 0 ? (tiles + per_task - 1) / per_task : 0;
  FirstBadRow bad_label;
  parallel_for(threads, tasks, [&](int64_t task, int thread) {
    const Buffers buffers(call, layout, thread);
    for (int64_t index = task * per_task; index < (task + 1) * per_task && index < tiles; ++index) {
      TileRows tile{};
      tile.first = index * kTile;
      tile.count = static_cast<int>(call.N - tile.first < kTile ? call.N - tile.first : kTile);
      with_element(call.features.dtype, [&](auto* type) {
        using T = ElementOf<decltype(type)>;
        if constexpr (sizeof(T) <= sizeof(C)) tile_products<C, T>(call, layout, buffers, tile);
      });
      if (call.logits.data != nullptr) tile_given_logits(call, buffers, tile);
      tile_statistics(call, shared, buffers, tile, bad_label);
    }
  });
  return bad_label.outcome();
}

}  // namespace

Outcome head_metrics(const HeadMetrics& call) { return call.double_compute ? run<double>(call) : run<float>(call); }

}  // namespace FLATCORE_TARGET

#if defined(FLATCORE_TARGET_baseline)
int64_t head_metrics_workspace(const HeadProblem& problem) { return layout_of(problem).total + 64; }
#endif

}  // namespace flatcore::cpu
