// Elements on the device and, for tests, on the host: widened, narrowed, and loaded 16 bytes at a time.
#pragma once

#include "element.h"
#include "math/exp_log.h"

namespace flatcore::cuda {

FLATCORE_INLINE double widened(double x) { return x; }
FLATCORE_INLINE float widened(float x) { return x; }
FLATCORE_INLINE float widened(BHalf x) { return math::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
// float16: one instruction of the device; elsewhere by its exponent: 2^112 brings the exponent of a float16 in a
// float's place to its value, and is exact for subnormals too; exponent 31 is infinity or NaN.
FLATCORE_INLINE float widened(Half x) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffU) << 13;
  const uint32_t not_finite = magnitude >= 0x0f800000U ? 0x70000000U : 0U;
  const float value = math::bit_cast<float>(magnitude | not_finite) * (not_finite != 0U ? 1.0F : 0x1p112F);
  return (x.bits & 0x8000U) != 0U ? -value : value;
#endif
}

// Finite values within the type's range, and NaN, rounded to the nearest, ties to even.
template <class T>
struct Narrowed;
template <>
struct Narrowed<double> {
  static FLATCORE_METHOD double of(double x) { return x; }
};
template <>
struct Narrowed<float> {
  static FLATCORE_METHOD float of(float x) { return x; }
};
template <>
struct Narrowed<BHalf> {
  static FLATCORE_METHOD BHalf of(float x) {
    const uint32_t bits = math::bit_cast<uint32_t>(x);
    if (x != x) return {0x7fc0};
    return {static_cast<uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16)};
  }
};
template <>
struct Narrowed<Half> {
  static FLATCORE_METHOD Half of(float x) {
    if (x != x) return {0x7e00};
    const float a = x < 0.0F ? -x : x;
    const uint32_t bits = math::bit_cast<uint32_t>(a);
    // normal: the exponent from bias 127 to 15 and 13 bits off; below 2^-14: next to 0.5 float's last bit is worth
    // 2^-24, float16's least number
    const uint32_t normal = (bits - (112U << 23) + 0xfffU + ((bits >> 13) & 1U)) >> 13;
    const uint32_t small = math::bit_cast<uint32_t>(a + 0.5F) - 0x3f000000U;
    return {static_cast<uint16_t>((a < 0x1p-14F ? small : normal) | (x < 0.0F ? 0x8000U : 0U))};
  }
};

// Elements in 16 bytes, the widest load.
template <class T>
struct alignas(16) Pack {
  static constexpr int kCount = 16 / static_cast<int>(sizeof(T));
  T items[kCount];
};

// How a run of `count` elements from x on is read: so many one by one up to a 16-byte boundary, then whole packs.
struct Split {
  int64_t head, packs;
};
template <class T>
FLATCORE_INLINE Split split_of(const T* x, int64_t count) {
  const auto address = reinterpret_cast<uintptr_t>(x);
  if (address % sizeof(T) != 0) return {count, 0};
  const int64_t skip = static_cast<int64_t>((16 - address % 16) % 16 / sizeof(T));
  const int64_t head = skip < count ? skip : count;
  return {head, (count - head) / Pack<T>::kCount};
}

}  // namespace flatcore::cuda
