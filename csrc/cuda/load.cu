// Every kernel of this module loaded on a device, ahead of the launches: a graph capture is then no place where code
// has to be brought to the device.
#include <initializer_list>

#include "cuda/device.h"
#include "cuda/head_metrics.h"
#include "cuda/launch.h"
#include "cuda/row_norms.h"
#include "cuda/unmasked_cross_entropy.h"

namespace flatcore::cuda {
namespace {

constexpr int64_t kLong = int64_t{1} << 20;  // columns or classes beyond every bound between two kernels
constexpr Dtype kDtypes[] = {Dtype::kFloat16, Dtype::kBFloat16, Dtype::kFloat32, Dtype::kFloat64};

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
  const auto run = [&](auto entry, auto call) {
    call.device = device;
    static_cast<void>(entry(call));
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
      for (int64_t C = 1; C <= kFusedClasses; ++C) {
        auto metrics = call_of<HeadMetrics>(dtype, wide, C);
        run(&head_metrics, metrics);
        metrics.logits.data = &there;
        run(&head_metrics, metrics);
      }
      auto merge = call_of<HeadChunk>(dtype, wide, 2);
      merge.rows = 1;
      run(&head_chunk_merge, merge);
      merge.q_pieces = &there;
      run(&head_chunk_merge, merge);
    }
  }
  for (const bool wide : {false, true}) {
    for (const int64_t C : {int64_t{1}, kLong}) {
      auto chunk = call_of<HeadChunk>(Dtype::kFloat32, wide, C);
      chunk.rows = 1;
      run(&head_chunk_statistics, chunk);
      chunk.temperature = 2.0;  // logits are not used as they stand
      run(&head_chunk_statistics, chunk);
      run(&head_chunk_weights, chunk);
    }
    auto backward = call_of<HeadBackwardChunk>(Dtype::kFloat32, wide, 2);
    backward.rows = 1;
    run(&head_chunk_directions, backward);
    run(&head_chunk_cotangent, backward);
  }
  auto repeats = call_of<HeadRepeats>(Dtype::kFloat32, false, 2);
  run(&head_repeat_keys, repeats);
  run(&head_repeat_joins, repeats);
  auto rest = call_of<HeadExplicit>(Dtype::kFloat32, false, 2);
  rest.rows = rest.slots = 1;
  run(&head_explicit, rest);
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
