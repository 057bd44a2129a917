#include "bind/bind.h"

namespace flatcore::bind {
namespace {

Problem make_problem(const py::object& features, const py::object& weight, const py::object& logits, uintptr_t bias,
                     uintptr_t target_labels, int64_t N, int64_t D, int64_t C, double temperature, int64_t ignore_index,
                     bool include_bias, int norm_power, uint32_t fields, bool double_compute, int threads,
                     uintptr_t values, bool double_values, uintptr_t prediction) {
  check_size("N", N, 0);
  check_size("D", D, 0);
  check_size("C", C, 1);
  check_size("threads", threads, 1);
  if (include_bias && bias == 0) throw std::invalid_argument("include_bias needs a bias");
  if (fields >> kFieldCount != 0) throw std::invalid_argument("unknown field");
  Problem problem;
  problem.features = matrix(features);
  problem.weight = matrix(weight);
  problem.logits = matrix(logits);
  problem.bias = pointer<const double>(bias);
  problem.target = pointer<const int64_t>(target_labels);
  problem.N = N;
  problem.D = D;
  problem.C = C;
  problem.temperature = temperature;
  problem.ignore_index = ignore_index;
  problem.include_bias = include_bias;
  problem.norm_power = norm_power;
  problem.fields = fields;
  problem.double_compute = double_compute;
  problem.threads = threads;
  problem.values = pointer<void>(values);
  problem.double_values = double_values;
  problem.values_stride = N;
  problem.prediction = pointer<int64_t>(prediction);
  return problem;
}

}  // namespace

void register_head_problem(py::module_& module) {
  module.attr("HEAD_ROW_BYTES") = sizeof(HeadRow);
  module.attr("HEAD_BACKWARD_ROW_BYTES") = sizeof(HeadBackwardRow);
  py::class_<Problem>(module, "HeadProblem", py::module_local())
      .def(py::init(&make_problem), py::arg("features"), py::arg("weight"), py::arg("logits"), py::arg("bias"),
           py::arg("target"), py::arg("N"), py::arg("D"), py::arg("C"), py::arg("temperature"), py::arg("ignore_index"),
           py::arg("include_bias"), py::arg("norm_power"), py::arg("fields"), py::arg("double_compute"),
           py::arg("threads"), py::arg("values"), py::arg("double_values"), py::arg("prediction"));
}

}  // namespace flatcore::bind
