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

constexpr int kThreads = 256;  // four such blocks to a multiprocessor at least: 64 registers
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
    DeviceLanes<RowPartial, kWarp> lanes;
    const T* row = x + n * call.x.row_stride;
    const RowPartial total = block_partial(lanes, nullptr, row, call.x.column_stride, call.K, kWarp);
    const Norms norms = finished_row(lanes, nullptr, row, call.x.column_stride, call.K, kWarp, total);
    if (threadIdx.x % kWarp == 0) write<Out>(call, n, norms);
  }
}

// A block per tile; rows of one tile are finished here.
template <class T, class Out>
__global__ void __launch_bounds__(kThreads, 4) row_norms_tiles(RowNorms call, int64_t tiles) {
  __shared__ RowPartial shared[kThreads / kWarp];
  const T* x = static_cast<const T*>(call.x.data);
  RowPartial* partials = reinterpret_cast<RowPartial*>(call.workspace);
  for (int64_t task = blockIdx.x; task < call.N * tiles; task += gridDim.x) {
    DeviceLanes<RowPartial, kThreads> lanes;
    const int64_t n = task / tiles, start = (task % tiles) * kTile;
    const int64_t count = call.K - start < kTile ? call.K - start : kTile;
    const T* row = x + n * call.x.row_stride;
    const RowPartial total =
        block_partial(lanes, shared, row + start * call.x.column_stride, call.x.column_stride, count, kThreads);
    if (tiles > 1) {
      if (threadIdx.x == 0) partials[task] = total;
      continue;
    }
    const Norms norms = finished_row(lanes, shared, row, call.x.column_stride, call.K, kThreads, total);
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
    DeviceLanes<RowPartial, kWarp> lanes;
    const RowPartial total = tiles_partial(lanes, nullptr, partials + n * tiles, tiles, kWarp);
    const Norms norms =
        finished_row(lanes, nullptr, x + n * call.x.row_stride, call.x.column_stride, call.K, kWarp, total);
    if (threadIdx.x % kWarp == 0) write<Out>(call, n, norms);
  }
}

template <class T, class Out>
Launched launch(const RowNorms& call) {
  const auto stream = static_cast<cudaStream_t>(call.stream);
  const unsigned rows = grid_for((call.N + kRowsPerBlock - 1) / kRowsPerBlock);
  if (call.K <= kShort) {
    if (const cudaError_t status = load(row_norms_short<T, Out>); status != cudaSuccess) {
      return launched(status, "row_norms: loading");
    }
    row_norms_short<T, Out><<<rows, kThreads, 0, stream>>>(call);
    return launched(cudaGetLastError(), "row_norms: short rows");
  }
  const int64_t tiles = tiles_of(call.K);
  if (const cudaError_t status = load(row_norms_tiles<T, Out>); status != cudaSuccess) {
    return launched(status, "row_norms: loading");
  }
  row_norms_tiles<T, Out><<<grid_for(call.N * tiles), kThreads, 0, stream>>>(call, tiles);
  if (const cudaError_t status = cudaGetLastError(); status != cudaSuccess || tiles == 1) {
    return launched(status, "row_norms: tiles");
  }
  if (const cudaError_t status = load(row_norms_merge<T, Out>); status != cudaSuccess) {
    return launched(status, "row_norms: loading");
  }
  row_norms_merge<T, Out><<<rows, kThreads, 0, stream>>>(call, tiles);
  return launched(cudaGetLastError(), "row_norms: merging tiles");
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
    case cpu::Dtype::kFloat16:
      return launch<cpu::Half, float>(call);
    case cpu::Dtype::kBFloat16:
      return launch<cpu::BHalf, float>(call);
    case cpu::Dtype::kFloat32:
      return launch<float, float>(call);
    case cpu::Dtype::kFloat64:
      return launch<double, double>(call);
  }
  return {"unknown dtype", "row_norms"};
}

}  // namespace flatcore::cuda
