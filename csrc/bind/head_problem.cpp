#include <cstddef>

#include "bind/bind.h"

namespace flatcore::bind {
namespace {

// `head`: the record of flatcore/_engine/head.py, read by name; its tensors come as addresses. The bias, a matrix of
// one row, is float64 or, where it lies in the host's memory, float32: a tensor's own conversion takes 3.5 us.
Problem make_problem(const py::object& head, const py::object& features, const py::object& weight,
                     const py::object& logits, const py::object& bias, uintptr_t target, int64_t N, int64_t D,
                     int64_t C, uint32_t fields, bool double_compute, int threads) {
  check_size("N", N, 0);
  check_size("D", D, 0);
  check_size("C", C, 1);
  check_size("threads", threads, 1);
  if (fields >> kFieldCount != 0) throw std::invalid_argument("unknown field");
  Problem problem;
  problem.features = matrix(features);
  problem.weight = matrix(weight);
  problem.logits = matrix(logits);
  problem.target = pointer<const int64_t>(target);
  const Matrix given = matrix(bias);
  if (given.dtype == Dtype::kFloat64 && given.column_stride == 1) {
    problem.bias = static_cast<const double*>(given.data);
  } else if (given.data != nullptr) {
    if (given.dtype != Dtype::kFloat32) throw std::invalid_argument("bias of a type that is not taken");
    const auto* value = static_cast<const float*>(given.data);
    problem.own_bias.resize(static_cast<size_t>(C));
    for (int64_t j = 0; j < C; ++j) problem.own_bias[static_cast<size_t>(j)] = value[j * given.column_stride];
    problem.bias = problem.own_bias.data();
  }
  problem.N = N;
  problem.D = D;
  problem.C = C;
  problem.temperature = head.attr("temperature").cast<double>();
  problem.ignore_index = head.attr("ignore_index").cast<int64_t>();
  problem.include_bias = head.attr("include_bias").cast<bool>();
  problem.norm_power = head.attr("norm_power").cast<int>();
  problem.fields = fields;
  problem.double_compute = double_compute;
  problem.threads = threads;
  if (problem.include_bias && problem.bias == nullptr) throw std::invalid_argument("include_bias needs a bias");
  return problem;
}

void write_to(Problem& problem, uintptr_t values, bool double_values, uintptr_t prediction) {
  problem.values = pointer<void>(values);
  problem.double_values = double_values;
  problem.prediction = pointer<int64_t>(prediction);
}

}  // namespace

void register_head_problem(py::module_& module) {
  module.attr("HEAD_ROW_BYTES") = sizeof(HeadRow);
  module.attr("HEAD_BACKWARD_ROW_BYTES") = sizeof(HeadBackwardRow);
  module.attr("HEAD_TAIL_BYTES") = sizeof(HeadTail);
  module.attr("ORDINARY_ROW") = static_cast<int64_t>(kOrdinary);
  module.attr("EXPLICIT_ROW") = static_cast<int64_t>(kExplicit);
  // where Python finds what it reads of a row, in numbers of 8 bytes
  module.attr("HEAD_BACKWARD_ROW_C") = offsetof(HeadBackwardRow, c) / 8;
  module.attr("HEAD_BACKWARD_ROW_BIAS") = offsetof(HeadBackwardRow, bias) / 8;
  module.attr("HEAD_BACKWARD_ROW_KIND") = offsetof(HeadBackwardRow, kind) / 8;
  module.attr("HEAD_BACKWARD_ROW_OTHERS") = offsetof(HeadBackwardRow, others) / 8;
  module.attr("POISONED_ROW") = static_cast<int64_t>(kPoisoned);
  py::class_<Problem>(module, "HeadProblem", py::module_local())
      .def(py::init(&make_problem), py::arg("head"), py::arg("features"), py::arg("weight"), py::arg("logits"),
           py::arg("bias"), py::arg("target"), py::arg("N"), py::arg("D"), py::arg("C"), py::arg("fields"),
           py::arg("double_compute"), py::arg("threads"))
      .def("write_to", &write_to, py::arg("values"), py::arg("double_values"), py::arg("prediction"));
}

}  // namespace flatcore::bind
