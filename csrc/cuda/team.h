// Threads that work on one row together: a warp, or a block of whole warps; included by .cu files only.
//
// Merges come in a fixed order, so that two runs agree bit for bit: within a warp lane i takes lane i + 16, then i + 8,
// ... i + 1; then every thread takes the warps' results one after the other.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

#include "math/portable.h"

namespace flatcore::cuda {

#if defined(__CUDA_ARCH__)
#define FLATCORE_UNROLL _Pragma("unroll")
#define FLATCORE_ROLLED _Pragma("unroll 1")  // where the registers would not do for several steps at once
#else
#define FLATCORE_UNROLL
#define FLATCORE_ROLLED
#endif

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffU;

// A value of another lane: shuffle(word) gives the other lane's word. Emulated threads exchange values as they are.
template <class Value, class Shuffle>
__device__ __forceinline__ Value shuffled(const Value& value, Shuffle shuffle) {
  static_assert(sizeof(Value) % 8 == 0, "whole words");
#if defined(__CUDACC__)
  constexpr int words = sizeof(Value) / 8;
  unsigned long long in[words], out[words];
  memcpy(in, &value, sizeof(Value));
  FLATCORE_UNROLL
  for (int i = 0; i < words; ++i) out[i] = shuffle(in[i]);
  Value other;
  memcpy(&other, out, sizeof(Value));
  return other;
#else
  return shuffle(value);
#endif
}

template <int width>
class Team {
  static_assert(width % kWarp == 0, "whole warps");

 public:
  // The block's threads in teams: one team per warp, or the block itself.
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % width; }

  static __device__ __forceinline__ void sync() {
    if constexpr (width > kWarp) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }

  // The merged values of all lanes, known to every lane. All threads of the team take part.
  template <class Value, class Merge>
  static __device__ __forceinline__ Value merged(Value value, Merge merge) {
    FLATCORE_UNROLL
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      value = merge(value, shuffled(value, [&](auto word) {
                      return __shfl_down_sync(kAllLanes, word, static_cast<unsigned>(offset));
                    }));
    }
    if constexpr (width == kWarp) {
      return shuffled(value, [](auto word) { return __shfl_sync(kAllLanes, word, 0); });
    } else {
      constexpr int warps = width / kWarp;
      __shared__ Slot<Value> slots[warps];
      if (threadIdx.x % kWarp == 0) memcpy(slots[threadIdx.x / kWarp].bytes, &value, sizeof(Value));
      __syncthreads();
      memcpy(&value, slots[0].bytes, sizeof(Value));
      for (int warp = 1; warp < warps; ++warp) {
        Value next;
        memcpy(&next, slots[warp].bytes, sizeof(Value));
        value = merge(value, next);
      }
      __syncthreads();  // the slots may be written again
      return value;
    }
  }

 private:
  // Shared memory takes no constructor.
  template <class Value>
  struct alignas(8) Slot {
    unsigned char bytes[sizeof(Value)];
  };
};

// Several sums merged at once.
template <int count>
struct Sums {
  double at[count];
};
struct AddSums {
  template <int count>
  __device__ __forceinline__ Sums<count> operator()(const Sums<count>& a, const Sums<count>& b) const {
    Sums<count> both;
    FLATCORE_UNROLL
    for (int i = 0; i < count; ++i) both.at[i] = a.at[i] + b.at[i];
    return both;
  }
};
// A NaN survives.
struct LargerOf {
  __device__ __forceinline__ double operator()(double a, double b) const {
    return a != a ? a : b > a || b != b ? b : a;
  }
};

}  // namespace flatcore::cuda
