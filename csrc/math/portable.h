// What lets the per-row mathematics compile for CPU targets and for CUDA alike.
//
// Every function here is forced inline with internal linkage: one definition shared between objects compiled for
// different CPU targets would let the linker keep the AVX-512 body for a machine without AVX-512.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FLATCORE_INLINE static __host__ __device__ __forceinline__
#define FLATCORE_METHOD __host__ __device__ __forceinline__
#else
#define FLATCORE_INLINE static inline __attribute__((always_inline))
#define FLATCORE_METHOD inline __attribute__((always_inline))
#endif

namespace flatcore::math {

// The unsigned integer of the same shape as a floating type; SIMD vectors specialise it (cpu/simd.h).
template <class V>
struct Shape;
template <>
struct Shape<double> {
  using Bits = uint64_t;
};
template <>
struct Shape<float> {
  using Bits = uint32_t;
};

template <class To, class From>
FLATCORE_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace flatcore::math
