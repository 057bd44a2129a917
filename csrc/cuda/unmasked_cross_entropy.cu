// unmasked_cross_entropy: loss, log(1 - p_y) and the unit-scale cotangent q - e_y of every row.
//
// Buffers: as cuda/unmasked_cross_entropy.h says; outputs are overwritten. Does not synchronise.
// Numerics: csrc/cuda/unmasked_cross_entropy_block.h. Two runs agree bit for bit.
// Cost: a row is read twice, the second time from a cache while a row fits one, and its cotangent is written once. Rows
// of up to 1024 classes take a warp each, eight to a block; longer ones a block of 256 lanes. Never run yet: no figure
// is known.
#include "cuda/launch.h"
#include "cuda/unmasked_cross_entropy.h"
#include "cuda/unmasked_cross_entropy_block.h"

namespace flatcore::cuda {
namespace {

constexpr int kThreads = 256;  // four such blocks to a multiprocessor at least: 64 registers
constexpr int64_t kShort = 1024;

// So many lanes per row, kThreads in a block.
template <class T, class Out, int width>
__global__ void __launch_bounds__(kThreads, 4) unmasked_rows(UnmaskedCrossEntropy call) {
  constexpr int rows = kThreads / width;
  const int lane = static_cast<int>(threadIdx.x) % width;
  const int64_t step = static_cast<int64_t>(gridDim.x) * rows;
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * rows + threadIdx.x / width; n < call.N; n += step) {
    const T* z = static_cast<const T*>(call.logits.data) + n * call.logits.row_stride;
    const int64_t y = call.target[n];
    const bool ignored = y == call.ignore_index, known = y >= 0 && y < call.C;
    RestPartial rest;
    if (!ignored && known) rest = rest_of_row<width>(z, call.C, y);
    const double own = known ? static_cast<double>(widened(z[y])) : 0.0;
    const RowResult row = row_result(ignored, known, own, rest);
    if (lane == 0) {
      static_cast<Out*>(call.loss)[n] = static_cast<Out>(row.loss);
      static_cast<Out*>(call.log_scale)[n] = static_cast<Out>(row.log_scale);
    }
    if (call.cotangent != nullptr) {
      write_cotangent(static_cast<T*>(call.cotangent) + n * call.C, z, call.C, y, row, lane, width);
    }
  }
}

template <class T, class Out, int width>
Launched run_rows(const UnmaskedCrossEntropy& call) {
  constexpr int64_t rows = kThreads / width;
  return launch("unmasked_cross_entropy", call.stream, grid_for((call.N + rows - 1) / rows), kThreads,
                &unmasked_rows<T, Out, width>, call);
}

template <class T, class Out>
Launched run(const UnmaskedCrossEntropy& call) {
  return call.C <= kShort ? run_rows<T, Out, kWarp>(call) : run_rows<T, Out, kThreads>(call);
}

}  // namespace

Launched unmasked_cross_entropy(const UnmaskedCrossEntropy& call) {
  if (call.N == 0) return {};
  const DeviceGuard guard(call.device);
  if (guard.status() != cudaSuccess) return launched(guard.status(), "unmasked_cross_entropy: the device");
  switch (call.logits.dtype) {
    case Dtype::kFloat16:
      return run<Half, float>(call);
    case Dtype::kBFloat16:
      return run<BHalf, float>(call);
    case Dtype::kFloat32:
      return run<float, float>(call);
    case Dtype::kFloat64:
      return run<double, double>(call);
  }
  return {"unknown dtype", "unmasked_cross_entropy"};
}

}  // namespace flatcore::cuda
