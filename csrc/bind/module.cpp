// The contents of flatcore._core: one register function per stem.
#include "bind/bind.h"
#include "bind/exchange.h"

namespace py = pybind11;

PYBIND11_MODULE(_core, module) {
  module.doc() = "Compiled kernels of flatcore; private.";
  module.attr("ABI") = FLATCORE_ABI;
  module.attr("VERSION") = FLATCORE_VERSION;
  module.attr("COMPILER") = FLATCORE_COMPILER;
  module.def("cpu_targets", [] {
    py::list names;
    for (const auto* target : flatcore::cpu::usable_targets()) names.append(target->name);
    return py::tuple(names);
  });
  module.def(
      "cpu_target", [](const std::string& name) { return flatcore::bind::kernels_of(name).name; }, py::arg("name"));
  flatcore::bind::register_exchange(module);
  flatcore::bind::register_head_problem(module);
  flatcore::bind::register_head_metrics(module);
  flatcore::bind::register_head_metrics_backward(module);
  flatcore::bind::register_row_norms(module);
  flatcore::bind::register_unmasked_cross_entropy(module);
}
