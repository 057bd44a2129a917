// SIMD vectors of the CPU target this file is compiled for, as compiler vector types; included by target sources only.
//
// Everything lives in the target's namespace or is forced inline: see math/portable.h for why.
#pragma once

#include <cstddef>
#include <cstdint>

#include "element.h"
#include "math/exp_log.h"

#if defined(FLATCORE_TARGET_avx512) || defined(FLATCORE_TARGET_avx2)
#include <immintrin.h>
#endif

namespace flatcore::cpu::FLATCORE_TARGET {

#if defined(FLATCORE_TARGET_avx512)
constexpr int kVectorBytes = 64;
#elif defined(FLATCORE_TARGET_avx2)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float FloatV __attribute__((vector_size(kVectorBytes)));
typedef double DoubleV __attribute__((vector_size(kVectorBytes)));
typedef uint64_t UInt64V __attribute__((vector_size(kVectorBytes)));
typedef uint32_t UInt32V __attribute__((vector_size(kVectorBytes)));
typedef int32_t Int32V __attribute__((vector_size(kVectorBytes)));
typedef uint16_t UInt16V __attribute__((vector_size(kVectorBytes / 2)));
// as many lanes as a DoubleV has
typedef float HalfFloatV __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t HalfUInt32V __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t QuarterUInt16V __attribute__((vector_size(kVectorBytes / 4)));

constexpr int kFloats = kVectorBytes / 4;
constexpr int kDoubles = kVectorBytes / 8;

template <class C>
struct VectorOf;
template <>
struct VectorOf<float> {
  using Type = FloatV;
  using Index = Int32V;
  static constexpr int kLanes = kFloats;
};
template <>
struct VectorOf<double> {
  typedef int64_t Int64V __attribute__((vector_size(kVectorBytes)));
  using Type = DoubleV;
  using Index = Int64V;
  static constexpr int kLanes = kDoubles;
};

template <class V, class T>
FLATCORE_INLINE V load_unaligned(const T* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(V));
  return v;
}
template <class V, class T>
FLATCORE_INLINE void store_unaligned(T* to, V v) {
  __builtin_memcpy(to, &v, sizeof(V));
}

// Scalar conversions, exact.
FLATCORE_INLINE float widen(BHalf x) { return math::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
FLATCORE_INLINE float widen(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000U) << 16;
  const uint32_t exponent = (x.bits >> 10) & 31U;
  const uint32_t mantissa = x.bits & 1023U;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24, exact in float
    const float magnitude = static_cast<float>(static_cast<int>(mantissa)) * 0x1p-24F;
    return sign ? -magnitude : magnitude;
  }
  const uint32_t bits = exponent == 31 ? 0x7f800000U | (mantissa << 13) : ((exponent + 112U) << 23) | (mantissa << 13);
  return math::bit_cast<float>(sign | bits);
}
FLATCORE_INLINE float widen(float x) { return x; }
FLATCORE_INLINE double widen(double x) { return x; }

// kLanes consecutive elements of any type as a vector of the compute type C.
// Written out: GCC 12 splits the generic conversion to 64 bytes into quarters (row_norms 1.2 times as long).
FLATCORE_INLINE DoubleV to_double(HalfFloatV v) {
#if defined(FLATCORE_TARGET_avx512)
  return math::bit_cast<DoubleV>(_mm512_maskz_cvtps_pd(0xff, math::bit_cast<__m256>(v)));
#elif defined(FLATCORE_TARGET_avx2)
  return math::bit_cast<DoubleV>(_mm256_cvtps_pd(math::bit_cast<__m128>(v)));
#else
  return __builtin_convertvector(v, DoubleV);
#endif
}
FLATCORE_INLINE HalfFloatV to_float(DoubleV v) {
#if defined(FLATCORE_TARGET_avx512)
  return math::bit_cast<HalfFloatV>(_mm512_maskz_cvtpd_ps(0xff, math::bit_cast<__m512d>(v)));
#elif defined(FLATCORE_TARGET_avx2)
  return math::bit_cast<HalfFloatV>(_mm256_cvtpd_ps(math::bit_cast<__m256d>(v)));
#else
  return __builtin_convertvector(v, HalfFloatV);
#endif
}

