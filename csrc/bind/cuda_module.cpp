// The contents of flatcore._cuda: the kernels of CUDA devices, in a module of their own that an import on the CPU never
// loads.
#include "bind/bind.h"
#include "bind/exchange.h"

namespace py = pybind11;

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels of flatcore; private.";
  module.attr("ABI") = FLATCORE_ABI;
  module.attr("VERSION") = FLATCORE_VERSION;
  flatcore::bind::register_exchange(module);
  flatcore::bind::register_head_problem(module);
  flatcore::bind::register_cuda(module);
}
