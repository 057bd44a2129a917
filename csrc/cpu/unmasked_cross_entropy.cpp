// unmasked_cross_entropy: loss, log(1 - p_y) and the unit-scale cotangent q - e_y of every row, from one read of it.
//
// With q the softmax over the classes other than the label y, and d = z_y - log sum_{j != y} exp(z_j):
//   dl/dz = (1 - p_y)(q - e_y),   -log p_y = log(1 + exp(-d)),   log(1 - p_y) = -log(1 + exp(d)).
//
// Numerics: 1 - p is never formed; the label's class takes no part in the sum, so nothing cancels at any confidence.
// float32 and narrower logits: exp in float32 of differences that are exact (math/exp_log.h), sums carried in float64
// from 4 terms on, the logs in float64; each q_j is right to 4 units in its last place, below the smallest normal
// number it is 0. float64: all in float64. Narrower cotangents are rounded once, from float32. Cost: a row is read from
// memory once; its three passes (largest, exp and sum, scale) meet it in the first- or second-level cache. Rows shorter
// than a vector, and the ends of longer ones, are padded with masked classes: ten classes cost one vector, not ten
// scalar exponentials (6 times as long). One row is one thread's; two runs agree bit for bit, whatever the number of
// threads, and no row's value depends on another's.
#include "cpu/unmasked_cross_entropy.h"

