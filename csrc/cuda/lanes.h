// The lanes of a block, so that one body of code runs on the device and, for tests, lane after lane on the host.
//
// A body is written in steps: `each` runs a step for every lane, `reduce` merges the lanes' values in a fixed order and
// gives every lane the result: within a warp lane i takes lane i + 16, then i + 8, ... i + 1; then warp 0 the warps'
// results the same way. The host's class does the same merges in the same order, so that a test of it is a test of the
// order.
#pragma once

#include "math/portable.h"

namespace flatcore::cuda {

#if defined(__CUDA_ARCH__)
#define FLATCORE_UNROLL _Pragma("unroll")
#else
#define FLATCORE_UNROLL
#endif

constexpr int kWarp = 32;

#if defined(__CUDACC__)
#define FLATCORE_BLOCK static __device__ __forceinline__

template <class Value, int lanes>
class DeviceLanes {
  static_assert(lanes % kWarp == 0 && lanes <= kWarp * kWarp, "whole warps, and no more than one can merge");

 public:
  template <class Step>
  __device__ __forceinline__ void each(Step step) {
    step(static_cast<int>(threadIdx.x) % lanes, value_);
  }
  // `shared` holds lanes / 32 values, unused for one warp. With more than one warp all threads of the block take part.
  template <class Merge>
  __device__ __forceinline__ void reduce(Value* shared, Merge merge) {
    within_warp(merge);
    if constexpr (lanes > kWarp) {
      constexpr int warps = lanes / kWarp;
      const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
      if (lane == 0) shared[warp] = value_;
      __syncthreads();
      if (warp == 0) {
        value_ = lane < warps ? shared[lane] : Value{};
        within_warp(merge);
        if (lane == 0) shared[0] = value_;
      }
      __syncthreads();
      value_ = shared[0];
      __syncthreads();  // shared may be written again
    } else {
      value_ = value_.from_first_lane();
    }
  }
  __device__ __forceinline__ const Value& result() const { return value_; }

 private:
  template <class Merge>
  __device__ __forceinline__ void within_warp(Merge merge) {
    FLATCORE_UNROLL
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value_ = merge(value_, value_.from_lane_above(offset));
  }
  Value value_;
};
#else
#define FLATCORE_BLOCK static inline

// The same on the host. A lane that would take from beyond its warp takes its own value, as a shuffle does; what comes
// of it is never read.
template <class Value, int lanes>
class HostLanes {
 public:
  template <class Step>
  void each(Step step) {
    for (int lane = 0; lane < lanes; ++lane) step(lane, values_[lane]);
  }
  template <class Merge>
  void reduce(Value* shared, Merge merge) {
    for (int warp = 0; warp < lanes / kWarp; ++warp) {
      within_warp(values_ + warp * kWarp, merge);
      if (lanes > kWarp) shared[warp] = values_[warp * kWarp];
    }
    if (lanes > kWarp) {
      for (int lane = 0; lane < kWarp; ++lane) values_[lane] = lane < lanes / kWarp ? shared[lane] : Value{};
      within_warp(values_, merge);
    }
    for (int lane = 1; lane < lanes; ++lane) values_[lane] = values_[0];
  }
  const Value& result() const { return values_[0]; }

 private:
  template <class Merge>
  static void within_warp(Value* values, Merge merge) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      Value before[kWarp];
      for (int lane = 0; lane < kWarp; ++lane) before[lane] = values[lane];
      for (int lane = 0; lane < kWarp; ++lane) {
        values[lane] = merge(before[lane], before[lane + offset < kWarp ? lane + offset : lane]);
      }
    }
  }
  Value values_[lanes];
};
#endif

}  // namespace flatcore::cuda
