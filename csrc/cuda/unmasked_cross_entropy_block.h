// One row of unmasked_cross_entropy by the threads of a team; included by .cu files only.
//
// Numerics: as on the CPU (csrc/cpu/unmasked_cross_entropy.cpp): 1 - p is never formed; exponentials in float32 of
// differences that are exact, or in float64 for float64 logits, sums in float64, logs in float64. A lane keeps its
// largest logit and the sum relative to it; when a larger one comes the sum is scaled. NaN and +inf make the sum NaN,
// which survives every merge.
#pragma once

#include <cmath>

#include "cuda/elements.h"
#include "cuda/team.h"
#include "math/softmax_tail.h"

namespace flatcore::cuda {

// Of the classes other than the label: the largest logit, and the sum of exp(z_j - top).
struct RestPartial {
  double top = -math::kInfinity, sum = 0.0;
};
struct MergeRests {
  FLATCORE_METHOD RestPartial operator()(const RestPartial& a, const RestPartial& b) const {
    RestPartial both;
    both.top = b.top > a.top ? b.top : a.top;
    // multiplied even where a factor is 0: a NaN must survive
    both.sum = a.sum * math::tail_scale(a.top, both.top, 1.0) + b.sum * math::tail_scale(b.top, both.top, 1.0);
    return both;
  }
};

FLATCORE_INLINE double exp_difference(double z, double top) { return math::exp_nonpositive(z - top); }
FLATCORE_INLINE float exp_difference(float z, float top) { return math::exp_difference_float(z, top); }

// Takes one logit into a lane's partial result; `top` is the lane's largest in the compute type.
template <class V>
FLATCORE_INLINE void take_logit(RestPartial& partial, V& top, V z) {
  if (!(z < static_cast<V>(math::kInfinity))) {
    partial.sum = __builtin_nan("");
  } else if (z > top) {
    partial.sum = partial.sum * math::tail_scale(partial.top, static_cast<double>(z), 1.0) + 1.0;
    partial.top = static_cast<double>(z);
    top = z;
  } else if (z > -static_cast<V>(math::kInfinity)) {
    partial.sum += static_cast<double>(exp_difference(z, top));
  }
}

template <int width, class T>
__device__ __forceinline__ RestPartial rest_of_row(const T* z, int64_t classes, int64_t y) {
  using V = decltype(widened(T{}));
  const int lane = Team<width>::lane();
  RestPartial partial;
  V top = -static_cast<V>(math::kInfinity);
  const Split split = split_of(z, classes);
  const auto* packed = reinterpret_cast<const Pack<T>*>(z + split.head);
  for (int64_t j = lane; j < split.head; j += width) {
    if (j != y) take_logit(partial, top, widened(z[j]));
  }
  for (int64_t p = lane; p < split.packs; p += width) {
    const Pack<T> loaded = packed[p];
    const int64_t own = y - split.head - p * Pack<T>::kCount;
    FLATCORE_UNROLL
    for (int e = 0; e < Pack<T>::kCount; ++e) {
      if (e != own) take_logit(partial, top, widened(loaded.items[e]));
    }
  }
  for (int64_t j = split.head + split.packs * Pack<T>::kCount + lane; j < classes; j += width) {
    if (j != y) take_logit(partial, top, widened(z[j]));
  }
  return Team<width>::merged(partial, MergeRests{});
}

// What a row comes to: its loss, log(1 - p_y), and how its cotangent is written.
struct RowResult {
  double loss, log_scale;
  enum { kZero, kPoison, kSoftmax } kind;
  double top, inverse;  // q_j = exp(z_j - top) inverse
};

// From z_y and the rest; `known`: the label is a class.
FLATCORE_INLINE RowResult row_result(bool ignored, bool known, double own, const RestPartial& rest) {
  const double nan = __builtin_nan("");
  if (ignored) return {0.0, -math::kInfinity, RowResult::kZero, 0.0, 0.0};
  if (!known || !(own < math::kInfinity) || rest.sum != rest.sum) return {nan, nan, RowResult::kPoison, 0.0, 0.0};
  if (rest.top == -math::kInfinity) {  // no other class is there
    if (own == -math::kInfinity) return {nan, nan, RowResult::kPoison, 0.0, 0.0};
    return {0.0, -math::kInfinity, RowResult::kZero, 0.0, 0.0};
  }
  const double d = own - rest.top - math::log_nonnegative(rest.sum);
  const double tail = math::log1p_nonnegative(math::exp_nonpositive(d < 0.0 ? d : -d));
  return {(d < 0.0 ? -d : 0.0) + tail, 0.0 - ((d > 0.0 ? d : 0.0) + tail), RowResult::kSoftmax, rest.top,
          1.0 / rest.sum};
}

// One lane's share of the cotangent.
template <class T>
FLATCORE_INLINE void write_cotangent(T* out, const T* z, int64_t classes, int64_t y, const RowResult& row, int lane,
                                     int width) {
  using V = decltype(widened(T{}));
  const V top = static_cast<V>(row.top), inverse = static_cast<V>(row.inverse);
  const V minus_infinity = -static_cast<V>(math::kInfinity);
  for (int64_t j = lane; j < classes; j += width) {
    V value = row.kind == RowResult::kPoison ? static_cast<V>(__builtin_nan("")) : V{};
    if (row.kind == RowResult::kSoftmax) {
      const V logit = widened(z[j]);
      value = j == y ? static_cast<V>(-1.0) : logit == minus_infinity ? V{} : exp_difference(logit, top) * inverse;
    }
    out[j] = Narrowed<T>::of(value);
  }
}

}  // namespace flatcore::cuda
