// head_metrics_backward, small heads: the gradients of features, weight, bias and logits from one fused read of the
// features. Nothing of the forward pass is needed but the inputs: the logits are formed again (2NDC operations), which
// costs less than keeping N x C numbers.
//
// Who allocates: the caller, outputs and workspace; both are overwritten. Inputs may not overlap them. 64-bit offsets.
//
// Numerics: products in the compute type; statistics and the logits' cotangent in float64, relative to the value
// (math/measure_cotangent.h), so that it does not vanish with confidence. W's gradient sums at most 512 rows in the
// compute type before they are carried into float64. The part of neuronwise's gradient that does not pass through the
// logits is sum_k M_ik (w_i - w_k), M_ik = sum_n 2 c_n p_ni p_nk/V_n: the (C, C) matrix M takes N C^2 operations
// and differences of rows are taken once, however many samples there are.
//
// Cost: 6NDC operations (logits, features' and weight's gradient), about 40 C per row in float64, for neuronwise 3NC^2
// more; a gradient norm 8NDC more in float64. Rows are split into as many groups as there are threads, each in order,
// so that two runs with equal thread counts agree bit for bit. By measure: head_backward_variance.h and
// head_backward_gradient_norm.h have the rows that the tile's plain sums would lose.
#include "cpu/head_metrics_backward.h"

#include "cpu/head_backward_gradient_norm.h"
#include "cpu/head_backward_variance.h"
#include "math/measure_cotangent.h"
#include "math/table_rows.h"

namespace flatcore::cpu {
namespace FLATCORE_TARGET {
namespace {

constexpr int64_t kFoldRows = 512;

// out[i][d] += sum_k a[k][i] b[k][d] for RB rows and DB vectors.
template <class C, int RB, int DB>
FLATCORE_INLINE void outer_block(const C* a, int64_t a_k, int64_t a_row, const C* b, int64_t b_stride, int64_t K,
                                 C* out, int64_t out_stride) {
  using V = typename VectorOf<C>::Type;
  constexpr int lanes = VectorOf<C>::kLanes;
  V sum[RB][DB];
#pragma GCC unroll 4
  for (int i = 0; i < RB; ++i) {
#pragma GCC unroll 2
    for (int d = 0; d < DB; ++d) sum[i][d] = load_unaligned<V>(out + i * out_stride + d * lanes);
  }
  for (int64_t k = 0; k < K; ++k) {
    V row[DB];
#pragma GCC unroll 2
    for (int d = 0; d < DB; ++d) row[d] = load_unaligned<V>(b + k * b_stride + d * lanes);
#pragma GCC unroll 4
    for (int i = 0; i < RB; ++i) {
      const C factor = a[k * a_k + i * a_row];
#pragma GCC unroll 2
      for (int d = 0; d < DB; ++d) sum[i][d] += factor * row[d];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < RB; ++i) {
#pragma GCC unroll 2
    for (int d = 0; d < DB; ++d) store_unaligned(out + i * out_stride + d * lanes, sum[i][d]);
  }
}

template <class C, int RB>
FLATCORE_INLINE void outer_rows(const C* a, int64_t a_k, int64_t a_row, const C* b, int64_t b_stride, int64_t K, C* out,
                                int64_t out_stride, int64_t width) {
  constexpr int lanes = VectorOf<C>::kLanes;
  int64_t d = 0;
  for (; d + 2 * lanes <= width; d += 2 * lanes) {
    outer_block<C, RB, 2>(a, a_k, a_row, b + d, b_stride, K, out + d, out_stride);
  }
  if (d < width) outer_block<C, RB, 1>(a, a_k, a_row, b + d, b_stride, K, out + d, out_stride);
}

// out (rows, width) += A^T B over K, with A's element (k, i) at a[k a_k + i a_row]; width is a number of whole vectors.
template <class C>
void add_outer(const C* a, int64_t a_k, int64_t a_row, const C* b, int64_t b_stride, int64_t K, C* out,
               int64_t out_stride, int64_t rows, int64_t width) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    outer_rows<C, 4>(a + i * a_row, a_k, a_row, b, b_stride, K, out + i * out_stride, out_stride, width);
  }
  for (; i + 2 <= rows; i += 2) {
    outer_rows<C, 2>(a + i * a_row, a_k, a_row, b, b_stride, K, out + i * out_stride, out_stride, width);
  }
  if (i < rows) outer_rows<C, 1>(a + i * a_row, a_k, a_row, b, b_stride, K, out + i * out_stride, out_stride, width);
}

struct TileUpstream {
  alignas(64) double c[kTile];  // 0 where the row adds nothing
  bool live[kTile];
  bool poisoned[kTile];
  RowUpstream row[kTile];

