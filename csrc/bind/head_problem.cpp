#include <cstddef>
#include <memory>

#include "bind/bind.h"
#include "bind/exchange.h"

namespace flatcore::bind {
namespace {

// A bias, a matrix of one row, is float64 or, where it lies in the host's memory, float32: a tensor's own conversion
// takes 3.5 us.
bool takes_bias(const Matrix& bias, bool in_host_memory) {
  if (bias.data == nullptr) return true;
  return (bias.dtype == Dtype::kFloat64 && bias.column_stride == 1) ||
         (in_host_memory && bias.dtype == Dtype::kFloat32);
}

// `head`: the record of flatcore/_engine/head.py, whose options are read by name.
void fill(Problem& problem, const PlainHead& tensors, const py::object& head, uint32_t fields, int threads) {
  check_size("N", tensors.N, 0);
  check_size("D", tensors.D, 0);
  check_size("C", tensors.C, 1);
  check_size("threads", threads, 1);
  if (fields >> kFieldCount != 0) throw std::invalid_argument("unknown field");
  if (!takes_bias(tensors.bias, true)) throw std::invalid_argument("bias of a type that is not taken");
  problem.features = tensors.features;
  problem.weight = tensors.weight;
  problem.logits = tensors.logits;
  problem.target = tensors.target;
  if (tensors.bias.dtype == Dtype::kFloat64) {
    problem.bias = static_cast<const double*>(tensors.bias.data);
  } else if (tensors.bias.data != nullptr) {
    const auto* value = static_cast<const float*>(tensors.bias.data);
    problem.own_bias.resize(static_cast<size_t>(tensors.C));
    for (int64_t j = 0; j < tensors.C; ++j) {
      problem.own_bias[static_cast<size_t>(j)] = value[j * tensors.bias.column_stride];
    }
    problem.bias = problem.own_bias.data();
  }
  problem.N = tensors.N;
  problem.D = tensors.D;
  problem.C = tensors.C;
  // the attributes' names as strings of Python, made once: made at each call they take half a microsecond
  static const py::handle kTemperature = py::str("temperature").release(),
                          kIgnoreIndex = py::str("ignore_index").release(),
                          kIncludeBias = py::str("include_bias").release(),
                          kNormPower = py::str("norm_power").release();
  problem.temperature = head.attr(kTemperature).cast<double>();
  problem.ignore_index = head.attr(kIgnoreIndex).cast<int64_t>();
  problem.include_bias = head.attr(kIncludeBias).cast<bool>();
  problem.norm_power = head.attr(kNormPower).cast<int>();
  problem.fields = fields;
  problem.double_compute = tensors.double_compute;
  problem.threads = threads;
  if (problem.include_bias && problem.bias == nullptr) throw std::invalid_argument("include_bias needs a bias");
}

std::unique_ptr<Problem> make_problem(const py::object& head, const py::object& features, const py::object& weight,
                                      const py::object& logits, const py::object& bias, uintptr_t target, int64_t N,
                                      int64_t D, int64_t C, uint32_t fields, bool double_compute, int threads) {
  PlainHead tensors;
  tensors.features = matrix(features);
  tensors.weight = matrix(weight);
  tensors.logits = matrix(logits);
  tensors.bias = matrix(bias);
  tensors.target = pointer<const int64_t>(target);
  tensors.N = N;
  tensors.D = D;
  tensors.C = C;
  tensors.double_compute = double_compute;
  auto problem = std::make_unique<Problem>();
  fill(*problem, tensors, head, fields, threads);
  return problem;
}

// None if the head's tensors are not simply their memory, or need a conversion first.
std::unique_ptr<Problem> plain_problem(const py::object& head, uint32_t fields, int threads, bool recorded,
                                       bool takes_float32_bias) {
  const auto tensors = plain_head(head, recorded);
  if (!tensors || !takes_bias(tensors->bias, takes_float32_bias)) return nullptr;
  auto problem = std::make_unique<Problem>();
  fill(*problem, *tensors, head, fields, threads);
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
      .def_static("of", &plain_problem, py::arg("head"), py::arg("fields"), py::arg("threads"), py::arg("recorded"),
                  py::arg("takes_float32_bias"))
      .def_property_readonly("size",  // and whether it is computed in float64
                             [](const Problem& problem) {
                               return py::make_tuple(problem.N, problem.D, problem.C, problem.double_compute);
                             })
      .def("write_to", &write_to, py::arg("values"), py::arg("double_values"), py::arg("prediction"));
}

}  // namespace flatcore::bind
