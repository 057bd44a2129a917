// head_repeats: which classes of a tile share a row of W, so that their shares come together before the product.
//
// Why and how: csrc/cpu/head_repeats.cpp; here rows that are equal bit for bit, within a tile, whose classes keep their
// own order: W is multiplied as it stands. Order of calls: head_repeat_keys, a projection of each row, which the
// library sorts tile by tile; head_repeat_runs, which rows in that order equal the one before. Nothing the host would
// have to wait for decides what is launched: where no row repeats, found[kRepeated] is 0 and nothing is merged.
//
// Buffers: as cuda/head_metrics.h says. Does not synchronise.
// Cost: W read once for the keys; rows are compared where keys are equal. Never run on a device yet: no figure is
// known.
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
  for (int64_t j = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; j < call.positions; j += step) {
    Sums<1> key{};
    FLATCORE_ROLLED
    for (int64_t d = Warp::lane(); d < call.D && j < call.C; d += kWarp) {
      key.at[0] += element(call.weight, j, d) * projection(d);
    }
    key = Warp::merged(key, AddSums{});
    if (Warp::lane() != 0) continue;
    if (call.include_bias && j < call.C) key.at[0] += call.bias[j] * projection(call.D);
    call.keys[j] = j < call.C ? key.at[0] : math::kInfinity;
  }
}

// Whether two classes have one row of W, known to every lane of the warp; by far the most end at the keys.
__device__ __forceinline__ bool are_equal(const HeadRepeats& call, int64_t a, int64_t b) {
  int differs = !(call.keys[a] == call.keys[b]);
  if (call.include_bias) differs |= !(call.bias[a] == call.bias[b]);
  for (int64_t d = Warp::lane(); d < call.D && differs == 0; d += kWarp) {
    differs = !(element(call.weight, a, d) == element(call.weight, b, d));
  }
  return __any_sync(kAllLanes, differs) == 0;
}

constexpr unsigned kJoins = 1, kSameAsFirst = 2;

// Whether the row at a place equals the one before it in its tile, and that of class 0. Keys stand by class: a tile's
// own places are its classes.
__global__ void __launch_bounds__(kThreads) repeat_joins(HeadRepeats call) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; k < call.positions; k += step) {
    const int64_t tile = k / call.tile_classes * call.tile_classes;
    const int64_t j = tile + call.order[k], before = k > tile ? tile + call.order[k - 1] : call.C;
    unsigned joins = kSameAsFirst;  // behind the last class
    if (j < call.C) {
      joins =
          (before < call.C && are_equal(call, j, before) ? kJoins : 0U) | (are_equal(call, j, 0) ? kSameAsFirst : 0U);
    }
    if (Warp::lane() == 0) call.joins[k] = static_cast<uint8_t>(joins);
  }
}

// How long each group is, and what was found at all: by one block.
__global__ void __launch_bounds__(kThreads) repeat_lengths(HeadRepeats call) {
  int repeated = 0, differs = 0;
  for (int64_t k = threadIdx.x; k < call.positions; k += kThreads) {
    const unsigned joins = call.joins[k];
    int32_t length = (joins & kJoins) == 0 ? 1 : 0;
    for (int64_t next = k + 1; length > 0 && next < call.positions && (call.joins[next] & kJoins) != 0; ++next)
      ++length;
    call.runs[k] = length;
    repeated |= static_cast<int>(joins & kJoins);
    differs |= static_cast<int>((joins & kSameAsFirst) == 0);
  }
  repeated = __syncthreads_or(repeated);
  differs = __syncthreads_or(differs);
  if (threadIdx.x == 0) {
    call.found[kSameRows] = differs != 0 ? 0 : 1;
    call.found[kRepeated] = repeated != 0 ? 1 : 0;
  }
}

unsigned grid_for_warps(int64_t tasks) { return grid_for((tasks + kWarps - 1) / kWarps); }

}  // namespace

Launched head_repeat_keys(const HeadRepeats& call) {
  const DeviceGuard guard(call.device);
  if (guard.status() != cudaSuccess) return launched(guard.status(), "head_repeat_keys: the device");
  return launch("head_repeat_keys", call.stream, grid_for_warps(call.positions), kThreads, &repeat_keys, call);
}

Launched head_repeat_runs(const HeadRepeats& call) {
  const DeviceGuard guard(call.device);
  if (guard.status() != cudaSuccess) return launched(guard.status(), "head_repeat_runs: the device");
  const Launched done =
      launch("head_repeat_runs: joins", call.stream, grid_for_warps(call.positions), kThreads, &repeat_joins, call);
  if (done.error != nullptr) return done;
  return launch("head_repeat_runs: lengths", call.stream, 1, kThreads, &repeat_lengths, call);
}

}  // namespace flatcore::cuda
