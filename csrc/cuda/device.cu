// What the runtime that is linked in finds here: devices, their state, and whether this build has code for them.
#include "cuda/device.h"
#include "cuda/launch.h"

namespace flatcore::cuda {
namespace {

// Stands for all kernels in the question whether a device can run them: all are compiled for the same architectures.
__global__ void present() {}

// The driver's own question, without linking the driver: the module has to load where there is none.
using ContextState = int (*)(int device, unsigned* flags, int* active);
ContextState context_state() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuDevicePrimaryCtxGetState", &found, 7000, cudaEnableDefault, &result);
#else
  const cudaError_t status = cudaGetDriverEntryPoint("cuDevicePrimaryCtxGetState", &found, cudaEnableDefault, &result);
#endif
  if (status == cudaSuccess) return reinterpret_cast<ContextState>(found);
  static_cast<void>(cudaGetLastError());
  return nullptr;
}

}  // namespace

bool is_active(int device) {
  static const ContextState state = context_state();
  unsigned flags = 0;
  int active = 0;
  return state != nullptr && state(device, &flags, &active) == 0 && active != 0;
}

Runtime runtime() {
  Runtime found;
  found.runtime_version = CUDART_VERSION;
  if (cudaDriverGetVersion(&found.driver_version) != cudaSuccess) found.driver_version = 0;
  const cudaError_t status = cudaGetDeviceCount(&found.devices);
  if (status != cudaSuccess) {
    found.devices = 0;
    found.reason = cudaGetErrorString(status);
    static_cast<void>(cudaGetLastError());  // the next call's report is its own
  } else if (found.devices == 0) {
    found.reason = "no CUDA device";
  }
  return found;
}

Device device(int index) {
  Device found;
  int major = 0, minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index) == cudaSuccess) {
    found.capability = 10 * major + minor;
  }
  found.active = is_active(index);
  if (found.active) {
    const DeviceGuard guard(index);
    cudaError_t status = guard.status();
    if (status == cudaSuccess) status = load(&present);
    if (status != cudaSuccess) found.reason = cudaGetErrorString(status);
  }
  static_cast<void>(cudaGetLastError());
  return found;
}

const char* architectures() { return FLATCORE_CUDA_ARCHITECTURES; }

}  // namespace flatcore::cuda
