// CUDA on the host, for tests: the kernels' own sources compile against this header, and every thread of a block is a
// fiber. A barrier or a shuffle is where a fiber stops and the next one runs, so the order of the threads between two
// barriers is the emulator's choice (set_order): a result that depends on it shows a race. A barrier that not all
// threads reach is an error, not a hang. Blocks run one after the other; streams and devices do not exist.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <set>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

#define CUDART_VERSION 13000

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  explicit dim3(unsigned x_ = 1) : x(x_) {}
};

namespace emulator {

extern dim3 thread_index, block_index, grid_size, block_size;

// Runs the kernel for every thread of every block; throws what went wrong.
void run(dim3 grid, dim3 block, const std::function<void()>& kernel);
void barrier();
int barrier_or(int predicate);
void warp_barrier();
// Hands in the lane's value, and takes that of lane `source` when all have handed in.
void exchange(void* value, size_t size, int source);
// d = a b + c on a tensor core, with a 16 x k, b k x 8 and c 16 x 8 spread over the warp's registers.
void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4], bool bfloat16);
// Copies that arrive when they are waited for; until then what they were to write is NaN.
void start_copy(void* to, const void* from, int bytes);
void end_group();
void wait_for_groups_but(int count);

}  // namespace emulator

#define threadIdx ::emulator::thread_index
#define blockIdx ::emulator::block_index
#define gridDim ::emulator::grid_size
#define blockDim ::emulator::block_size

inline void __syncthreads() { emulator::barrier(); }
inline int __syncthreads_or(int predicate) { return emulator::barrier_or(predicate); }
inline void __syncwarp(unsigned = 0xffffffffU) { emulator::warp_barrier(); }

template <class Value>
Value emulated_exchange(Value value, int source) {
  emulator::exchange(&value, sizeof(Value), source);
  return value;
}
// Lanes beyond the warp: the lane's own value, as on the device.
template <class Word>
Word __shfl_down_sync(unsigned, Word value, unsigned offset) {
  const int lane = static_cast<int>(threadIdx.x % 32), source = lane + static_cast<int>(offset);
  return emulated_exchange(value, source < 32 ? source : lane);
}
template <class Word>
Word __shfl_xor_sync(unsigned, Word value, int mask) {
  return emulated_exchange(value, static_cast<int>(threadIdx.x % 32) ^ mask);
}
template <class Word>
Word __shfl_sync(unsigned, Word value, int source) {
  return emulated_exchange(value, source);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  unsigned all = 0;
  for (int lane = 0; lane < 32; ++lane) {
    all |= emulated_exchange(static_cast<unsigned>(predicate != 0), lane) << lane;
  }
  return all;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
template <class T>
T __ldg(const T* address) {
  return *address;
}

// ------------------------------------------------------------------------------------------------------- the runtime
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNoKernelImageForDevice = 209 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed = 2 };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76 };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0 };
constexpr unsigned long long cudaEnableDefault = 0;
struct cudaFuncAttributes {};

namespace emulator {

// What a process sees of its devices; kernels run on the host whatever the current one is.
struct Devices {
  static constexpr int kCount = 2;
  int current = 0;
  bool active[kCount] = {true, false};  // contexts: the first device has tensors on it
  int capability[kCount] = {80, 80};
  cudaError_t image = cudaSuccess;  // what the query of a kernel's attributes says
  int queries = 0;                  // how often it was made
  std::set<const void*> loaded;     // of which kernels, whatever the device
  int launches = 0;                 // of kernels
  bool dry = false;                 // launches are counted, and nothing runs
};
extern Devices devices;

int context_state(int device, unsigned* flags, int* active);

}  // namespace emulator

inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaSuccess                       ? "no error"
         : status == cudaErrorNoKernelImageForDevice ? "no kernel image is available for execution on the device"
                                                     : "invalid";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = emulator::devices.current, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= emulator::Devices::kCount) return cudaErrorInvalidValue;
  emulator::devices.active[device] = true;
  return emulator::devices.current = device, cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = emulator::Devices::kCount, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= emulator::Devices::kCount) return cudaErrorInvalidValue;
  const int capability = emulator::devices.capability[device];
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? capability / 10 : capability % 10;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult*) {
  *function = reinterpret_cast<void*>(&emulator::context_state);
  return cudaSuccess;
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel* kernel) {
  ++emulator::devices.queries;
  emulator::devices.loaded.insert(reinterpret_cast<const void*>(kernel));
  return emulator::devices.image;
}

template <class... Parameters, size_t... index>
void emulated_call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<index...>) {
  kernel(*static_cast<Parameters*>(arguments[index])...);
}
template <class... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments, size_t,
                             cudaStream_t) {
  if (grid.x == 0 || block.x == 0 || block.x > 1024) return cudaErrorInvalidValue;
  ++emulator::devices.launches;
  if (emulator::devices.dry) return cudaSuccess;
  emulator::run(grid, block,
                [&] { emulated_call(kernel, arguments, std::make_index_sequence<sizeof...(Parameters)>{}); });
  return cudaSuccess;
}
