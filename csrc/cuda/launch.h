// How kernels are launched: on the caller's device and stream, checked, without waiting; included by .cu files only.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cuda/device.h"

namespace flatcore::cuda {

// The caller's device for the length of a block; the thread's own comes back afterwards, unless the process does not
// work on it: making it current again would start it (since CUDA 12), 500 MB for nothing. torch does the same.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    status_ = cudaGetDevice(&previous_);
    if (status_ == cudaSuccess && previous_ != device) {
      status_ = cudaSetDevice(device);
      changed_ = status_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_ && is_active(previous_)) static_cast<void>(cudaSetDevice(previous_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t status() const { return status_; }

 private:
  int previous_ = 0;
  bool changed_ = false;
  cudaError_t status_;
};

inline Launched launched(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return {};
  return {cudaGetErrorString(status), what};
}

// On which of the first 64 devices a kernel is loaded already, a bit each: the query below takes 1 to 3 us, a look here
// a few nanoseconds. Null for a kernel that finds no place; it is asked for at every launch.
inline std::atomic<uint64_t>* devices_with(const void* kernel) {
  struct Slot {
    std::atomic<const void*> kernel{nullptr};
    std::atomic<uint64_t> devices{0};
  };
  constexpr size_t count = 1024;  // several times the kernels of all sources together
  static Slot slots[count];
  const size_t first = reinterpret_cast<uintptr_t>(kernel) / 16;  // functions begin at multiples of 16
  for (size_t i = 0; i < count; ++i) {
    Slot& slot = slots[(first + i) % count];
    const void* found = slot.kernel.load(std::memory_order_acquire);
    if (found == kernel || (found == nullptr && slot.kernel.compare_exchange_strong(found, kernel)) || found == kernel)
      return &slot.devices;
  }
  return nullptr;
}

// A kernel's code is loaded at its first use on a device, which a graph capture does not allow in its usual mode: the
// attributes' query loads it on the current device, in the mode that allows it.
template <class Kernel>
cudaError_t load(Kernel* kernel) {
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  std::atomic<uint64_t>* devices = device < 64 ? devices_with(reinterpret_cast<const void*>(kernel)) : nullptr;
  const uint64_t bit = uint64_t{1} << (device & 63);
  if (devices != nullptr && (devices->load(std::memory_order_relaxed) & bit) != 0) return cudaSuccess;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  status = cudaThreadExchangeStreamCaptureMode(&mode);
  if (status != cudaSuccess) return status;
  cudaFuncAttributes attributes;
  status = cudaFuncGetAttributes(&attributes, kernel);
  const cudaError_t restored = cudaThreadExchangeStreamCaptureMode(&mode);
  if (status == cudaSuccess && devices != nullptr) devices->fetch_or(bit, std::memory_order_relaxed);
  return status != cudaSuccess ? status : restored;
}

// While one lives, this thread's launches load their kernels and do no more (load_all).
class OnlyLoading {
 public:
  OnlyLoading() { active() = true; }
  ~OnlyLoading() { active() = false; }
  OnlyLoading(const OnlyLoading&) = delete;
  OnlyLoading& operator=(const OnlyLoading&) = delete;
  static bool& active() {
    static thread_local bool here = false;
    return here;
  }
};

// kernel<<<grid, threads>>>(arguments...) on the stream.
template <class... Parameters>
Launched launch(const char* what, Stream stream, unsigned grid, int threads, void (*kernel)(Parameters...),
                std::common_type_t<Parameters>... arguments) {
  if (const cudaError_t status = load(kernel); status != cudaSuccess) return launched(status, what);
  if (OnlyLoading::active()) return {};
  void* addresses[] = {static_cast<void*>(&arguments)...};
  return launched(cudaLaunchKernel(kernel, dim3(grid), dim3(static_cast<unsigned>(threads)), addresses, 0,
                                   static_cast<cudaStream_t>(stream)),
                  what);
}

// Blocks for so many tasks, at most what a grid's first dimension takes; kernels walk on in steps of the grid.
inline unsigned grid_for(int64_t tasks) {
  constexpr int64_t most = (int64_t{1} << 31) - 1;
  return static_cast<unsigned>(tasks < most ? tasks : most);
}

}  // namespace flatcore::cuda