template <class C>
struct Load;
template <>
struct Load<float> {
  FLATCORE_INLINE FloatV from(const float* p) { return load_unaligned<FloatV>(p); }
  FLATCORE_INLINE FloatV from(const BHalf* p) {
    const UInt16V bits = load_unaligned<UInt16V>(p);
    return math::bit_cast<FloatV>(__builtin_convertvector(bits, UInt32V) << 16U);
  }
  FLATCORE_INLINE FloatV from(const Half* p) {
#if defined(FLATCORE_TARGET_avx512)
    // the masked form: GCC 12 warns of an uninitialised value inside the plain one
    return math::bit_cast<FloatV>(_mm512_maskz_cvtph_ps(0xffff, load_unaligned<__m256i>(p)));
#elif defined(FLATCORE_TARGET_avx2)
    return math::bit_cast<FloatV>(_mm256_cvtph_ps(load_unaligned<__m128i>(p)));
#else
    FloatV v = {};
    for (int lane = 0; lane < kFloats; ++lane) v[lane] = widen(p[lane]);
    return v;
#endif
  }
};
template <>
struct Load<double> {
  FLATCORE_INLINE DoubleV from(const double* p) { return load_unaligned<DoubleV>(p); }
  FLATCORE_INLINE DoubleV from(const float* p) { return to_double(load_unaligned<HalfFloatV>(p)); }
  FLATCORE_INLINE DoubleV from(const BHalf* p) {
    const HalfUInt32V bits = __builtin_convertvector(load_unaligned<QuarterUInt16V>(p), HalfUInt32V) << 16U;
    return to_double(math::bit_cast<HalfFloatV>(bits));
  }
  // a lane at a time took 4 ns an element, and so as long as the product of a wide head that is read for its norms
  FLATCORE_INLINE DoubleV from(const Half* p) {
#if defined(FLATCORE_TARGET_avx512)
    return to_double(math::bit_cast<HalfFloatV>(_mm256_maskz_cvtph_ps(0xff, load_unaligned<__m128i>(p))));
#elif defined(FLATCORE_TARGET_avx2)
    return to_double(math::bit_cast<HalfFloatV>(_mm_cvtph_ps(_mm_loadu_si64(p))));
#else
    DoubleV v = {};
    for (int lane = 0; lane < kDoubles; ++lane) v[lane] = widen(p[lane]);
    return v;
#endif
  }
};

template <class L>
using VectorOfL = typename VectorOf<L>::Type;

// The first `count` elements, fewer than a vector, zeros behind them.
template <class L, class T>
FLATCORE_INLINE VectorOfL<L> load_some(const T* from, int64_t count) {
  alignas(64) T padded[VectorOf<L>::kLanes] = {};
  __builtin_memcpy(static_cast<void*>(padded), from, static_cast<size_t>(count) * sizeof(T));
  return Load<L>::from(padded);
}

// |x| by clearing the sign: NaN stays NaN.
FLATCORE_INLINE DoubleV magnitude(DoubleV x) {
  return math::bit_cast<DoubleV>(math::bit_cast<UInt64V>(x) & uint64_t{0x7fffffffffffffff});
}
FLATCORE_INLINE FloatV magnitude(FloatV x) {
  return math::bit_cast<FloatV>(math::bit_cast<UInt32V>(x) & uint32_t{0x7fffffff});
}

// The lanes as doubles, in order.
FLATCORE_INLINE void split(DoubleV v, DoubleV (&wide)[1]) { wide[0] = v; }
FLATCORE_INLINE void split(FloatV v, DoubleV (&wide)[2]) {
  HalfFloatV halves[2];
  __builtin_memcpy(halves, &v, sizeof(v));
  wide[0] = to_double(halves[0]);
  wide[1] = to_double(halves[1]);
}

// Sum of the lanes in a fixed order.
template <class V>
FLATCORE_INLINE double sum_lanes(V v) {
  double sum = 0.0;
  for (size_t lane = 0; lane < sizeof(V) / sizeof(v[0]); ++lane) sum += static_cast<double>(v[lane]);
  return sum;
}

// The lanes as doubles, the two halves of a float vector added.
FLATCORE_INLINE DoubleV widened_sum(DoubleV v) { return v; }
FLATCORE_INLINE DoubleV widened_sum(FloatV v) {
  DoubleV wide[2];
  split(v, wide);
  return wide[0] + wide[1];
}

// Calls f with a typed null pointer of the element type: the one switch over dtypes.
template <class F>
FLATCORE_INLINE void with_element(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat16:
      return f(static_cast<const Half*>(nullptr));
    case Dtype::kBFloat16:
      return f(static_cast<const BHalf*>(nullptr));
    case Dtype::kFloat32:
      return f(static_cast<const float*>(nullptr));
    case Dtype::kFloat64:
      return f(static_cast<const double*>(nullptr));
  }
}

}  // namespace flatcore::cpu::FLATCORE_TARGET

namespace flatcore::math {
template <>
struct Shape<flatcore::cpu::FLATCORE_TARGET::DoubleV> {
  using Bits = flatcore::cpu::FLATCORE_TARGET::UInt64V;
};
template <>
struct Shape<flatcore::cpu::FLATCORE_TARGET::FloatV> {
  using Bits = flatcore::cpu::FLATCORE_TARGET::UInt32V;
};
}  // namespace flatcore::math
