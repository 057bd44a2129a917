// row_norms: L1, L2 and L-infinity of every row from one read.
//
// Buffers: as cuda/row_norms.h says; outputs and workspace are overwritten, nothing may overlap. Does not synchronise.
// Numerics: csrc/cuda/row_norms_block.h. Two runs agree bit for bit: no atomics, merges in a fixed order that depends
// on K, the dtype and a row's alignment alone. Cost: N*K elements read once. Rows of up to 1024 elements take a warp
// each, eight to a block; longer ones are cut into tiles of 16,384 elements, a block of 256 lanes each, so that 512
// rows of 150,528 fill 5,120 blocks; a second kernel merges a row's tiles. Loads are 16 bytes a lane, four in flight.
// Never run yet: no figure is known.
#include "cuda/launch.h"
#include "cuda/row_norms.h"
#include "cuda/row_norms_block.h"

namespace flatcore::cuda {
namespace {

constexpr int kThreads = 256;  // four such blocks to a multiprocessor at least (64 registers), of tiles three (80)
constexpr int kRowsPerBlock = kThreads / kWarp;
constexpr int64_t kShort = 1024;
constexpr int64_t kTile = 16384;

int64_t tiles_of(int64_t K) { return (K + kTile - 1) / kTile; }

template <class Out>
__device__ __forceinline__ void write(const RowNorms& call, int64_t n, const Norms& norms) {
  if (call.l1 != nullptr) static_cast<Out*>(call.l1)[n] = static_cast<Out>(norms.l1);
  if (call.l2 != nullptr) static_cast<Out*>(call.l2)[n] = static_cast<Out>(norms.l2);
  if (call.linf != nullptr) static_cast<Out*>(call.linf)[n] = static_cast<Out>(norms.linf);
}

// A warp per row.
template <class T, class Out>
__global__ void __launch_bounds__(kThreads, 4) row_norms_short(RowNorms call) {
  const T* x = static_cast<const T*>(call.x.data);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRowsPerBlock;
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp; n < call.N; n += step) {
    const T* row = x + n * call.x.row_stride;
    const RowPartial total = team_partial<kWarp>(row, call.x.column_stride, call.K);
    const Norms norms = finished_row<kWarp>(row, call.x.column_stride, call.K, total);
    if (threadIdx.x % kWarp == 0) write<Out>(call, n, norms);
  }
}

// A block per tile; rows of one tile are finished here.
template <class T, class Out>
__global__ void __launch_bounds__(kThreads, 3) row_norms_tiles(RowNorms call, int64_t tiles) {
  const T* x = static_cast<const T*>(call.x.data);
  RowPartial* partials = reinterpret_cast<RowPartial*>(call.workspace);
  for (int64_t task = blockIdx.x; task < call.N * tiles; task += gridDim.x) {
    const int64_t n = task / tiles, start = (task % tiles) * kTile;
    const int64_t count = call.K - start < kTile ? call.K - start : kTile;
    const T* row = x + n * call.x.row_stride;
    const RowPartial total = team_partial<kThreads>(row + start * call.x.column_stride, call.x.column_stride, count);
    if (tiles > 1) {
      if (threadIdx.x == 0) partials[task] = total;
      continue;
    }
    const Norms norms = finished_row<kThreads>(row, call.x.column_stride, call.K, total);
    if (threadIdx.x == 0) write<Out>(call, n, norms);
  }
}

// A warp per row of several tiles.
template <class T, class Out>
__global__ void __launch_bounds__(kThreads, 4) row_norms_merge(RowNorms call, int64_t tiles) {
  const T* x = static_cast<const T*>(call.x.data);
  const RowPartial* partials = reinterpret_cast<const RowPartial*>(call.workspace);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRowsPerBlock;
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp; n < call.N; n += step) {
    const RowPartial total = tiles_partial<kWarp>(partials + n * tiles, tiles);
    const Norms norms = finished_row<kWarp>(x + n * call.x.row_stride, call.x.column_stride, call.K, total);
    if (threadIdx.x % kWarp == 0) write<Out>(call, n, norms);
  }
}

template <class T, class Out>
Launched run(const RowNorms& call) {
  const unsigned rows = grid_for((call.N + kRowsPerBlock - 1) / kRowsPerBlock);
  if (call.K <= kShort) {
    return launch("row_norms: short rows", call.stream, rows, kThreads, &row_norms_short<T, Out>, call);
  }
  const int64_t tiles = tiles_of(call.K);
  const Launched first = launch("row_norms: tiles", call.stream, grid_for(call.N * tiles), kThreads,
                                &row_norms_tiles<T, Out>, call, tiles);
  if (first.error != nullptr || tiles == 1) return first;
  return launch("row_norms: merging tiles", call.stream, rows, kThreads, &row_norms_merge<T, Out>, call, tiles);
}

}  // namespace

int64_t row_norms_workspace(int64_t N, int64_t K) {
  const int64_t tiles = tiles_of(K);
  return tiles > 1 ? 3 * N * tiles : 0;
}

Launched row_norms(const RowNorms& call) {
  if (call.N == 0) return {};
  const DeviceGuard guard(call.device);
  if (guard.status() != cudaSuccess) return launched(guard.status(), "row_norms: the device");
  switch (call.x.dtype) {
    case Dtype::kFloat16:
      return run<Half, float>(call);
    case Dtype::kBFloat16:
      return run<BHalf, float>(call);
    case Dtype::kFloat32:
      return run<float, float>(call);
    case Dtype::kFloat64:
      return run<double, double>(call);
  }
  return {"unknown dtype", "row_norms"};
}

}  // namespace flatcore::cuda
