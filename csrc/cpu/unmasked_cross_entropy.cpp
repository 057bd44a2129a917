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

// `count` elements, fewer than a vector, the other lanes masked classes; and back. With AVX-512's masks a row of 10
// classes takes half the time that it takes through a buffer, whose reload waits for the stores.
#if defined(FLATCORE_TARGET_avx512)
template <class C>
FLATCORE_INLINE DoubleV load_end(const double* from, int64_t count) {
  const auto lanes = static_cast<__mmask8>((1U << count) - 1U);
  return math::bit_cast<DoubleV>(_mm512_mask_loadu_pd(_mm512_set1_pd(-math::kInfinity), lanes, from));
}
template <class C>
FLATCORE_INLINE FloatV load_end(const float* from, int64_t count) {
  const auto lanes = static_cast<__mmask16>((1U << count) - 1U);
  return math::bit_cast<FloatV>(_mm512_mask_loadu_ps(_mm512_set1_ps(-__builtin_inff()), lanes, from));
}
template <class C, class H>
FLATCORE_INLINE FloatV load_end(const H* from, int64_t count) {
  H padded[kFloats];
  const auto lanes = static_cast<__mmask16>((1U << count) - 1U);
  const auto masked = _mm256_set1_epi16(static_cast<int16_t>(Format<H>::kMasked.bits));
  store_unaligned(padded, _mm256_mask_loadu_epi16(masked, lanes, from));
  return Load<float>::from(padded);
}
FLATCORE_INLINE void store_end(double* to, DoubleV v, int64_t count) {
  _mm512_mask_storeu_pd(to, static_cast<__mmask8>((1U << count) - 1U), math::bit_cast<__m512d>(v));
}
FLATCORE_INLINE void store_end(float* to, FloatV v, int64_t count) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1U << count) - 1U), math::bit_cast<__m512>(v));
}
template <class H>
FLATCORE_INLINE void store_end(H* to, FloatV v, int64_t count) {
  H whole[kFloats];
  store(whole, v);
  _mm256_mask_storeu_epi16(to, static_cast<__mmask16>((1U << count) - 1U), load_unaligned<__m256i>(whole));
}
#else
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
#endif

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
    // a branch, taken once per row, is cheaper than a comparison with every vector's indices
    const int64_t at = y_ - j;
    if (at < 0 || at >= kLanes) return v;
    typename VectorOf<C>::Index lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    return lane == static_cast<std::remove_reference_t<decltype(lane[0])>>(at) ? V{} - static_cast<C>(math::kInfinity)
                                                                               : v;
  }

  const T* z_;
  int64_t classes_;
  int64_t y_;
};

// What a row's loss and scale follow from: d = difference - log sum.
struct RowSums {
  double difference;  // z_y less the largest of the other logits
  double sum;         // of the exponentials of the others, relative to it
};
// Loss 0 and scale -inf: an ignored row, or a label that is the only class there is.
constexpr RowSums kNothing{math::kInfinity, 1.0}, kPoison{kNan, 1.0};

