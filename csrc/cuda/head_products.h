// The products of a small head's rows with the rows of W, by a warp; included by .cu files only.
#pragma once

#include <type_traits>

#include "cuda/head_metrics.h"
#include "cuda/head_rows.h"
#include "cuda/since_80.h"

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

// Adds a lane's part of 4 rows to their products with `classes` rows of W and to their squares, which stand last.
template <class V, int classes, int width>
__device__ __forceinline__ void add_products(const V (&x)[kRows][width], const V* w, int64_t stride, V* sums) {
  FLATCORE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    FLATCORE_UNROLL
    for (int e = 0; e < width; ++e) sums[classes * kRows + r] += x[r][e] * x[r][e];
  }
  FLATCORE_UNROLL
  for (int c = 0; c < classes; ++c) {
    FLATCORE_UNROLL
    for (int e = 0; e < width; e += Pack<V>::kCount) {
      const Pack<V> weights = *reinterpret_cast<const Pack<V>*>(w + c * stride + e);
      FLATCORE_UNROLL
      for (int i = 0; i < Pack<V>::kCount; ++i) {
        FLATCORE_UNROLL
        for (int r = 0; r < kRows; ++r) sums[c * kRows + r] += x[r][e + i] * weights.items[i];
      }
    }
  }
}

// The sums over the lanes, of classes from c0 on, into the columns `column`.. of the warp's tiles (class, row).
template <class V, int classes>
__device__ __forceinline__ void put_products(const HeadMetrics& call, V* sums, int64_t c0, int column,
                                             double (*logits)[kWarp], double* squares) {
  constexpr int count = (classes + 1) * kRows;
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

template <class T>
__device__ __forceinline__ const T* feature_row(const HeadMetrics& call, int64_t n) {
  // behind the last row: that row again, not written
  return static_cast<const T*>(call.features.data) + (n < call.N ? n : call.N - 1) * call.features.row_stride;
}

// Products of rows first..first+3 with `classes` packed rows of W from class c0 on, and the rows' sums of squares, each
// lane from memory to its registers.
template <class T, class V, int classes>
__device__ __forceinline__ void products(const HeadMetrics& call, int64_t first, int64_t c0, int column,
                                         double (*logits)[kWarp], double* squares) {
  constexpr int width = Pack<T>::kCount;
  const T* rows[kRows];
  bool whole = call.features.column_stride == 1;
  FLATCORE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    rows[r] = feature_row<T>(call, first + r);
    whole = whole && reinterpret_cast<uintptr_t>(rows[r]) % 16 == 0;
  }
  const V* w = static_cast<const V*>(call.packed) + c0 * call.packed_stride;
  V sums[(classes + 1) * kRows] = {};
  for (int64_t d = Team<kWarp>::lane() * width; d < call.packed_stride; d += kWarp * width) {
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
    add_products<V, classes>(x, w + d, call.packed_stride, sums);
  }
  put_products<V, classes>(call, sums, c0, column, logits, squares);
}

// A warp's features on their way: three stages of 4 rows and 512 bytes each, two of which are under way while the third
// is worked on. A lane copies what it reads itself, so that waiting for its own copies is enough.
template <class T>
struct Ring {
  static constexpr int kStages = 3;
  Pack<T> at[kStages][kRows][kWarp];
};
struct NoRing {};

// The same for all 32 rows, first..first+31, and all classes, through the ring: rows that begin on a 16-byte boundary.
template <class T, class V, int classes, bool kept>
__device__ __forceinline__ void ring_products(const HeadMetrics& call, int64_t first, double (*logits)[kWarp],
                                              double* squares, Ring<T>& ring) {
  constexpr int width = Pack<T>::kCount;
  const int lane = Team<kWarp>::lane();
  // rows, classes and columns of the copy to be started next, and where it begins
  int next_column = 0;
  int64_t next_c0 = 0, next_d = 0;
  const T* next[kRows];
  const auto to_rows = [&] {
    FLATCORE_UNROLL
    for (int r = 0; r < kRows; ++r) next[r] = feature_row<T>(call, first + next_column + r) + lane * width;
  };
  to_rows();
  const auto start = [&](int stage) {
    if (next_column < kWarp) {
      const int64_t left = (call.D - next_d - lane * width) * static_cast<int64_t>(sizeof(T));
      const int bytes = static_cast<int>(left < 0 ? 0 : left < 16 ? left : 16);  // 0: nothing is read
      FLATCORE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        start_copy<kept>(&ring.at[stage][r][lane], next[r], bytes);
        next[r] += kWarp * width;
      }
      next_d += kWarp * width;
      if (next_d >= call.D) {
        next_d = 0;
        next_c0 += classes;
        if (classes == 0 || next_c0 >= call.C) next_c0 = 0, next_column += kRows;
        to_rows();
      }
    }
    end_group();  // empty behind the last copy: the count of groups stays that of stages
  };
  start(0);
  start(1);
  int stage = 0;
  for (int column = 0; column < kWarp; column += kRows) {
    int64_t c0 = 0;
    do {
      const V* w = static_cast<const V*>(call.packed) + c0 * call.packed_stride + lane * width;
      V sums[(classes + 1) * kRows] = {};
      for (int64_t d = 0; d < call.D; d += kWarp * width) {
        wait_for_groups_but<1>();
        V x[kRows][width];
        FLATCORE_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const Pack<T> loaded = ring.at[stage][r][lane];
          FLATCORE_UNROLL
          for (int e = 0; e < width; ++e) x[r][e] = static_cast<V>(widened(loaded.items[e]));
        }
        start(stage == 0 ? 2 : stage - 1);
        add_products<V, classes>(x, w + d, call.packed_stride, sums);
        stage = stage == 2 ? 0 : stage + 1;
      }
      put_products<V, classes>(call, sums, c0, column, logits, squares);
      c0 += classes;
    } while (classes > 0 && c0 < call.C);
  }
}

// `again`: the rows are read once for every `classes` of them.
template <class T, class V, int classes, bool again, class Buffer>
__device__ __forceinline__ void lane_products(const HeadMetrics& call, int64_t first, double (*logits)[kWarp],
                                              double* squares, Buffer& buffer) {
  if constexpr (!std::is_same_v<Buffer, NoRing>) {
    const bool whole = call.features.column_stride == 1 && reinterpret_cast<uintptr_t>(call.features.data) % 16 == 0 &&
                       (call.features.row_stride * static_cast<int64_t>(sizeof(T)) % 16 == 0 || call.N == 1);
    if (whole && since_80()) {
      ring_products<T, V, classes, again && classes != 0>(call, first, logits, squares, buffer);
      return;
    }
  }
  for (int column = 0; column < kWarp; column += kRows) {
    int64_t c0 = 0;
    do {  // given logits (no classes): once, for the squares
      products<T, V, classes>(call, first + column, c0, column, logits, squares);
      c0 += classes;
    } while (classes > 0 && c0 < call.C);
  }
}

}  // namespace
}  // namespace flatcore::cuda
