// What came with compute capability 8.0: products on tensor cores, and copies to shared memory that nobody waits for.
// Each stands here once, as the instruction and as the call of the emulator; included by .cu files only.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "element.h"

namespace flatcore::cuda {

#if defined(__CUDACC__) && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 800)
#define FLATCORE_SINCE_80 0
#else
#define FLATCORE_SINCE_80 1
#endif

// Whether this code may use them; a constant, but for the emulator, whose device may be either.
__device__ __forceinline__ bool since_80() {
#if defined(__CUDACC__)
  return FLATCORE_SINCE_80 != 0;
#else
  return emulator::devices.capability[emulator::devices.current] >= 80;
#endif
}

// d = a b + c by a warp: a 16 x k, b k x 8, c and d 16 x 8 in float32. Products are exact; they and c are cut off (not
// rounded) below the last bits of the largest of them. k is what 32 bytes hold: 16 of bfloat16, 8 of tf32 (a float of
// which 11 bits count). With i = lane / 4, j = lane % 4, and a word two of bfloat16 or one of tf32: a lane holds words
// j and j + 4 of b's column i; of a, word j of rows i and i + 8, then word j + 4 of both; of d, columns 2j and 2j + 1
// of row i, then of row i + 8.
template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                             const float (&c)[4]) {
  static_assert(sizeof(T) == sizeof(BHalf) || sizeof(T) == sizeof(float), "BHalf, or float for tf32");
#if !defined(__CUDACC__)
  emulator::multiply_add(d, a, b, c, sizeof(T) == sizeof(BHalf));
#elif FLATCORE_SINCE_80
  if constexpr (sizeof(T) == sizeof(BHalf)) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  }
#endif
}

// Starts to copy the first `bytes` of 16 and zeros behind them, from global to shared memory, both on a 16-byte
// boundary. Kept in the first-level cache where it is read again. What was copied is there for the lane that waited.
template <bool kept>
__device__ __forceinline__ void start_copy(void* shared, const void* global, int bytes) {
#if !defined(__CUDACC__)
  emulator::start_copy(shared, global, bytes);
#elif FLATCORE_SINCE_80
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kept) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
  }
#endif
}
// Makes the lane's copies since the last call a group.
__device__ __forceinline__ void end_group() {
#if !defined(__CUDACC__)
  emulator::end_group();
#elif FLATCORE_SINCE_80
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits for all groups of the lane but the latest `count`.
template <int count>
__device__ __forceinline__ void wait_for_groups_but() {
#if !defined(__CUDACC__)
  emulator::wait_for_groups_but(count);
#elif FLATCORE_SINCE_80
  asm volatile("cp.async.wait_group %0;" ::"n"(count) : "memory");
#endif
}

}  // namespace flatcore::cuda
