// The products of a small head's rows with the rows of W, by a warp; included by .cu files only.
#pragma once

#include "cuda/head_metrics.h"
#include "cuda/head_rows.h"

namespace flatcore::cuda {
namespace {

constexpr int kRows = 4;  // rows whose products are formed together

// Sums `count` values over the lanes of a warp; afterwards a lane holds the sums of a few of them. Each step halves
// the values: a lane keeps one half and gives the other to its neighbour at `offset`.
template <int count, int offset, class V>
__device__ __forceinline__ void fold(V* values) {
  if constexpr (offset > 0) {
    constexpr int half = (count + 1) / 2;
    const bool upper = (threadIdx.x & offset) != 0;
    FLATCORE_UNROLL
    for (int i = 0; i < half; ++i) {
      const V low = values[i], high = i + half < count ? values[i + half] : V{};
      values[i] = (upper ? high : low) + __shfl_xor_sync(kAllLanes, upper ? low : high, offset);
    }
    fold<half, offset / 2>(values);
  }
}
// Which of the values slot 0, 1, ... of this lane is the sum of after `fold`; beyond `count` for none.
template <int count, int offset>
__device__ __forceinline__ int folded(int slot) {
  if constexpr (offset == 0) {
    return slot;
  } else {
    constexpr int half = (count + 1) / 2;
    const int at = folded<half, offset / 2>(slot);
    if (at >= half) return count;  // padding of a later step
    const int index = at + ((threadIdx.x & offset) != 0 ? half : 0);
    return index < count ? index : count;
  }
}
template <int count>
constexpr int kSlots = (count + kWarp - 1) / kWarp;

// Products of rows first..first+3 with `classes` packed rows of W from class c0 on, and (squares given) the rows' sums
// of squares, into the columns `column`.. of the warp's tiles (class, row).
template <class T, class V, int classes>
__device__ __forceinline__ void products(const HeadMetrics& call, int64_t first, int64_t c0, int column,
                                         double (*logits)[kWarp], double* squares) {
  constexpr int width = Pack<T>::kCount;
  constexpr int count = (classes + 1) * kRows;
  const int lane = Team<kWarp>::lane();
  const T* rows[kRows];
  bool whole = call.features.column_stride == 1;
  FLATCORE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const int64_t n = first + r < call.N ? first + r : call.N - 1;  // behind the last row: not written
    rows[r] = static_cast<const T*>(call.features.data) + n * call.features.row_stride;
    whole = whole && reinterpret_cast<uintptr_t>(rows[r]) % 16 == 0;
  }
  const V* w = static_cast<const V*>(call.packed) + c0 * call.packed_stride;
  V sums[count] = {};
  for (int64_t d = lane * width; d < call.packed_stride; d += kWarp * width) {
    V x[kRows][width];
    if (whole && d + width <= call.D) {
      Pack<T> loaded[kRows];
      FLATCORE_UNROLL
      for (int r = 0; r < kRows; ++r) loaded[r] = *reinterpret_cast<const Pack<T>*>(rows[r] + d);
      FLATCORE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        FLATCORE_UNROLL
        for (int e = 0; e < width; ++e) x[r][e] = static_cast<V>(widened(loaded[r].items[e]));
      }
    } else {
      FLATCORE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        FLATCORE_UNROLL
        for (int e = 0; e < width; ++e) {
          x[r][e] = d + e < call.D ? static_cast<V>(widened(rows[r][(d + e) * call.features.column_stride])) : V{};
        }
      }
    }
    FLATCORE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FLATCORE_UNROLL
      for (int e = 0; e < width; ++e) sums[classes * kRows + r] += x[r][e] * x[r][e];
    }
    FLATCORE_UNROLL
    for (int c = 0; c < classes; ++c) {
      FLATCORE_UNROLL
      for (int e = 0; e < width; e += Pack<V>::kCount) {
        const Pack<V> weights = *reinterpret_cast<const Pack<V>*>(w + c * call.packed_stride + d + e);
        FLATCORE_UNROLL
        for (int i = 0; i < Pack<V>::kCount; ++i) {
          FLATCORE_UNROLL
          for (int r = 0; r < kRows; ++r) sums[c * kRows + r] += x[r][e + i] * weights.items[i];
        }
      }
    }
  }
  fold<count, kWarp / 2>(sums);
  FLATCORE_UNROLL
  for (int slot = 0; slot < kSlots<count>; ++slot) {
    const int index = folded<count, kWarp / 2>(slot);
    if (index >= count) continue;
    const int c = index / kRows, row = column + index % kRows;
    if (c == classes) {
      if (c0 == 0) squares[row] = static_cast<double>(sums[slot]);
    } else if (c0 + c < call.C) {
      logits[c0 + c][row] = static_cast<double>(sums[slot]);
    }
  }
}

}  // namespace
}  // namespace flatcore::cuda