// Writes the cotangent of row n and returns the sums.
template <class T>
RowSums one_row(const UnmaskedCrossEntropy& call, int64_t n, FirstBadRow& bad_label) {
  using C = typename Format<T>::Compute;
  using V = typename VectorOf<C>::Type;
  constexpr int lanes = VectorOf<C>::kLanes;
  const int64_t classes = call.C;
  const T* z = static_cast<const T*>(call.logits.data) + n * call.logits.row_stride;
  T* out = call.cotangent == nullptr ? nullptr : static_cast<T*>(call.cotangent) + n * classes;
  const auto constant_row = [&](RowSums sums, T value) {
    for (int64_t j = 0; j < classes && out != nullptr; ++j) out[j] = value;
    return sums;
  };

  const int64_t y = call.target[n];
  if (y == call.ignore_index) return constant_row(kNothing, T{});
  if (y < 0 || y >= classes) {
    bad_label.report(n);
    return kPoison;
  }
  const double own = static_cast<double>(widen(z[y]));
  const Rest<T> rest(z, classes, y);
  const C top = rest.top();
  if (!(own < math::kInfinity) || !(top < math::kInfinity)) return constant_row(kPoison, Format<T>::kNotANumber);
  if (top == -math::kInfinity) {
    // no other class is there, or NaN
    bool nan = own == -math::kInfinity;
    for (int64_t j = 0; j < classes; ++j) nan |= widen(z[j]) != widen(z[j]);
    return nan ? constant_row(kPoison, Format<T>::kNotANumber) : constant_row(kNothing, T{});
  }

  // The exponentials wait for their sum in the output itself, or, where that is too narrow to keep them without a
  // second rounding, in a buffer that fits the first-level cache; of longer rows they are taken twice.
  constexpr bool narrow = sizeof(T) < sizeof(C);
  constexpr int64_t buffered = narrow ? 4096 : 1;
  alignas(64) C buffer[buffered];
  const auto summed = [&](C* u) {
    return rest.sum(
        top, [&](int64_t j, V v) { store_unaligned(u + j, v); },
        [&](int64_t j, V v) { store_end(u + j, v, classes - j); });
  };
  C* kept = nullptr;
  if constexpr (narrow) {
    kept = out != nullptr && classes <= buffered ? buffer : nullptr;
  } else {
    kept = out;
  }
  const double sum = kept != nullptr ? summed(kept) : rest.sum(top, [](int64_t, V) {}, [](int64_t, V) {});
  if (sum != sum) return constant_row(kPoison, Format<T>::kNotANumber);
  const RowSums sums{own - static_cast<double>(top), sum};
  if (out == nullptr) return sums;

  const C inverse = static_cast<C>(1.0 / sum);
  const V tops = V{} + top;
  int64_t j = 0;
  if (kept != nullptr) {
    for (; j + lanes <= classes; j += lanes) store(out + j, load_unaligned<V>(kept + j) * inverse);
    if (j < classes) store_end(out + j, load_end<C>(kept + j, classes - j) * inverse, classes - j);
  } else {
    for (; j + lanes <= classes; j += lanes) store(out + j, exp_difference(rest.at(j), tops) * inverse);
    if (j < classes) store_end(out + j, exp_difference(rest.end(j), tops) * inverse, classes - j);
  }
  out[y] = Format<T>::kMinusOne;
  return sums;
}

// Rows first..last; the logs of several rows are taken together: one row's alone would take as long as 40 classes.
template <class T>
void several_rows(const UnmaskedCrossEntropy& call, int64_t first, int64_t last, FirstBadRow& bad_label) {
  using C = typename Format<T>::Compute;
  constexpr int together = 16;
  static_assert(together % kDoubles == 0, "whole vectors of rows");
  for (int64_t n = first; n < last; n += together) {
    const int rows = last - n < together ? static_cast<int>(last - n) : together;
    alignas(64) double difference[together] = {}, sum[together], loss[together], log_scale[together];
    for (double& s : sum) s = 1.0;
    for (int i = 0; i < rows; ++i) {
      const RowSums sums = one_row<T>(call, n + i, bad_label);
      difference[i] = sums.difference;
      sum[i] = sums.sum;
    }
    for (int i = 0; i < together; i += kDoubles) {
      const DoubleV zero = {};
      const DoubleV d =
          load_unaligned<DoubleV>(difference + i) - math::log_nonnegative(load_unaligned<DoubleV>(sum + i));
      const DoubleV tail = math::log1p_nonnegative(math::exp_nonpositive(d < 0.0 ? d : -d));
      store_unaligned(loss + i, (d < 0.0 ? -d : zero) + tail);
      store_unaligned(log_scale + i, zero - ((d > 0.0 ? d : zero) + tail));
    }
    for (int i = 0; i < rows; ++i) {
      static_cast<C*>(call.loss)[n + i] = static_cast<C>(loss[i]);
      static_cast<C*>(call.log_scale)[n + i] = static_cast<C>(log_scale[i]);
    }
  }
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
      several_rows<T>(call, task * rows_per_task, last, bad_label);
    });
  });
  return bad_label.outcome();
}

}  // namespace flatcore::cpu::FLATCORE_TARGET
