// head_metrics, small heads: every statistic of every row from one fused read of the features.
//
// Who allocates: the caller, outputs and workspace; both are overwritten. Inputs may not overlap them. 64-bit offsets.
//
// Numerics: products and ||phi||^2 in float32 (float64 if an input is), at most 64 terms per lane before the sums are
// carried into float64; after the product float64, or, where inputs and results are float32, float lanes as far as the
// contract carries float (head_lanes.h says how far). Distances between rows of W are summed from differences in
// float64. No 1 - p, no 1 - sum p^2 and no difference of squares: math/epsilon_split.h. Rows that are not ordinary in
// lanes are done again in float64; of these, rows whose ||phi||^2 leaves the range of float, and rows where a sum over
// the table of distances would cancel (duplicated or nearly duplicated rows of W), explicitly.
//
// Cost: N*D elements of features read once, 2NDC + 2ND operations for the products, about 25 C per row for the softmax,
// and 2NC^2 where distances are needed. W is packed once per call.
// A row's value depends on nothing but the row: neighbours, thread count and position leave every bit as it is.
//
// Ladder and measurements: docs/performance.md.
#include "cpu/head_metrics.h"

#include <cstring>

#include "cpu/head_lanes.h"
#include "cpu/head_tile.h"
#include "math/table_rows.h"

namespace flatcore::cpu {

namespace {

struct Layout {
  int64_t packed_stride;  // elements of a packed row of W
  int64_t lane_table;     // bytes of a table of distances in float
  // byte offsets
  int64_t packed, distances, bias_distances, row_sums, lanes, threads, per_thread, total;
};

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
  layout.lanes = at;
  layout.lane_table = align(problem.C * problem.C * 4);
  if (lanes_apply(problem))
    at += align(problem.C * 4) + (table ? (problem.include_bias ? 2 : 1) * layout.lane_table : 0);
  layout.threads = at;
  // logits, u and mean distances of a tile (with and without the bias), and scratch for explicit rows
  layout.per_thread = align((4 * problem.C * kTile + 2 * problem.C + problem.D + 8) * 8) +
                      align(kTile * problem.D * 8) + align(kTile * 64) + align(4 * problem.C * kTile * 4);
  layout.total = at + layout.per_thread * problem.threads;
  return layout;
}

}  // namespace

