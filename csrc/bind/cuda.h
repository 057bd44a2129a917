// What the bindings of CUDA kernels share.
#pragma once

#include "bind/bind.h"
#include "cuda/device.h"

namespace flatcore::bind {

void register_cuda_head(py::module_& module);
void register_cuda_head_measure(py::module_& module);

// Launches without the interpreter's lock; raises what CUDA refused.
template <class Launch>
void run_released(Launch launch) {
  cuda::Launched launched;
  {
    py::gil_scoped_release release;
    launched = launch();
  }
  if (launched.error != nullptr) throw std::runtime_error(std::string(launched.what) + ": " + launched.error);
}

}  // namespace flatcore::bind