#include "cpu/head_rows.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace flatcore::cpu::FLATCORE_TARGET {
namespace {

// What differs between element types: the compute type and some values as they stand in memory.
template <class T>
struct Format;
template <>
struct Format<double> {
  using Compute = double;
  static constexpr double kMasked = -math::kInfinity, kNotANumber = __builtin_nan(""), kMinusOne = -1.0;
};
template <>
struct Format<float> {
  using Compute = float;
  static constexpr float kMasked = -__builtin_inff(), kNotANumber = __builtin_nanf(""), kMinusOne = -1.0F;
};
template <>
struct Format<Half> {
  using Compute = float;
  static constexpr Half kMasked{0xfc00}, kNotANumber{0x7e00}, kMinusOne{0xbc00};
};
template <>
struct Format<BHalf> {
  using Compute = float;
  static constexpr BHalf kMasked{0xff80}, kNotANumber{0x7fc0}, kMinusOne{0xbf80};
};

FLATCORE_INLINE DoubleV exp_difference(DoubleV z, DoubleV top) { return math::exp_nonpositive(z - top); }
FLATCORE_INLINE FloatV exp_difference(FloatV z, FloatV top) { return math::exp_difference_float(z, top); }

// Vectors of values in 0..1 to memory, rounded to the nearest, ties to even.
FLATCORE_INLINE void store(double* to, DoubleV v) { store_unaligned(to, v); }
FLATCORE_INLINE void store(float* to, FloatV v) { store_unaligned(to, v); }
FLATCORE_INLINE void store(BHalf* to, FloatV v) {
  const UInt32V bits = math::bit_cast<UInt32V>(v);
  store_unaligned(to, __builtin_convertvector((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16, UInt16V));
}
FLATCORE_INLINE void store(Half* to, FloatV v) {
#if defined(FLATCORE_TARGET_avx512)
  store_unaligned(to, _mm512_maskz_cvtps_ph(0xffff, math::bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(FLATCORE_TARGET_avx2)
  store_unaligned(to, _mm256_cvtps_ph(math::bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  // normal: the exponent from bias 127 to 15 and 13 bits off; below 2^-14: next to 0.5 float's last bit is worth 2^-24,
  // float16's least number
  const UInt32V bits = math::bit_cast<UInt32V>(v);
  const UInt32V normal = (bits - (112U << 23) + 0xfffU + ((bits >> 13) & 1U)) >> 13;
  const UInt32V small = math::bit_cast<UInt32V>(v + 0.5F) - 0x3f000000U;
  store_unaligned(to, __builtin_convertvector(v < 0x1p-14F ? small : normal, UInt16V));
#endif
}

// `count` elements, fewer than a vector, the other lanes masked classes.
template <class C, class T>
FLATCORE_INLINE typename VectorOf<C>::Type load_end(const T* from, int64_t count) {
  T padded[VectorOf<C>::kLanes];
  for (int lane = 0; lane < VectorOf<C>::kLanes; ++lane) padded[lane] = lane < count ? from[lane] : Format<T>::kMasked;
  return Load<C>::from(padded);
}
template <class T, class V>
FLATCORE_INLINE void store_end(T* to, V v, int64_t count) {
  T padded[VectorOf<typename Format<T>::Compute>::kLanes];
  store(padded, v);
  for (int64_t lane = 0; lane < count; ++lane) to[lane] = padded[lane];
}

template <class T>
void fill(T* out, int64_t C, T value) {
  if (out == nullptr) return;
  for (int64_t j = 0; j < C; ++j) out[j] = value;
}

// A row of logits in which the label's class is masked.
template <class T>
class Rest {
 public:
  using C = typename Format<T>::Compute;
  using V = typename VectorOf<C>::Type;
  static constexpr int kLanes = VectorOf<C>::kLanes;

  Rest(const T* z, int64_t classes, int64_t y) : z_(z), classes_(classes), y_(y) {}

  V at(int64_t j) const { return masked(Load<C>::from(z_ + j), j); }
  V end(int64_t j) const { return masked(load_end<C>(z_ + j, classes_ - j), j); }

  // The largest logit. NaN is passed over here and shows in the sum.
  C top() const {
    constexpr int unroll = 4;  // hides the latency of a maximum (4 cycles at one or two per cycle)
    V best[unroll];
    for (V& b : best) b = V{} - static_cast<C>(math::kInfinity);
    int64_t j = 0;
    for (; j + unroll * kLanes <= classes_; j += unroll * kLanes) {
      for (int i = 0; i < unroll; ++i) best[i] = larger(at(j + i * kLanes), best[i]);
    }
    for (; j + kLanes <= classes_; j += kLanes) best[0] = larger(at(j), best[0]);
    if (j < classes_) best[0] = larger(end(j), best[0]);
    for (int i = 1; i < unroll; ++i) best[0] = larger(best[i], best[0]);
    C top = best[0][0];
    for (int lane = 1; lane < kLanes; ++lane) top = best[0][lane] > top ? best[0][lane] : top;
    return top;
  }

  // Sum of u_j = exp(z_j - top); each vector of them is handed to keep(j, u) and the last, partial one to keep_end.
  template <class Keep, class KeepEnd>
  double sum(C top, const Keep& keep, const KeepEnd& keep_end) const {
    const V tops = V{} + top;
    DoubleV total = {};
    int64_t j = 0;
    for (; j + 4 * kLanes <= classes_; j += 4 * kLanes) {
      V u[4];
      for (int i = 0; i < 4; ++i) {
        u[i] = exp_difference(at(j + i * kLanes), tops);
        keep(j + i * kLanes, u[i]);
      }
      total += widened_sum((u[0] + u[1]) + (u[2] + u[3]));
    }
    for (; j + kLanes <= classes_; j += kLanes) {
      const V u = exp_difference(at(j), tops);
      keep(j, u);
      total += widened_sum(u);
    }
    if (j < classes_) {
      const V u = exp_difference(end(j), tops);
      keep_end(j, u);
      total += widened_sum(u);
    }
    return sum_lanes(total);
  }

 private:
  static V larger(V a, V b) { return a > b ? a : b; }
  V masked(V v, int64_t j) const {
    const uint64_t lane = static_cast<uint64_t>(y_ - j);
    if (lane < kLanes) v[lane] = static_cast<C>(-math::kInfinity);
    return v;
  }

  const T* z_;
  int64_t classes_;
  int64_t y_;
};

template <class T>
void one_row(const UnmaskedCrossEntropy& call, int64_t n, FirstBadRow& bad_label) {
  using C = typename Format<T>::Compute;
  using V = typename VectorOf<C>::Type;
  constexpr int lanes = VectorOf<C>::kLanes;
  const int64_t classes = call.C;
  const T* z = static_cast<const T*>(call.logits.data) + n * call.logits.row_stride;
  T* out = call.cotangent == nullptr ? nullptr : static_cast<T*>(call.cotangent) + n * classes;
  const auto put = [&](double loss, double log_scale) {
    static_cast<C*>(call.loss)[n] = static_cast<C>(loss);
    static_cast<C*>(call.log_scale)[n] = static_cast<C>(log_scale);
  };

  const int64_t y = call.target[n];
  if (y == call.ignore_index) {
    put(0.0, -math::kInfinity);
    fill(out, classes, T{});
    return;
  }
  if (y < 0 || y >= classes) {
    bad_label.report(n);
    return;
  }
  const double own = static_cast<double>(widen(z[y]));
  const Rest<T> rest(z, classes, y);
  const C top = rest.top();
  const auto poisoned = [&] {
    put(kNan, kNan);
    fill(out, classes, Format<T>::kNotANumber);
  };
  if (!(own < math::kInfinity) || !(top < math::kInfinity)) return poisoned();
  if (top == -math::kInfinity) {
    // no other class is there: only NaN or masked ones
    bool nan = own == -math::kInfinity;
    for (int64_t j = 0; j < classes; ++j) nan |= widen(z[j]) != widen(z[j]);
    if (nan) return poisoned();
    put(0.0, -math::kInfinity);
    fill(out, classes, T{});
    return;
  }

  // Narrow outputs cannot keep u for the scaling that follows without a second rounding: there exp is taken twice.
  constexpr bool keeps = sizeof(T) == sizeof(C);
  double sum = 0.0;
  if constexpr (keeps) {
    sum = out == nullptr ? rest.sum(
                               top, [](int64_t, V) {}, [](int64_t, V) {})
                         : rest.sum(
                               top, [&](int64_t j, V u) { store(out + j, u); },
                               [&](int64_t j, V u) { store_end(out + j, u, classes - j); });
  } else {
    sum = rest.sum(top, [](int64_t, V) {}, [](int64_t, V) {});
  }
  if (sum != sum) return poisoned();
  const double d = (own - static_cast<double>(top)) - math::log_nonnegative(sum);
  const double tail = math::log1p_nonnegative(math::exp_nonpositive(d < 0.0 ? d : -d));
  put((d < 0.0 ? -d : 0.0) + tail, 0.0 - ((d > 0.0 ? d : 0.0) + tail));
  if (out == nullptr) return;

  const C inverse = static_cast<C>(1.0 / sum);
  if constexpr (keeps) {
    int64_t j = 0;
    for (; j + lanes <= classes; j += lanes) store(out + j, load_unaligned<V>(out + j) * inverse);
    for (; j < classes; ++j) out[j] *= inverse;
  } else {
    const V tops = V{} + top;
    int64_t j = 0;
    for (; j + lanes <= classes; j += lanes) store(out + j, exp_difference(rest.at(j), tops) * inverse);
    if (j < classes) store_end(out + j, exp_difference(rest.end(j), tops) * inverse, classes - j);
  }
  out[y] = Format<T>::kMinusOne;
}

}  // namespace

Outcome unmasked_cross_entropy(const UnmaskedCrossEntropy& call) {
  FirstBadRow bad_label;
  const int64_t rows_per_task = 1 + (int64_t{1} << 14) / (call.C + 1);
  const int64_t tasks = (call.N + rows_per_task - 1) / rows_per_task;
  with_element(call.logits.dtype, [&](auto* type) {
    using T = ElementOf<decltype(type)>;
    parallel_for(call.threads, tasks, [&](int64_t task, int) {
      const int64_t last = (task + 1) * rows_per_task < call.N ? (task + 1) * rows_per_task : call.N;
      for (int64_t n = task * rows_per_task; n < last; ++n) one_row<T>(call, n, bad_label);
    });
  });
  return bad_label.outcome();
}

}  // namespace flatcore::cpu::FLATCORE_TARGET
