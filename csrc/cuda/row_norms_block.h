// The norms of one row, or of a tile of it, by the threads of a team; included by .cu files only.
//
// Numerics: every entry is widened to float64 before it is added (the largest is found before), so that squares of 1e20
// or 1e-25 in float32 neither overflow nor vanish. float64 rows whose sum of squares leaves [1e-280, 1e300] are read
// again, scaled by a power of two. A NaN makes the sum NaN, and the sum decides.
#pragma once

#include <cmath>

#include "cuda/elements.h"
#include "cuda/team.h"
#include "math/norms.h"

namespace flatcore::cuda {

struct RowPartial {
  double sum = 0.0, squares = 0.0, largest = 0.0;
  FLATCORE_METHOD void take(double a, double scale) {
    a = a < 0.0 ? -a : a;  // -0 stays, and adds nothing
    const double v = a * scale;
    sum += a;
    squares += v * v;
    largest = a > largest ? a : largest;
  }
};
FLATCORE_INLINE RowPartial merge_partials(const RowPartial& a, const RowPartial& b) {
  RowPartial both;
  both.sum = a.sum + b.sum;
  both.squares = a.squares + b.squares;
  both.largest = b.largest > a.largest ? b.largest : a.largest;
  return both;
}

// NaN is passed over: the sum has it. One instruction of floats; float64 has none, and a comparison takes three.
FLATCORE_INLINE float larger(float a, float b) { return fmaxf(a, b); }
FLATCORE_INLINE double larger(double a, double b) { return a > b ? a : b; }

// One lane's share of a row as its elements are read, the largest in their own width (float for 16 bits).
template <class F>
struct LanePartial {
  double sum = 0.0, squares = 0.0;
  F largest{};
  FLATCORE_METHOD void take(F x) {
    const F a = fabs(x);
    largest = larger(a, largest);
    const double v = static_cast<double>(a);
    sum += v;
    squares += v * v;
  }
};

// Of `count` elements, `stride` apart: packs lane, lane + lanes, ... where the elements lie side by side (those before
// the first 16-byte boundary and behind the last go one by one), else elements lane, lane + lanes, ...
template <class T>
FLATCORE_INLINE RowPartial lane_partial(const T* x, int64_t stride, int64_t count, int lane, int lanes) {
  LanePartial<decltype(widened(T{}))> partial;
  const Split split = stride == 1 ? split_of(x, count) : Split{count, 0};
  const int64_t head = split.head, packs = split.packs;
  FLATCORE_ROLLED
  for (int64_t k = lane; k < head; k += lanes) partial.take(widened(x[k * stride]));
  const auto* packed = reinterpret_cast<const Pack<T>*>(x + head);
  constexpr int unroll = 4;  // loads in flight before the first is used
  int64_t p = lane;
  for (; p + (unroll - 1) * static_cast<int64_t>(lanes) < packs; p += unroll * static_cast<int64_t>(lanes)) {
    Pack<T> loaded[unroll];
    FLATCORE_UNROLL
    for (int i = 0; i < unroll; ++i) loaded[i] = packed[p + i * static_cast<int64_t>(lanes)];
    FLATCORE_UNROLL
    for (int i = 0; i < unroll; ++i) {
      FLATCORE_UNROLL
      for (int e = 0; e < Pack<T>::kCount; ++e) partial.take(widened(loaded[i].items[e]));
    }
  }
  FLATCORE_ROLLED
  for (; p < packs; p += lanes) {
    const Pack<T> loaded = packed[p];
    FLATCORE_UNROLL
    for (int e = 0; e < Pack<T>::kCount; ++e) partial.take(widened(loaded.items[e]));
  }
  if (stride == 1) {
    FLATCORE_ROLLED
    for (int64_t k = head + packs * Pack<T>::kCount + lane; k < count; k += lanes) partial.take(widened(x[k]));
  }
  RowPartial row;
  row.sum = partial.sum;
  row.squares = partial.squares;
  row.largest = static_cast<double>(partial.largest);
  return row;
}

// 2^-e for the exponent e of a positive finite number, in two factors: one alone may leave the range.
struct PowerOfTwo {
  double first, second;
};
FLATCORE_INLINE PowerOfTwo inverse_power(double largest) {
  const int exponent = ilogb(largest);
  return {scalbn(1.0, -exponent / 2), scalbn(1.0, -exponent - (-exponent / 2))};
}

struct MergePartials {
  FLATCORE_METHOD RowPartial operator()(const RowPartial& a, const RowPartial& b) const { return merge_partials(a, b); }
};

struct Norms {
  double l1, l2, linf;
};

// The partial result of `count` elements of a row, known to every lane.
template <int width, class T>
__device__ __forceinline__ RowPartial team_partial(const T* x, int64_t stride, int64_t count) {
  return Team<width>::merged(lane_partial(x, stride, count, Team<width>::lane(), width), MergePartials{});
}

// The squares of a row whose entries are scaled first.
template <int width, class T>
__device__ __forceinline__ double scaled_squares(const T* x, int64_t stride, int64_t count, const PowerOfTwo& scale) {
  RowPartial partial;
  FLATCORE_ROLLED
  for (int64_t k = Team<width>::lane(); k < count; k += width) {
    partial.take(static_cast<double>(widened(x[k * stride])) * scale.first, scale.second);
  }
  return Team<width>::merged(partial, MergePartials{}).squares;
}

// The norms of a row of `count` elements whose partial result every lane knows; reads it again if its squares left the
// range.
template <int width, class T>
__device__ __forceinline__ Norms finished_row(const T* x, int64_t stride, int64_t count, const RowPartial& total) {
  const double nan = __builtin_nan("");
  if (total.sum != total.sum) return {total.sum, nan, nan};
  if (!(total.largest < math::kInfinity)) return {total.sum, math::kInfinity, math::kInfinity};
  if (math::squares_in_range<double>(total.squares) || total.largest == 0.0)
    return {total.sum, sqrt(total.squares), total.largest};
  const PowerOfTwo scale = inverse_power(total.largest);
  return {total.sum, sqrt(scaled_squares<width>(x, stride, count, scale)) / scale.first / scale.second, total.largest};
}

// log sum x_d^2 of a row, NaN if an element is not finite: no square leaves the range. `seldom`: where rows are few, an
// element a lane at a time, in registers that a kernel has left.
template <int width, bool seldom = false, class T>
__device__ __forceinline__ double log_squares(const T* x, int64_t stride, int64_t count) {
  RowPartial total;
  if constexpr (seldom) {
    FLATCORE_ROLLED
    for (int64_t k = Team<width>::lane(); k < count; k += width) {
      total.take(static_cast<double>(widened(x[k * stride])), 1.0);
    }
    total = Team<width>::merged(total, MergePartials{});
  } else {
    total = team_partial<width>(x, stride, count);
  }
  if (total.sum != total.sum || !(total.largest < math::kInfinity)) return __builtin_nan("");
  if (total.largest == 0.0) return -math::kInfinity;
  if (math::squares_in_range<double>(total.squares)) return math::log_nonnegative(total.squares);
  const PowerOfTwo scale = inverse_power(total.largest);
  const double exponent = static_cast<double>(ilogb(total.largest));
  return math::log_nonnegative(scaled_squares<width>(x, stride, count, scale)) + 2.0 * exponent * math::kLn2;
}

// The sum over the tiles of a row: lane i takes tiles i, i + width, ... in order.
template <int width>
__device__ __forceinline__ RowPartial tiles_partial(const RowPartial* tiles, int64_t count) {
  RowPartial partial;
  for (int64_t k = Team<width>::lane(); k < count; k += width) partial = merge_partials(partial, tiles[k]);
  return Team<width>::merged(partial, MergePartials{});
}

}  // namespace flatcore::cuda
