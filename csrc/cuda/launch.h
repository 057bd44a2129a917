// How kernels are launched: on the caller's device and stream, checked, without waiting; included by .cu files only.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/device.h"

namespace flatcore::cuda {

// The caller's device for the length of a block; the thread's own comes back afterwards.
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
    if (changed_) static_cast<void>(cudaSetDevice(previous_));
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

// A kernel's code is loaded at its first use on a device, which a graph capture does not allow in its usual mode: the
// attributes' query loads it, in the mode that allows it. One query per kernel and device costs a microsecond.
template <class Kernel>
cudaError_t load(Kernel* kernel) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaError_t status = cudaThreadExchangeStreamCaptureMode(&mode);
  if (status != cudaSuccess) return status;
  cudaFuncAttributes attributes;
  status = cudaFuncGetAttributes(&attributes, kernel);
  const cudaError_t restored = cudaThreadExchangeStreamCaptureMode(&mode);
  return status != cudaSuccess ? status : restored;
}

// kernel<<<grid, threads>>>(arguments...) on the stream.
template <class... Parameters>
Launched launch(const char* what, Stream stream, unsigned grid, int threads, void (*kernel)(Parameters...),
                std::common_type_t<Parameters>... arguments) {
  if (const cudaError_t status = load(kernel); status != cudaSuccess) return launched(status, what);
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
