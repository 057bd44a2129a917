#include "bind/bind.h"

namespace flatcore::bind {

void register_unmasked_cross_entropy(py::module_& module) {
  module.def(
      "unmasked_cross_entropy",
      [](const std::string& cpu_target, const py::object& logits, uintptr_t target, int64_t N, int64_t C,
         int64_t ignore_index, int threads, uintptr_t loss, uintptr_t log_scale, uintptr_t cotangent) {
        check_size("N", N, 0);
        check_size("C", C, 1);
        cpu::UnmaskedCrossEntropy call;
        call.logits = matrix(logits);
        if (C > 1 && call.logits.column_stride != 1) throw std::invalid_argument("logits need column stride 1");
        call.target = pointer<const int64_t>(target);
        call.N = N;
        call.C = C;
        call.ignore_index = ignore_index;
        call.threads = threads;
        call.loss = pointer<void>(loss);
        call.log_scale = pointer<void>(log_scale);
        call.cotangent = pointer<void>(cotangent);
        const cpu::Target& kernels = kernels_of(cpu_target);
        py::gil_scoped_release release;
        const Outcome outcome = kernels.unmasked_cross_entropy(call);
        return outcome.status == Status::kBadLabel ? outcome.row : int64_t{-1};
      },
      py::arg("cpu_target"), py::arg("logits"), py::arg("target"), py::arg("N"), py::arg("C"), py::arg("ignore_index"),
      py::arg("threads"), py::arg("loss"), py::arg("log_scale"), py::arg("cotangent"),
      "Loss, log(1 - p_y) and, unless its address is 0, q - e_y of every row; the first row with a bad label, or -1.");
}

}  // namespace flatcore::bind
