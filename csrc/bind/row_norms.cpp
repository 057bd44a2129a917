#include "bind/bind.h"

namespace flatcore::bind {

void register_row_norms(py::module_& module) {
  module.def("row_norms_workspace", &cpu::row_norms_workspace, py::arg("N"), py::arg("K"),
             "Doubles of workspace that row_norms needs.");
  module.def(
      "row_norms",
      [](const std::string& cpu_target, const py::object& x, int64_t N, int64_t K, int threads, uintptr_t l1,
         uintptr_t l2, uintptr_t linf, uintptr_t workspace) {
        check_size("N", N, 0);
        check_size("K", K, 0);
        cpu::RowNorms call;
        call.x = matrix(x);
        call.N = N;
        call.K = K;
        call.threads = threads;
        call.l1 = pointer<void>(l1);
        call.l2 = pointer<void>(l2);
        call.linf = pointer<void>(linf);
        call.workspace = pointer<double>(workspace);
        const cpu::Target& kernels = kernels_of(cpu_target);
        py::gil_scoped_release release;
        kernels.row_norms(call);
      },
      py::arg("cpu_target"), py::arg("x"), py::arg("N"), py::arg("K"), py::arg("threads"), py::arg("l1"), py::arg("l2"),
      py::arg("linf"), py::arg("workspace"), "Norms of every row, written to the addresses that are not 0.");
}

}  // namespace flatcore::bind