  void drop(int i) {
    c[i] = 0.0;
    live[i] = false;
  }
};

// Copies the tile's rows into the compute type; rows that add nothing become zeros, whatever stands in them.
template <class C, class T>
void gather_rows(const HeadProblem& call, int64_t first, int count, const bool* live, C* rows, int64_t stride) {
  constexpr int lanes = VectorOf<C>::kLanes;
  const T* x = static_cast<const T*>(call.features.data);
  const int64_t step = call.features.column_stride;
  for (int i = 0; i < kTile; ++i) {
    C* to = rows + i * stride;
    int64_t d = 0;
    if (i < count && live[i]) {
      const T* from = x + (first + i) * call.features.row_stride;
      if (step == 1) {
        for (; d + lanes <= call.D; d += lanes) store_unaligned(to + d, Load<C>::from(from + d));
      }
      for (; d < call.D; ++d) to[d] = static_cast<C>(widen(from[d * step]));
    }
    for (; d < stride; ++d) to[d] = C{};
  }
}

template <class C>
void tile_backward(const HeadMetricsBackward& call, const BackwardLayout& layout, const SharedBackward<C>& shared,
                   Group<C>& group, int64_t first, int count) {
  const int64_t classes = call.C, stride = layout.stride;
  const bool given = call.logits.data != nullptr;
  const bool is_gradient = (call.fields & kGradientFields) != 0;
  const double inverse_temperature = 1.0 / call.temperature;
  TileUpstream up{};
  bool any = false;
  for (int i = 0; i < count; ++i) {
    up.row[i] = row_upstream(call, first + i);
    up.c[i] = up.row[i].c;
    up.live[i] = up.row[i].live;
    any |= up.live[i];
  }
  if (any || call.d_features != nullptr) {
    with_element(call.features.dtype, [&](auto* type) {
      using T = ElementOf<decltype(type)>;
      if constexpr (sizeof(T) <= sizeof(C)) gather_rows<C, T>(call, first, count, up.live, group.rows, stride);
    });
  }
  for (int64_t j = 0; j < classes * kTile; ++j) group.g[j] = 0.0;
  alignas(64) double factor[kTile] = {};  // of the features themselves
  TileRows tile{};
  TileSoftmax softmax;
  if (any) {
    // the gathered rows as a problem of their own, padded columns and all
    HeadProblem rows = call;
    rows.features = {group.rows, stride, 1, sizeof(C) == 8 ? Dtype::kFloat64 : Dtype::kFloat32};
    rows.D = stride;
    rows.N = kTile;
    tile.first = 0;
    tile.count = kTile;
    tile_products<C, C>(rows, shared.packed, stride, group.tile, tile);
    tile.first = first;
    tile.count = count;
    if (given) tile_given_logits(call, group.tile.z, tile);
    tile_softmax(call, group.tile, tile, softmax);
    if (is_gradient) std::memset(static_cast<void*>(group.k_compute), 0, classes * kTile * sizeof(C));
    if (is_gradient) std::memset(static_cast<void*>(group.dual), 0, kTile * stride * sizeof(C));

    alignas(64) double log_n[kTile];
    for (int i = 0; i < kTile; ++i) {
      log_n[i] = log_head_square(tile.log_n[i], call.include_bias);
      if (!up.live[i]) continue;
      up.poisoned[i] = tile.bad[i] || up.c[i] != up.c[i];
      if (is_gradient && label_of(call, first + i) != Label::kValid) up.poisoned[i] = true;
      group.poisoned |= up.poisoned[i];
      const bool zero = !is_gradient && (log_n[i] == -math::kInfinity || softmax.log_eps[i] == -math::kInfinity ||
                                         shared.log_square == -math::kInfinity);
      if (up.poisoned[i] || zero) up.drop(i);
      if (up.poisoned[i]) {
        for (int64_t d = 0; d < stride; ++d) group.rows[i * stride + d] = C{};
      }
    }

    if (shared.field == kLogNeuronwise) {
      tile_mean_distances(shared.distances, classes, group.tile.u, group.s);
      std::memset(group.left, 0, kTile * layout.classes_stride * sizeof(double));
      std::memset(group.right, 0, kTile * layout.classes_stride * sizeof(double));
      alignas(64) double pairs[kTile];
      for (int v = 0; v < kTile; v += kDoubles) {
        DoubleV sum = {};
        for (int64_t j = 0; j < classes; ++j) {
          sum +=
              load_unaligned<DoubleV>(group.tile.u + j * kTile + v) * load_unaligned<DoubleV>(group.s + j * kTile + v);
        }
        store_unaligned(pairs + v, 0.5 * sum);
      }
      for (int i = 0; i < kTile; ++i) {
        if (!up.live[i]) continue;
        const int64_t top = static_cast<int64_t>(softmax.m[i]);
        const double share = softmax.eps[i] / softmax.u1[i];
        const double inner = math::table_variance(softmax.confidence[i], group.s[top * kTile + i], share, pairs[i]);
        double* left = group.left + i * layout.classes_stride;
        double* right = group.right + i * layout.classes_stride;
        // below this the classes that differ from the top one may have underflowed in u
        if (!math::table_variance_is_in_range(inner)) {
          if (!variance_of_row(call, shared, group, i, top, softmax.t[i], softmax.confidence[i], up.c[i],
                               layout.classes_stride)) {
            up.drop(i);
          }
          continue;
        }
        const auto form = math::variance_cotangent<double>(softmax.confidence[i], share, inner);
        const double scale = up.c[i] * inverse_temperature, pair = up.c[i] * form.inverse;
        const double* from_top = shared.distances + top * classes;
        for (int64_t j = 0; j < classes; ++j) {
          const double u = group.tile.u[j * kTile + i];
          group.g[j * kTile + i] = scale * form.rest(u, from_top[j], group.s[j * kTile + i]);
          left[j] = pair * share * u;
          right[j] = u;
        }
        group.g[top * kTile + i] = scale * form.top(group.s[top * kTile + i]);
        left[top] = 2.0 * pair * softmax.confidence[i];
      }
      add_outer<double>(group.left, layout.classes_stride, 1, group.right, layout.classes_stride, kTile, group.pairs,
                        layout.classes_stride, classes, layout.classes_stride);
    } else if (is_gradient) {
      for (int i = 0; i < kTile; ++i) {
        if (!up.live[i]) continue;
        if (!gradient_norm_of_row(call, shared, group, i, call.target[first + i], static_cast<int64_t>(softmax.m[i]),
                                  softmax.t[i], softmax.confidence[i], up.row[i], stride)) {
          up.drop(i);
        }
      }
    } else {
      for (int v = 0; v < kTile; v += kDoubles) {
        const DoubleV c = load_unaligned<DoubleV>(up.c + v);
        const DoubleV u1 = load_unaligned<DoubleV>(softmax.u1 + v);
        const DoubleV inverse = u1 > 0.0 ? 1.0 / u1 : DoubleV{};
        const DoubleV s2 = load_unaligned<DoubleV>(softmax.u2 + v) * inverse * inverse;
        const auto form = math::trace_cotangent<DoubleV>(load_unaligned<DoubleV>(softmax.confidence + v),
                                                         load_unaligned<DoubleV>(softmax.eps + v), s2);
        const DoubleV m = load_unaligned<DoubleV>(softmax.m + v);
        const DoubleV scale = c * inverse_temperature;
        for (int64_t j = 0; j < classes; ++j) {
          const DoubleV rest = form.rest(load_unaligned<DoubleV>(group.tile.u + j * kTile + v) * inverse);
          const DoubleV value = scale * (m == static_cast<double>(j) ? form.top : rest);
          store_unaligned(group.g + j * kTile + v, c == 0.0 ? DoubleV{} : value);
        }
      }
    }
    for (int i = 0; i < kTile; ++i) {
      group.bias[classes] += up.c[i];
      if (!is_gradient && up.c[i] != 0.0) factor[i] = 2.0 * up.c[i] * std::exp(-log_n[i]);
    }
    for (int64_t j = 0; j < classes * kTile; ++j) group.g_compute[j] = static_cast<C>(group.g[j]);
  }

  if (call.d_features != nullptr) {
    C* to = static_cast<C*>(call.d_features) + first * call.D;
    const bool in_place = stride == call.D && count == kTile;
    C* out = in_place ? to : group.out;
    // outside this range the factor leaves the compute type, or log ||phi||^2 the range of exp
    constexpr double largest = sizeof(C) == 4 ? 1e30 : 1e250;
    for (int i = 0; i < kTile; ++i) {
      const double size = std::fabs(factor[i]);
      const bool plain = size < largest && (size > 1.0 / largest || size == 0.0);
      const C small = plain ? static_cast<C>(factor[i]) : C{};
      for (int64_t d = 0; d < stride; ++d) out[i * stride + d] = small * group.rows[i * stride + d];
      if (plain) continue;
      const double log_n = log_head_square(tile.log_n[i], call.include_bias);
      const double half = std::exp(-0.5 * log_n);
      for (int64_t d = 0; d < call.D; ++d) {
        out[i * stride + d] =
            static_cast<C>(2.0 * up.c[i] * half * (half * static_cast<double>(group.rows[i * stride + d])));
      }
    }
    if (any && !given) {
      add_outer<C>(group.g_compute, kTile, 1, shared.packed, stride, classes, out, stride, kTile, stride);
    }
    for (int i = 0; i < count; ++i) {
      if (!in_place) std::memcpy(to + i * call.D, out + i * stride, static_cast<size_t>(call.D) * sizeof(C));
      if (up.poisoned[i]) {
        for (int64_t d = 0; d < call.D; ++d) to[i * call.D + d] = static_cast<C>(kNan);
      }
    }
  }
  if (call.d_logits != nullptr) {
    C* to = static_cast<C*>(call.d_logits) + first * classes;
    for (int i = 0; i < count; ++i) {
      for (int64_t j = 0; j < classes; ++j) {
        to[i * classes + j] = static_cast<C>(up.poisoned[i] ? kNan : group.g[j * kTile + i]);
      }
    }
  }
  if (!any) return;
  if (!given) {
    if (call.d_weight != nullptr) {
      add_outer<C>(group.g_compute, 1, kTile, group.rows, stride, kTile, group.weight, stride, classes, stride);
    }
    for (int64_t j = 0; j < classes; ++j) {
      for (int i = 0; i < kTile; ++i) group.bias[j] += group.g[j * kTile + i];
    }
  }
  if (is_gradient && call.d_weight != nullptr) {
    add_outer<C>(group.k_compute, 1, kTile, group.dual, stride, kTile, group.weight, stride, classes, stride);
  }
}

// Carries the compute type's sums into float64.
template <class C>
void fold_weight(const BackwardLayout& layout, int64_t classes, Group<C>& group) {
  for (int64_t i = 0; i < classes * layout.stride; ++i) {
    group.weight_total[i] = (group.folded ? group.weight_total[i] : 0.0) + static_cast<double>(group.weight[i]);
    group.weight[i] = C{};
  }
  group.folded = true;
  group.since_fold = 0;
}

template <class C>
void run(const HeadMetricsBackward& call) {
  const BackwardLayout layout = backward_layout(call);
  char* base = static_cast<char*>(call.workspace);
  const int64_t classes = call.C, stride = layout.stride;
  C* packed = reinterpret_cast<C*>(base + layout.packed);
  SharedBackward<C> shared{kLogHessianTrace, packed, nullptr, 0, 0.0};
  for (int bit = 0; bit < kFieldCount; ++bit) {
    if (call.fields >> bit & 1U) shared.field = static_cast<Field>(bit);
  }
  shared.exponent = pack_weight(call, stride, packed, reinterpret_cast<double*>(base + layout.row_sums));
  const double scale = std::scalbn(1.0, shared.exponent);
  double square = 0.0;  // ||2^e W||_F^2
  if (shared.field == kLogLayerwise) {
    square = sum_of_squares(call, packed, stride, scale);
    shared.log_square = std::log(square);
  }
  if (shared.field == kLogNeuronwise) {
    double* table = reinterpret_cast<double*>(base + layout.distances);
    double* with_bias =
        call.include_bias ? reinterpret_cast<double*>(base + layout.bias_distances) : static_cast<double*>(nullptr);
    distance_tables(call, packed, stride, scale, table, with_bias);
    shared.distances = with_bias != nullptr ? with_bias : table;
  }

  const int64_t tiles = (call.N + kTile - 1) / kTile;
  const int64_t work = call.N * (call.D + 64) * (classes + 4);
  int64_t count = work < (1 << 17) ? 1 : call.threads;
  if (count > tiles) count = tiles > 0 ? tiles : 1;
  std::atomic<bool> poisoned{false};
  std::atomic<int64_t> folded{0};  // bit per group: more than 63 groups fold always
  parallel_for(static_cast<int>(count), count, [&](int64_t index, int) {
    Group<C> group(call, layout, index);
    std::memset(static_cast<void*>(group.weight), 0, classes * stride * sizeof(C));
    std::memset(group.bias, 0, (classes + 1) * sizeof(double));
    if (shared.field == kLogNeuronwise) {
      std::memset(group.pairs, 0, classes * layout.classes_stride * sizeof(double));
    }
    const int64_t from = index * tiles / count, to = (index + 1) * tiles / count;
    for (int64_t tile = from; tile < to; ++tile) {
      const int64_t first = tile * kTile;
      tile_backward(call, layout, shared, group, first,
                    static_cast<int>(call.N - first < kTile ? call.N - first : kTile));
      group.since_fold += kTile;
      if (group.since_fold >= kFoldRows) fold_weight(layout, classes, group);
    }
    if (group.folded || index >= 63) {
      fold_weight(layout, classes, group);
      if (index < 63) folded |= int64_t{1} << index;
    }
    if (group.poisoned) poisoned = true;
  });

  // the groups in order
  Group<C> sum(call, layout, 0);
  for (int64_t index = 1; index < count; ++index) {
    const Group<C> group(call, layout, index);
    for (int64_t j = 0; j <= classes; ++j) sum.bias[j] += group.bias[j];
    if (shared.field != kLogNeuronwise) continue;
    for (int64_t i = 0; i < classes * layout.classes_stride; ++i) sum.pairs[i] += group.pairs[i];
  }
  const double poison = poisoned ? kNan : 0.0;
  const double layer = shared.field == kLogLayerwise && shared.log_square != -math::kInfinity
                           ? call.norm_power * sum.bias[classes] / square * scale
                           : 0.0;
  const int threads = classes * call.D * (shared.distances ? classes : 1) < (1 << 17) ? 1 : call.threads;
  parallel_for(threads, classes, [&](int64_t j, int) {
    const C* wj = packed + j * stride;
    const double bj = call.bias != nullptr && call.include_bias ? call.bias[j] : 0.0;
    double d_bias = sum.bias[j] + poison;
    if (call.include_bias) d_bias += layer * (bj * scale);
    if (call.d_weight != nullptr) {
      double* total = sum.weight_total + j * stride;  // group 0's row becomes the sum over all groups
      for (int64_t index = 0; index < count; ++index) {
        const Group<C> group(call, layout, index);
        const bool wide = index >= 63 || (folded >> index & 1) != 0;
        const C* compute = group.weight + j * stride;
        const double* carried = group.weight_total + j * stride;
        for (int64_t d = 0; d < stride; d += kDoubles) {
          const DoubleV part = wide ? load_unaligned<DoubleV>(carried + d) : Load<double>::from(compute + d);
          const DoubleV before = index > 0 ? load_unaligned<DoubleV>(total + d) : DoubleV{};
          store_unaligned(total + d, before + part);
        }
      }
      if (layer != 0.0) {
        for (int64_t d = 0; d < stride; d += kDoubles) {
          const DoubleV part = load_unaligned<DoubleV>(total + d) + layer * (Load<double>::from(wj + d) * scale);
          store_unaligned(total + d, part);
        }
      }
    }
    if (shared.distances != nullptr) {
      for (int64_t k = 0; k < classes; ++k) {
        const double factor =
            (sum.pairs[j * layout.classes_stride + k] + sum.pairs[k * layout.classes_stride + j]) * scale;
        if (k == j || factor == 0.0) continue;
        if (call.include_bias) d_bias += factor * ((bj - call.bias[k]) * scale);
        if (call.d_weight == nullptr) continue;
        double* total = sum.weight_total + j * stride;
        const C* wk = packed + k * stride;
        for (int64_t d = 0; d < stride; d += kDoubles) {
          const DoubleV difference = (Load<double>::from(wj + d) - Load<double>::from(wk + d)) * scale;
          store_unaligned(total + d, load_unaligned<DoubleV>(total + d) + factor * difference);
        }
      }
    }
    if (call.d_bias != nullptr) call.d_bias[j] = d_bias;
    if (call.d_weight != nullptr) {
      const double* total = sum.weight_total + j * stride;
      C* to = static_cast<C*>(call.d_weight) + j * call.D;
      for (int64_t d = 0; d < call.D; ++d) to[d] = static_cast<C>(total[d] + poison);
    }
  });
}

}  // namespace

void head_metrics_backward(const HeadMetricsBackward& call) {
  if (call.double_compute) {
    run<double>(call);
  } else {
    run<float>(call);
  }
}

}  // namespace FLATCORE_TARGET

#if defined(FLATCORE_TARGET_baseline)
int64_t head_metrics_backward_workspace(const HeadProblem& problem) { return backward_layout(problem).total + 64; }
#endif

}  // namespace flatcore::cpu