namespace FLATCORE_TARGET {
namespace {

// One thread's buffers.
struct Buffers : TileBuffers {
  double* s;       // (C, kTile) sum_k D_jk u_k
  double* s_bias;  // the same for the bias's distances
  double* row;     // 2 C + D: scratch for explicit rows
  LaneBuffers lanes;

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
    lanes.z = reinterpret_cast<float*>(base + align(kTile * call.D * 8) + align(kTile * 64));
    lanes.u = lanes.z + call.C * kTile;
    lanes.s = lanes.u + call.C * kTile;
    lanes.s_bias = lanes.s + call.C * kTile;
  }
};

// What a whole call shares.
struct Shared {
  const double* distances;       // (C, C), times 2^(2 exponent); null if not needed
  const double* bias_distances;  // the same with the bias as a column; null unless include_bias
  int exponent;
  double log_layer;  // norm_power log ||W||_F
  Values values;
  Lanes lanes;
};

void tile_statistics(const HeadMetrics& call, const Shared& shared, const Buffers& buffers, TileRows& tile,
                     FirstBadRow& bad_label) {
  const int64_t C = call.C;
  const double inverse_temperature = 1.0 / call.temperature;
  const double two_log_t = 2.0 * std::log(call.temperature);
  alignas(64) double us[kTile], us_bias[kTile];
  TileSoftmax softmax;
  tile_softmax(call, buffers, tile, softmax);
  const auto& [t, m, r, u1, u2, margin, confidence, eps, log_eps, log1p_tau, log_one_minus_sum_p2] = softmax;

  const int64_t n0 = tile.first;
  const int count = tile.count;
  const Values& values = shared.values;
  alignas(64) double log_n_head[kTile], out[kTile];
  for (int i = 0; i < kTile; ++i) {
    log_n_head[i] = log_head_square(tile.log_n[i], call.include_bias);
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
    for (int i = 0; i < kTile; ++i) out[i] = log_n_head[i] + log_one_minus_sum_p2[i] - two_log_t;
    put(kLogHessianTrace);
  }
  if (values.wants(kLogLayerwise)) {
    for (int i = 0; i < kTile; ++i) out[i] = log_n_head[i] + log_one_minus_sum_p2[i] - two_log_t + shared.log_layer;
    put(kLogLayerwise);
  }
  if (call.prediction != nullptr) {
    for (int i = 0; i < count; ++i) call.prediction[n0 + i] = tile.bad[i] ? -1 : static_cast<int64_t>(m[i]);
  }

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
  const auto explicit_row = [&](int i, int64_t anchor, bool with_bias, bool with_spread) {
    double* z = buffers.row;
    for (int64_t j = 0; j < C; ++j) z[j] = buffers.z[j * kTile + i];
    return explicit_sum(call, with_bias, anchor, shared.exponent, z, t[i], log1p_tau[i], with_spread,
                        buffers.row + 2 * C, buffers.row + C);
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
      inner[i] = math::table_variance(confidence[i], s_top * inverse, eps[i], pairs[i] * inverse * inverse);
    }
    for (int v = 0; v < kTile; v += kDoubles) {
      const DoubleV logs = math::log_nonnegative(load_unaligned<DoubleV>(inner + v));
      const DoubleV value = load_unaligned<DoubleV>(log_n_head + v) + load_unaligned<DoubleV>(log_eps + v) + logs;
      store_unaligned(out + v, value - (two_log_t + 2.0 * shared.exponent * kLn2));
    }
    for (int i = 0; i < count; ++i) {
      // Below this the classes that differ from the top one may have underflowed in u.
      if (tile.bad[i] || math::table_variance_is_in_range(inner[i]) || log_eps[i] == -math::kInfinity) continue;
      const ExplicitSum sum = explicit_row(i, static_cast<int64_t>(m[i]), call.include_bias, true);
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
    const auto found = math::table_gradient(y[i] == top, confidence[i], eps[i], s[top * kTile + i] * inverse,
                                            s[y[i] * kTile + i] * inverse, shared.distances[top * C + y[i]], pairs);
    total[i] = found.total;
    square[i] = found.square;
  }
  for (int v = 0; v < kTile; v += kDoubles) {
    store_unaligned(out + v, 0.5 * math::log_nonnegative(load_unaligned<DoubleV>(square + v)));
  }
  for (int i = 0; i < count; ++i) {
    if (labels[i] == Label::kIgnored) {
      put_gradient_norms(values, n0 + i, -math::kInfinity);
    } else if (tile.bad[i] || labels[i] != Label::kValid) {
      put_gradient_norms(values, n0 + i, kNan);
    } else if (only_l2 && math::table_gradient_is_left(square[i], total[i], call.double_compute)) {
      const double scale = y[i] == static_cast<int64_t>(m[i]) ? log_eps[i] : 0.0;
      values.put(kLogGradientNorm, n0 + i, out[i] + scale - shared.exponent * kLn2 - 0.5 * two_log_t);
    } else {
      put_gradient_norms(call, values, n0 + i, explicit_row(i, y[i], false, false), shared.exponent);
    }
  }
  return;
}

// The lanes' side of what a call shares; off where anything about the call is beyond them.
Lanes lanes_of(const HeadMetrics& call, const Shared& shared, const Layout& layout) {
  Lanes lanes;
  if (!lanes_apply(call)) return lanes;
  char* base = static_cast<char*>(call.workspace) + layout.lanes;
  lanes.on = true;
  lanes.given = call.logits.data != nullptr;
  lanes.inverse_temperature = 1.0 / call.temperature;
  lanes.two_log_t = 2.0 * std::log(call.temperature);
  lanes.temperature = math::FloatTemperature(call.temperature, kLeastExponent);
  if (call.bias != nullptr) {
    if (!lanes.given) lanes.bias = reinterpret_cast<float*>(base);
    lanes.on &= narrow_bias(call.bias, call.C, reinterpret_cast<float*>(base));
  }
  base += align(call.C * 4);
  if (shared.distances != nullptr) {
    lanes.distances = reinterpret_cast<float*>(base);
    lanes.on &= narrow_distances(shared.distances, call.C, lanes.distances, lanes.log_distance);
  }
  if (shared.bias_distances != nullptr) {
    lanes.bias_distances = reinterpret_cast<float*>(base + layout.lane_table);
    lanes.on &= narrow_distances(shared.bias_distances, call.C, lanes.bias_distances, lanes.log_bias_distance);
  }
  return lanes;
}

// A tile whose logits are in buffers.lanes.z: float's values where a row is ordinary, float64's where it is not.
void tile_in_lanes(const HeadMetrics& call, const Shared& shared, const Buffers& buffers, TileRows& tile,
                   FirstBadRow& bad_label) {
  const int64_t n0 = tile.first;
  const int count = tile.count;
  LaneLabels labels;
  for (int i = 0; i < kTile; ++i) {
    labels.kind[i] = i < count ? label_of(call, n0 + i) : Label::kNone;
    if (labels.kind[i] == Label::kBad) bad_label.report(n0 + i);
    labels.y[i] = labels.kind[i] == Label::kValid ? static_cast<int32_t>(call.target[n0 + i]) : 0;
  }
  LaneSoftmax softmax;
  LaneValues out;
  lane_values(call, shared.lanes, shared.log_layer, shared.exponent, buffers.lanes, tile, labels, softmax, out);
  bool all = true;
  for (int i = 0; i < count; ++i) {
    if (tile.bad[i]) softmax.ordinary[i] = 0;
    all &= softmax.ordinary[i] != 0;
  }
  if (!all) {
    for (int64_t j = 0; j < call.C * kTile; ++j) buffers.z[j] = static_cast<double>(buffers.lanes.z[j]);
    tile_statistics(call, shared, buffers, tile, bad_label);
  }
  for (int field = 0; field < kFieldCount; ++field) {
    if ((call.fields >> field & 1U) == 0) continue;
    if (all) {
      shared.values.put(static_cast<Field>(field), n0, out.at[field], count);
      continue;
    }
    for (int i = 0; i < count; ++i) {
      if (softmax.ordinary[i] != 0) shared.values.put(static_cast<Field>(field), n0 + i, out.at[field] + i, 1);
    }
  }
  if (call.prediction == nullptr) return;
  for (int i = 0; i < count; ++i) {
    if (softmax.ordinary[i] != 0) call.prediction[n0 + i] = softmax.m[i];
  }
}

template <class C>
Outcome run(const HeadMetrics& call) {
  const Layout layout = layout_of(call);
  char* base = static_cast<char*>(call.workspace);
  C* packed = reinterpret_cast<C*>(base + layout.packed);
  double* largest_of_row = reinterpret_cast<double*>(base + layout.row_sums);
  Shared shared{nullptr, nullptr,      pack_weight(call, layout.packed_stride, packed, largest_of_row),
                0.0,     Values(call), {}};
  const double scale = std::scalbn(1.0, shared.exponent);

  if (shared.values.wants(kLogLayerwise)) {
    const double total = sum_of_squares(call, packed, layout.packed_stride, scale);
    shared.log_layer = 0.5 * call.norm_power * (std::log(total) - 2.0 * shared.exponent * kLn2);
  }
  if (call.fields & kWeightFields) {
    double* table = reinterpret_cast<double*>(base + layout.distances);
    double* with_bias =
        call.include_bias ? reinterpret_cast<double*>(base + layout.bias_distances) : static_cast<double*>(nullptr);
    distance_tables(call, packed, layout.packed_stride, scale, table, with_bias);
    shared.distances = table;
    shared.bias_distances = with_bias;
  }

  shared.lanes = lanes_of(call, shared, layout);

  // Tasks of a few tiles: enough of them to balance threads, large enough (about 80 us) to hide a task's hand-out
  // and the rows at its end that are fetched for nobody.
  const int64_t tiles = (call.N + kTile - 1) / kTile;
  const int64_t work = kTile * (call.D + 64) * (call.C + 4);
  const int64_t tiles_per_task = work > (1 << 22) ? 1 : (1 << 22) / work;
  const int64_t per_task =
      tiles_per_task * 2 * call.threads > tiles ? (tiles + 2 * call.threads - 1) / (2 * call.threads) : tiles_per_task;
  const int threads = call.N * (call.D + 64) * (call.C + 4) < (1 << 18) ? 1 : call.threads;
  const int64_t tasks = per_task > 0 ? (tiles + per_task - 1) / per_task : 0;
  FirstBadRow bad_label;
  parallel_for(threads, tasks, [&](int64_t task, int thread) {
    const Buffers buffers(call, layout, thread);
    float* narrow = shared.lanes.on ? buffers.lanes.z : nullptr;
    for (int64_t index = task * per_task; index < (task + 1) * per_task && index < tiles; ++index) {
      TileRows tile{};
      tile.first = index * kTile;
      tile.count = static_cast<int>(call.N - tile.first < kTile ? call.N - tile.first : kTile);
      with_element(call.features.dtype, [&](auto* type) {
        using T = ElementOf<decltype(type)>;
        if constexpr (sizeof(T) <= sizeof(C)) {
          tile_products<C, T>(call, packed, layout.packed_stride, buffers, tile, narrow);
        }
      });
      if (call.logits.data != nullptr) {
        if (narrow != nullptr) {
          tile_given_logits(call, narrow, tile);
        } else {
          tile_given_logits(call, buffers.z, tile);
        }
      }
      if (narrow != nullptr) {
        tile_in_lanes(call, shared, buffers, tile, bad_label);
      } else {
        tile_statistics(call, shared, buffers, tile, bad_label);
      }
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
