// head_metrics_backward: the gradients of L1 and L-infinity norms are signs, or the sign of the largest component.
// Where one of those would come from the rounding of the product u (W - center), the component is summed again from
// differences to the label's row, over the tiles; csrc/cpu/head_metrics_backward_chunk.cpp does the same.
//
// Order of calls: head_backward_rows marks such rows; head_backward_unsure_tile for each tile, with logits in z;
// head_backward_unsure. Buffers: as cuda/head_metrics.h says. Does not synchronise. Two runs agree bit for bit.
// Cost: marked rows alone, about a fifth of all at D = 4,096 and L1: per tile a look at D components, and a column of
// W's tile for each in question. Never run on a device yet: no figure is known.
#include "cuda/head_backward_direction.h"
#include "cuda/launch.h"

namespace flatcore::cuda {
namespace {

constexpr int kThreads = 256;
using Block = Team<kThreads>;
using Warp = Team<kWarp>;

template <class V>
__device__ __forceinline__ bool is_in_question(const Direction<V>& of, int64_t d, double largest) {
  return asks_for(of.call, kLogGradientNorm1) ? of.is_unsure(d, fabs(of.value_at(d))) : of.may_be_largest(d, largest);
}

template <class Z, class V>
__global__ void __launch_bounds__(kThreads, 2) unsure_tile(HeadBackwardLoop call, HeadBackwardTile tile) {
  __shared__ double shares[kHeadTileBytes / sizeof(Z)];  // p_j, over eps where y is the top class
  const double* bias = call.bias != nullptr && call.logits.data == nullptr ? call.bias + tile.first_class : nullptr;
  for (int64_t i = blockIdx.x; i < tile.rows; i += gridDim.x) {
    if (call.numbers[i].kind != kUnsure) continue;
    const Direction<Z> of(call, tile.first + i, i, true);
    const RowShares<V> row = shares_of<V>(call, call.tails[(call.all_tails ? tile.first : 0) + i].tail);
    const Z* z = static_cast<const Z*>(tile.z) + i * padded_classes(tile.classes);
    const int64_t top = of.m - tile.first_class;
    for (int64_t k = threadIdx.x; k < tile.classes; k += kThreads) {
      V logit = static_cast<V>(z[k]);
      if constexpr (sizeof(V) == 8) {
        if (bias != nullptr) logit += bias[k];
      }
      shares[k] = k == top ? of.alpha : of.beta * row.share(logit);
    }
    __syncthreads();
    for (int64_t start = threadIdx.x / kWarp * kWarp; start < call.D; start += kThreads) {
      const int64_t mine = start + Warp::lane();
      unsigned asked = __ballot_sync(kAllLanes, mine < call.D && is_in_question(of, mine, call.numbers[i].inner));
      while (asked != 0) {
        const int64_t d = start + __popc((asked & (0U - asked)) - 1U);
        asked &= asked - 1U;
        const double own = element(call.weight, of.y, d);
        Sums<1> sum{};
        FLATCORE_ROLLED
        for (int64_t k = Warp::lane(); k < tile.classes; k += kWarp) {
          if (shares[k] != 0.0) sum.at[0] += shares[k] * (element(call.weight, tile.first_class + k, d) - own);
        }
        sum = Warp::merged(sum, AddSums{});
        double& exact = call.exact[i * call.D + d];
        if (Warp::lane() == 0) exact = tile.first_class == 0 ? sum.at[0] : exact + sum.at[0];
      }
    }
    __syncthreads();  // the shares are written again
  }
}

template <class V>
__global__ void __launch_bounds__(kThreads, 2) unsure_rows(HeadBackwardLoop call, int64_t first, int64_t rows) {
  const bool one = asks_for(call, kLogGradientNorm1);
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    HeadBackwardRow& row = call.numbers[i];
    const bool unsure = row.kind == kUnsure;
    __syncthreads();  // all have read the kind before it is written
    if (!unsure) continue;
    const Direction<V> of(call, first + i, i, true);
    const double* exact = call.exact + i * call.D;
    V* direction = static_cast<V*>(call.direction) + i * call.D;
    const double found = row.inner;
    double largest = 0.0, ties = 1.0;
    if (!one) {
      for (int64_t d = threadIdx.x; d < call.D; d += kThreads) {
        if (is_in_question(of, d, found)) largest = LargerOf{}(largest, fabs(exact[d]));
      }
      largest = Block::merged(largest, LargerOf{});
      Sums<1> count{};
      for (int64_t d = threadIdx.x; d < call.D; d += kThreads) {
        count.at[0] += is_in_question(of, d, found) && math::is_among_largest(fabs(exact[d]), largest);
      }
      ties = Block::merged(count, AddSums{}).at[0];
    }
    Sums<1> own{};
    for (int64_t d = threadIdx.x; d < call.D; d += kThreads) {
      double along = 0.0;
      if (is_in_question(of, d, found)) {
        along = one || math::is_among_largest(fabs(exact[d]), largest) ? math::sign_of(exact[d]) / ties : 0.0;
      } else if (one) {
        along = math::sign_of(of.value_at(d));
      }
      direction[d] = static_cast<V>(along);
      own.at[0] += static_cast<double>(static_cast<V>(along)) * of.centered(of.y, d);
    }
    own = Block::merged(own, AddSums{});
    if (threadIdx.x != 0) continue;
    if (!one) row.inner = largest * of.scale;
    row.own = own.at[0];
    row.kind = kOrdinary;
  }
}

}  // namespace

Launched head_backward_unsure_tile(const HeadBackwardLoop& call, const HeadBackwardTile& tile) {
  if (tile.rows == 0) return {};
  const DeviceGuard guard(call.device);
  if (guard.status() != cudaSuccess) return launched(guard.status(), "head_backward_unsure_tile: the device");
  const auto run = [&](auto kernel) {
    return launch("head_backward_unsure_tile", call.stream, grid_for(tile.rows), kThreads, kernel, call, tile);
  };
  if (call.double_compute) return run(&unsure_tile<double, double>);
  return used_as_they_stand(call) ? run(&unsure_tile<float, float>) : run(&unsure_tile<float, double>);
}

Launched head_backward_unsure(const HeadBackwardLoop& call, int64_t first, int64_t rows) {
  if (rows == 0) return {};
  const DeviceGuard guard(call.device);
  if (guard.status() != cudaSuccess) return launched(guard.status(), "head_backward_unsure: the device");
  const auto kernel = call.double_compute ? &unsure_rows<double> : &unsure_rows<float>;
  return launch("head_backward_unsure", call.stream, grid_for(rows), kThreads, kernel, call, first, rows);
}

}  // namespace flatcore::cuda
