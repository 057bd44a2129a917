// The memory of the fused gradient: where everything lies in the workspace, and one thread's group of rows.
#pragma once

#include "cpu/head_metrics_backward.h"
#include "cpu/head_tile.h"

namespace flatcore::cpu {

struct BackwardLayout {
  int64_t stride;          // elements of a padded row of D
  int64_t classes_stride;  // doubles of a padded row of C
  int64_t packed, distances, bias_distances, row_sums, groups;
  // of a group
  int64_t tile_rows, tile_out, tile_dual, tile_doubles, tile_compute, row_scratch, pair_left, pair_right, pairs, weight,
      weight_total, bias;
  int64_t per_group, total;
};

FLATCORE_INLINE BackwardLayout backward_layout(const HeadProblem& problem) {
  BackwardLayout layout{};
  const int64_t element = problem.double_compute ? 8 : 4;
  const int64_t C = problem.C;
  const bool gradient = (problem.fields & kGradientFields) != 0;
  const bool neuronwise = (problem.fields >> kLogNeuronwise & 1U) != 0;
  layout.stride = align(problem.D * element) / element;
  layout.classes_stride = align(C * 8) / 8;
  int64_t at = 0;
  const auto place = [&at](int64_t bytes) {
    const int64_t from = at;
    at += align(bytes);
    return from;
  };
  const int64_t row = layout.stride * element;
  layout.packed = place(C * row);
  layout.distances = place(neuronwise ? C * C * 8 : 0);
  layout.bias_distances = place(neuronwise && problem.include_bias ? C * C * 8 : 0);
  layout.row_sums = place(C * 8);
  layout.groups = at;
  at = 0;
  layout.tile_rows = place(kTile * row);
  layout.tile_out = place(kTile * row);
  layout.tile_dual = place(gradient ? kTile * row : 0);
  layout.tile_doubles = place(4 * C * kTile * 8);
  layout.tile_compute = place(2 * C * kTile * element);
  layout.row_scratch = place((2 * C + 2 * layout.stride) * 8);
  layout.pair_left = place(neuronwise ? kTile * layout.classes_stride * 8 : 0);
  layout.pair_right = place(neuronwise ? kTile * layout.classes_stride * 8 : 0);
  layout.pairs = place(neuronwise ? C * layout.classes_stride * 8 : 0);
  layout.weight = place(C * row);
  layout.weight_total = place(C * layout.stride * 8);
  layout.bias = place((C + 1) * 8);
  layout.per_group = at;
  layout.total = layout.groups + layout.per_group * problem.threads;
  return layout;
}

}  // namespace flatcore::cpu

namespace flatcore::cpu::FLATCORE_TARGET {

// What a whole call shares.
template <class C>
struct SharedBackward {
  Field field;
  const C* packed;          // (C, stride)
  const double* distances;  // (C, C), times 2^(2 exponent); null if not needed
  int exponent;
  double log_square;  // log ||W||_F^2; layerwise only
};

// One group of rows, handled in order by one thread.
template <class C>
struct Group {
  TileBuffers tile;
  C* rows;        // (kTile, stride) features, zero in rows that are left out
  C* out;         // (kTile, stride)
  C* dual;        // (kTile, stride) a gradient norm's dual direction
  double* s;      // (C, kTile) mean distances
  double* g;      // (C, kTile) the logits' cotangent
  C* g_compute;   // (C, kTile) the same in the compute type
  C* k_compute;   // (C, kTile) factors of the dual directions
  double* row;    // 2 C + 2 stride
  double* left;   // (kTile, classes_stride)
  double* right;  // (kTile, classes_stride)
  // sums over the group's rows
  double* pairs;         // (C, classes_stride)
  C* weight;             // (C, stride), of the rows since the last fold
  double* weight_total;  // (C, stride)
  double* bias;          // (C,), and the sum of c behind them
  int64_t since_fold = 0;
  bool folded = false;
  bool poisoned = false;

  Group(const HeadMetricsBackward& call, const BackwardLayout& layout, int64_t index) {
    char* base = static_cast<char*>(call.workspace) + layout.groups + index * layout.per_group;
    rows = reinterpret_cast<C*>(base + layout.tile_rows);
    out = reinterpret_cast<C*>(base + layout.tile_out);
    dual = reinterpret_cast<C*>(base + layout.tile_dual);
    double* doubles = reinterpret_cast<double*>(base + layout.tile_doubles);
    tile = {doubles, doubles + call.C * kTile, nullptr, nullptr};
    s = doubles + 2 * call.C * kTile;
    g = doubles + 3 * call.C * kTile;
    g_compute = reinterpret_cast<C*>(base + layout.tile_compute);
    k_compute = g_compute + call.C * kTile;
    row = reinterpret_cast<double*>(base + layout.row_scratch);
    left = reinterpret_cast<double*>(base + layout.pair_left);
    right = reinterpret_cast<double*>(base + layout.pair_right);
    pairs = reinterpret_cast<double*>(base + layout.pairs);
    weight = reinterpret_cast<C*>(base + layout.weight);
    weight_total = reinterpret_cast<double*>(base + layout.weight_total);
    bias = reinterpret_cast<double*>(base + layout.bias);
  }
};

}  // namespace flatcore::cpu::FLATCORE_TARGET
