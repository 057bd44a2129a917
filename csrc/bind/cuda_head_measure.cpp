#include "bind/bind.h"
#include "bind/cuda.h"
#include "cuda/head_measure.h"

namespace flatcore::bind {

void register_cuda_head_measure(py::module_& module) {
  module.def(
      "cuda_head_measure",
      [](int device, uintptr_t stream, const Problem& problem, uintptr_t sample_weights, const py::object& class_weight,
         int reduction, bool log, bool count_rows, uintptr_t value, bool double_value, uintptr_t row_logs,
         uintptr_t workspace) {
        cuda::HeadMeasure call;
        static_cast<HeadProblem&>(call) = problem;
        call.device = device;
        call.stream = pointer<void>(stream);
        call.sample_weights = pointer<const double>(sample_weights);
        call.class_weight = matrix(class_weight);
        call.reduction = static_cast<cuda::Reduction>(reduction);
        call.log = log;
        call.count_rows = count_rows;
        call.value = pointer<void>(value);
        call.double_value = double_value;
        call.row_logs = pointer<double>(row_logs);
        call.workspace = pointer<double>(workspace);
        run_released([&] { return cuda::head_measure(call); });
      },
      py::arg("device"), py::arg("stream"), py::arg("problem"), py::arg("sample_weights"), py::arg("class_weight"),
      py::arg("reduction"), py::arg("log"), py::arg("count_rows"), py::arg("value"), py::arg("double_value"),
      py::arg("row_logs"), py::arg("workspace"),
      "A measure of a small head, reduced, on a CUDA device; row_logs become log coefficients.");
  module.def(
      "cuda_head_measure_backward_workspace",
      [](const Problem& problem) { return cuda::head_measure_backward_workspace(problem); }, py::arg("problem"),
      "Doubles of workspace that cuda_head_measure_backward needs.");
  module.def(
      "cuda_head_measure_backward",
      [](int device, uintptr_t stream, const Problem& problem, const py::object& upstream, uintptr_t log_coefficient,
         uintptr_t workspace, const py::object& d_features, const py::object& d_weight, const py::object& d_bias,
         const py::object& d_logits) {
        cuda::HeadMeasureBackward call;
        static_cast<HeadProblem&>(call) = problem;
        call.device = device;
        call.stream = pointer<void>(stream);
        call.upstream = matrix(upstream);
        call.log_coefficient = pointer<const double>(log_coefficient);
        call.workspace = pointer<double>(workspace);
        call.d_features = matrix(d_features);
        call.d_weight = matrix(d_weight);
        call.d_bias = matrix(d_bias);
        call.d_logits = matrix(d_logits);
        run_released([&] { return cuda::head_measure_backward(call); });
      },
      py::arg("device"), py::arg("stream"), py::arg("problem"), py::arg("upstream"), py::arg("log_coefficient"),
      py::arg("workspace"), py::arg("d_features"), py::arg("d_weight"), py::arg("d_bias"), py::arg("d_logits"),
      "Its gradients, contiguous and each of its own dtype; None where not wanted.");
}

}  // namespace flatcore::bind
