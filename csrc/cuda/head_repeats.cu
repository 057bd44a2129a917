// head_repeats: which classes share a row of W, and their shares brought together in one of them before the product.
//
// Why and how: csrc/cpu/head_repeats.cpp; here rows that are equal bit for bit. Order of calls: head_repeat_keys, a
// projection of each row, which the library sorts; head_repeat_joins, whether a row in that order equals the one before
// it; for each chunk head_chunk_merge. Nothing the host would have to wait for decides what is launched: where no row
// repeats, `repeated` is 0 and the merge ends at once.
//
// Buffers: as cuda/head_metrics.h says. Does not synchronise. Merges in a fixed order: two runs agree bit for bit.
// Cost: W read once for the keys and once more for the comparisons; a merge reads 4 bytes a class and the shares of the
// groups, where there are any. Never run on a device yet: no figure is known.
#include "cuda/head_metrics.h"
#include "cuda/head_rows.h"
#include "cuda/launch.h"

namespace flatcore::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
using Warp = Team<kWarp>;

// A fixed pseudo-random number in [-1, 1): the finalizer of splitmix64.
__device__ __forceinline__ double projection(int64_t d) {
  uint64_t x = static_cast<uint64_t>(d + 1) * 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  x ^= x >> 31;
  return static_cast<double>(static_cast<int64_t>(x) >> 11) * 0x1p-52;
}

__global__ void __launch_bounds__(kThreads) repeat_keys(HeadRepeats call) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t j = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; j < call.C; j += step) {
    Sums<1> key{};
    FLATCORE_ROLLED
    for (int64_t d = Warp::lane(); d < call.D; d += kWarp) {
      key.at[0] += element(call.weight, j, d) * projection(d);
    }
    key = Warp::merged(key, AddSums{});
    if (Warp::lane() != 0) continue;
    if (call.include_bias) key.at[0] += call.bias[j] * projection(call.D);
    call.keys[j] = key.at[0];
  }
}

__global__ void __launch_bounds__(kThreads) repeat_joins(HeadRepeats call) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; k < call.C; k += step) {
    int differs = k == 0;
    if (k > 0) {
      const int64_t j = call.order[k], before = call.order[k - 1];
      differs = !(call.keys[j] == call.keys[before]);  // by far the most end here
      if (call.include_bias) differs |= !(call.bias[j] == call.bias[before]);
      for (int64_t d = Warp::lane(); d < call.D && differs == 0; d += kWarp) {
        differs = !(element(call.weight, j, d) == element(call.weight, before, d));
      }
    }
    const bool any = __any_sync(kAllLanes, differs) != 0;
    if (Warp::lane() == 0) call.joins[k] = any ? 0 : 1;
  }
}

// Shares as they are stored: numbers of the compute type, or pieces of 16 bits.
template <class V>
struct Shares {
  V* q;

  __device__ __forceinline__ double at(int64_t j) const { return static_cast<double>(q[j]); }
  __device__ __forceinline__ void clear(int64_t j) const { q[j] = V{}; }
  __device__ __forceinline__ double put(int64_t j, double value) const {
    q[j] = static_cast<V>(value);
    return static_cast<double>(q[j]);
  }
};
template <class T>
struct Pieces {
  T* first;
  int64_t step;  // from one piece of a share to the next
  int count;

  __device__ __forceinline__ double at(int64_t j) const {
    double sum = 0.0;
    for (int piece = 0; piece < count; ++piece) sum += static_cast<double>(widened(first[piece * step + j]));
    return sum / kPieceScale<T>;
  }
  __device__ __forceinline__ void clear(int64_t j) const {
    for (int piece = 0; piece < count; ++piece) first[piece * step + j] = T{};
  }
  __device__ __forceinline__ double put(int64_t j, double value) const {
    return put_pieces(first + j, step, count, value);
  }
};

