#include "bind/cuda.h"

#include "bind/bind.h"
#include "cuda/row_norms.h"
#include "cuda/unmasked_cross_entropy.h"

namespace flatcore::bind {

void register_cuda(py::module_& module) {
  register_cuda_head(module);
  register_cuda_head_measure(module);
  module.def("cuda_architectures", &cuda::architectures, "The architectures that were compiled.");
  module.def(
      "cuda_runtime",
      [] {
        const cuda::Runtime found = cuda::runtime();
        return py::make_tuple(found.runtime_version, found.driver_version, found.devices, found.reason);
      },
      "Runtime version, driver version, number of devices, and why none can be used (empty if one can).");
  module.def(
      "cuda_device",
      [](int index) {
        const cuda::Device found = cuda::device(index);
        return py::make_tuple(found.capability, found.active, found.reason);
      },
      py::arg("index"),
      "Compute capability (90 is 9.0), whether the process works on the device already, and why no kernel runs there: "
      "asked only where it does, for asking elsewhere would take the device's memory.");
  module.def("cuda_load", &cuda::load_all, py::arg("device"), py::call_guard<py::gil_scoped_release>(),
             "Loads every kernel on a device, so that none is loaded within a graph capture; whether the process works "
             "on it.");
  module.def("cuda_row_norms_workspace", &cuda::row_norms_workspace, py::arg("N"), py::arg("K"),
             "Doubles of workspace that cuda_row_norms needs.");
  module.def(
      "cuda_row_norms",
      [](int device, uintptr_t stream, const py::object& x, int64_t N, int64_t K, uintptr_t l1, uintptr_t l2,
         uintptr_t linf, uintptr_t workspace) {
        check_size("N", N, 0);
        check_size("K", K, 0);
        cuda::RowNorms call;
        call.x = matrix(x);
        call.N = N;
        call.K = K;
        call.device = device;
        call.stream = pointer<void>(stream);
        call.l1 = pointer<void>(l1);
        call.l2 = pointer<void>(l2);
        call.linf = pointer<void>(linf);
        call.workspace = pointer<double>(workspace);
        run_released([&] { return cuda::row_norms(call); });
      },
      py::arg("device"), py::arg("stream"), py::arg("x"), py::arg("N"), py::arg("K"), py::arg("l1"), py::arg("l2"),
      py::arg("linf"), py::arg("workspace"), "row_norms on a CUDA device, on the stream, without waiting for it.");
  module.def(
      "cuda_unmasked_cross_entropy",
      [](int device, uintptr_t stream, const py::object& logits, uintptr_t target, int64_t N, int64_t C,
         int64_t ignore_index, uintptr_t loss, uintptr_t log_scale, uintptr_t cotangent) {
        check_size("N", N, 0);
        check_size("C", C, 1);
        cuda::UnmaskedCrossEntropy call;
        call.logits = matrix(logits);
        if (call.logits.column_stride != 1 && C > 1) throw std::invalid_argument("logits need a column stride of 1");
        call.target = pointer<const int64_t>(target);
        call.N = N;
        call.C = C;
        call.ignore_index = ignore_index;
        call.device = device;
        call.stream = pointer<void>(stream);
        call.loss = pointer<void>(loss);
        call.log_scale = pointer<void>(log_scale);
        call.cotangent = pointer<void>(cotangent);
        run_released([&] { return cuda::unmasked_cross_entropy(call); });
      },
      py::arg("device"), py::arg("stream"), py::arg("logits"), py::arg("target"), py::arg("N"), py::arg("C"),
      py::arg("ignore_index"), py::arg("loss"), py::arg("log_scale"), py::arg("cotangent"),
      "unmasked_cross_entropy on a CUDA device; a row with a label that is no class is NaN.");
}

}  // namespace flatcore::bind
