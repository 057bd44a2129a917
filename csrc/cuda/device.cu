#include <cuda_runtime_api.h>

#include "cuda/device.h"

namespace flatcore::cuda {

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

const char* architectures() { return FLATCORE_CUDA_ARCHITECTURES; }

}  // namespace flatcore::cuda
