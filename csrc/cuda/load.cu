// Every kernel of this module loaded on a device, ahead of the launches: a graph capture is then no place where code
// has to be brought to the device.
#include <initializer_list>

#include "cuda/device.h"
#include "cuda/head_measure.h"
#include "cuda/head_metrics.h"
#include "cuda/launch.h"
#include "cuda/row_norms.h"
#include "cuda/unmasked_cross_entropy.h"

namespace flatcore::cuda {
namespace {

constexpr int64_t kLong = int64_t{1} << 20;  // columns or classes beyond every bound between two kernels
constexpr Dtype kDtypes[] = {Dtype::kFloat16, Dtype::kBFloat16, Dtype::kFloat32, Dtype::kFloat64};

constexpr uint32_t kTrace = 1U << kLogHessianTrace, kNorm = 1U << kLogGradientNorm1;
constexpr int64_t kFirst = 0, kOne = 1;       // a block of one row
constexpr int64_t kTiles[] = {1, 512, 2048};  // classes of a tile: a warp's, half a block's and a block's

template <class Tile>
Tile tile_of(int64_t classes) {
  Tile tile;
  tile.rows = 1;
  tile.classes = classes;
  return tile;
}

// A call of one row, as far as what is launched depends on it.
template <class Call>
Call call_of(Dtype dtype, bool double_compute, int64_t C) {
  Call call;
  call.features.dtype = call.weight.dtype = call.logits.dtype = dtype;
  call.N = call.D = 1;
  call.C = C;
  call.fields = kWeightFields;
  call.double_compute = double_compute;
  return call;
}

// All entry points with all that they choose between; one that can't be loaded is an error of its own launch.
void every_entry_point(int device) {
  double there = 0.0;  // an address that is not null, and is not read
  const auto run = [&](auto entry, auto call, const auto&... part) {
    call.device = device;
    static_cast<void>(entry(call, part...));
  };
  for (const Dtype dtype : kDtypes) {
    for (const int64_t length : {int64_t{1}, kLong}) {
      RowNorms norms;
      norms.x.dtype = dtype;
      norms.N = 1;
      norms.K = length;
      run(&row_norms, norms);
      UnmaskedCrossEntropy loss;
      loss.logits.dtype = dtype;
      loss.N = 1;
      loss.C = length;
      run(&unmasked_cross_entropy, loss);
    }
    for (const bool wide : {false, true}) {
      if (dtype == Dtype::kFloat64 && !wide) continue;
      auto weights = call_of<HeadWeights>(dtype, wide, 2);
      weights.workspace = weights.center = weights.distances = &there;
      run(&head_weights, weights);
      for (const uint32_t fields : {kTrace, kNorm}) {
        auto measure = call_of<HeadMeasure>(dtype, wide, 1);
        measure.fields = fields;
        run(&head_measure, measure);
        for (const int64_t C : {int64_t{1}, kFusedClasses}) {
          auto gradient = call_of<HeadMeasureBackward>(dtype, wide, C);
          gradient.fields = fields;
          gradient.d_weight.data = &there;
          run(&head_measure_backward, gradient);
        }
      }
      for (int64_t C = 1; C <= kFusedClasses; ++C) {
        auto metrics = call_of<HeadMetrics>(dtype, wide, C);
        for (const uint32_t fields : {kTrace, kNorm}) {  // whether W is taken in pieces, and in how many
          metrics.fields = fields;
          for (const Dtype weight : {dtype, Dtype::kFloat32}) {
            metrics.weight.dtype = weight;
            run(&head_metrics, metrics);
          }
        }
        metrics.logits.data = &there;
        run(&head_metrics, metrics);
      }
    }
  }
  for (const bool wide : {false, true}) {
    for (const double temperature : {1.0, 2.0}) {  // logits used as they stand, and others
      auto loop = call_of<HeadLoop>(Dtype::kFloat32, wide, 2);
      loop.temperature = temperature;
      loop.values = &there;
      for (const double* squares : {static_cast<const double*>(nullptr), static_cast<const double*>(&there)}) {
        loop.centered_squares = squares;
        run(&head_loop_start, loop, kFirst, kOne);
        for (const int64_t classes : kTiles) run(&head_loop_statistics, loop, tile_of<HeadTile>(classes));
        run(&head_loop_values, loop, kFirst, kOne);
      }
      loop.centered_squares = nullptr;
      loop.distances = &there;
      HeadTable table;
      table.rows = 1;
      run(&head_loop_statistics, loop, tile_of<HeadTile>(1));
      run(&head_loop_table, loop, table);
      auto backward = call_of<HeadBackwardLoop>(Dtype::kFloat32, wide, 2);
      backward.temperature = temperature;
      for (const uint32_t fields : {kTrace, kNorm}) {
        backward.fields = fields;
        run(&head_backward_rows, backward, kFirst, kOne);
        for (const int64_t classes : kTiles) {
          run(&head_backward_unsure_tile, backward, tile_of<HeadBackwardTile>(classes));
          run(&head_backward_tile, backward, tile_of<HeadBackwardTile>(classes));
        }
        run(&head_backward_unsure, backward, kFirst, kOne);
        run(&head_backward_tops, backward, kFirst, kOne);
      }
    }
  }
  auto repeats = call_of<HeadRepeats>(Dtype::kFloat32, false, 2);
  run(&head_repeat_keys, repeats);
  run(&head_repeat_runs, repeats);
  for (const Dtype dtype : kDtypes) {  // a head whose classes are spread over the grid
    auto rest = call_of<HeadExplicit>(dtype, false, kLong);
    rest.rows = rest.slots = 1;
    run(&head_explicit, rest);
    auto backward = call_of<HeadBackwardLoop>(dtype, false, kLong);
    backward.d_weight = &there;
    backward.slots = 1;
    run(&head_backward_explicit, backward, kFirst, kOne);
  }
}

}  // namespace

bool load_all(int device) {
  if (!is_active(device)) return false;
  const DeviceGuard guard(device);
  if (guard.status() == cudaSuccess) {
    const OnlyLoading scope;
    every_entry_point(device);
  }
  static_cast<void>(cudaGetLastError());  // the next call's report is its own
  return true;
}

}  // namespace flatcore::cuda