// Row i's groups, a warp per group; what the rounding of the sums adds to the row's means.
template <class Store>
__device__ __forceinline__ void merge_row(const HeadChunk& call, int64_t i, const Store& shares) {
  using Block = Team<kThreads>;
  const double scale = scalbn(1.0, static_cast<int>(call.summary[1]));
  Sums<3> more{};  // of the centred squares, the centred bias, and of 1
  for (int64_t k = threadIdx.x / kWarp; k < call.C; k += kWarps) {
    const int32_t length = call.runs[k];
    if (length < 2) continue;
    Sums<1> total{};
    FLATCORE_ROLLED
    for (int32_t e = Warp::lane(); e < length; e += kWarp) total.at[0] += shares.at(call.order[k + e]);
    total = Warp::merged(total, AddSums{});
    FLATCORE_ROLLED
    for (int32_t e = Warp::lane(); e < length; e += kWarp) shares.clear(call.order[k + e]);
    __syncwarp();
    if (Warp::lane() != 0) continue;
    const int64_t j = call.order[k];
    const double extra = shares.put(j, total.at[0]) - total.at[0];
    more.at[0] += extra * call.centered_squares[j];
    if (call.include_bias && extra != 0.0) more.at[1] += extra * (call.bias[j] * scale - call.center[call.D]);
    more.at[2] += extra;
  }
  more = Block::merged(more, AddSums{});
  if (threadIdx.x != 0) return;
  HeadRow& row = call.row_state[i];
  row.square_mean += more.at[0];
  row.bias_mean += more.at[1];
  row.q_sum += more.at[2];
}

template <class V>
__global__ void __launch_bounds__(kThreads) merge_shares(HeadChunk call) {
  const V* q = static_cast<const V*>(call.q);
  V* merged = static_cast<V*>(call.merged);
  const bool repeated = *call.repeated != 0;
  if (!repeated && q == merged) return;
  for (int64_t i = blockIdx.x; i < call.rows; i += gridDim.x) {
    const Shares<V> shares{merged + i * call.C};
    if (q != merged) {
      FLATCORE_ROLLED
      for (int64_t j = threadIdx.x; j < call.C; j += kThreads) shares.q[j] = q[i * call.C + j];
      __syncthreads();
    }
    if (repeated) merge_row(call, i, shares);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) merge_pieces(HeadChunk call) {
  if (*call.repeated == 0) return;
  for (int64_t i = blockIdx.x; i < call.rows; i += gridDim.x) {
    merge_row(call, i, Pieces<T>{static_cast<T*>(call.q_pieces) + i * call.C, call.rows * call.C, call.pieces});
  }
}

unsigned grid_for_warps(int64_t tasks) { return grid_for((tasks + kWarps - 1) / kWarps); }

}  // namespace

Launched head_repeat_keys(const HeadRepeats& call) {
  const DeviceGuard guard(call.device);
  if (guard.status() != cudaSuccess) return launched(guard.status(), "head_repeat_keys: the device");
  return launch("head_repeat_keys", call.stream, grid_for_warps(call.C), kThreads, &repeat_keys, call);
}

Launched head_repeat_joins(const HeadRepeats& call) {
  const DeviceGuard guard(call.device);
  if (guard.status() != cudaSuccess) return launched(guard.status(), "head_repeat_joins: the device");
  return launch("head_repeat_joins", call.stream, grid_for_warps(call.C), kThreads, &repeat_joins, call);
}

Launched head_chunk_merge(const HeadChunk& call) {
  if (call.rows == 0) return {};
  const DeviceGuard guard(call.device);
  if (guard.status() != cudaSuccess) return launched(guard.status(), "head_chunk_merge: the device");
  const char* what = "head_chunk_merge";
  const unsigned grid = grid_for(call.rows);
  if (call.q_pieces != nullptr) {
    return call.weight.dtype == Dtype::kFloat16 ? launch(what, call.stream, grid, kThreads, &merge_pieces<Half>, call)
                                                : launch(what, call.stream, grid, kThreads, &merge_pieces<BHalf>, call);
  }
  return call.double_compute ? launch(what, call.stream, grid, kThreads, &merge_shares<double>, call)
                             : launch(what, call.stream, grid, kThreads, &merge_shares<float>, call);
}

}  // namespace flatcore::cuda
