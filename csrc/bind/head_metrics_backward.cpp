#include "bind/bind.h"

namespace flatcore::bind {

void register_head_metrics_backward(py::module_& module) {
  module.def(
      "head_metrics_backward",
      [](const std::string& cpu_target, const Problem& problem, uintptr_t upstream, int64_t upstream_stride,
         uintptr_t log_coefficient, uintptr_t d_features, uintptr_t d_weight, uintptr_t d_bias, uintptr_t d_logits) {
        cpu::HeadMetricsBackward call;
        static_cast<HeadProblem&>(call) = problem;
        call.upstream = pointer<const double>(upstream);
        call.upstream_stride = upstream_stride;
        call.log_coefficient = pointer<const double>(log_coefficient);
        call.d_features = pointer<void>(d_features);
        call.d_weight = pointer<void>(d_weight);
        call.d_bias = pointer<double>(d_bias);
        call.d_logits = pointer<void>(d_logits);
        const Workspace workspace(cpu::head_metrics_backward_workspace(problem));
        call.workspace = workspace.data();
        const cpu::Target& kernels = kernels_of(cpu_target);
        py::gil_scoped_release release;
        kernels.head_metrics_backward(call);
      },
      py::arg("cpu_target"), py::arg("problem"), py::arg("upstream"), py::arg("upstream_stride"),
      py::arg("log_coefficient"), py::arg("d_features"), py::arg("d_weight"), py::arg("d_bias"), py::arg("d_logits"));
  const auto chunk = [](const Problem& problem, int64_t first, int64_t rows, uintptr_t upstream,
                        uintptr_t log_coefficient, uintptr_t q, uintptr_t summary, uintptr_t center,
                        uintptr_t centered_squares, uintptr_t row_state, uintptr_t numbers) {
    check_size("first", first, 0);
    check_size("rows", rows, 0);
    if (first + rows > problem.N) throw std::invalid_argument("the chunk ends behind the last row");
    cpu::HeadBackwardChunk call;
    static_cast<HeadProblem&>(call) = problem;
    call.first = first;
    call.rows = rows;
    call.upstream = pointer<const double>(upstream);
    call.log_coefficient = pointer<const double>(log_coefficient);
    call.q = pointer<void>(q);
    call.q_stride = problem.C;
    call.summary = pointer<const double>(summary);
    call.center = pointer<const double>(center);
    call.centered_squares = pointer<const double>(centered_squares);
    call.row_state = pointer<const HeadRow>(row_state);
    call.numbers = pointer<HeadBackwardRow>(numbers);
    return call;
  };
  module.def(
      "head_chunk_directions",
      [chunk](const std::string& cpu_target, const Problem& problem, int64_t first, int64_t rows, uintptr_t upstream,
              uintptr_t log_coefficient, uintptr_t summary, uintptr_t center, uintptr_t row_state, uintptr_t numbers,
              uintptr_t mean, uintptr_t direction, uintptr_t q, uintptr_t top_row, uintptr_t top_bias, uintptr_t top,
              bool equal_rows) {
        auto call = chunk(problem, first, rows, upstream, log_coefficient, q, summary, center, 0, row_state, numbers);
        call.mean = pointer<const double>(mean);
        call.direction = pointer<void>(direction);
        call.top_row = pointer<void>(top_row);
        call.top_bias = pointer<double>(top_bias);
        call.top = pointer<int64_t>(top);
        call.equal_rows = equal_rows;
        const cpu::Target& kernels = kernels_of(cpu_target);
        py::gil_scoped_release release;
        kernels.head_chunk_directions(call);
      },
      py::arg("cpu_target"), py::arg("problem"), py::arg("first"), py::arg("rows"), py::arg("upstream"),
      py::arg("log_coefficient"), py::arg("summary"), py::arg("center"), py::arg("row_state"), py::arg("numbers"),
      py::arg("mean"), py::arg("direction"), py::arg("q"), py::arg("top_row"), py::arg("top_bias"), py::arg("top"),
      py::arg("equal_rows"));
  module.def(
      "head_chunk_cotangent",
      [chunk](const std::string& cpu_target, const Problem& problem, int64_t first, int64_t rows, uintptr_t upstream,
              uintptr_t log_coefficient, uintptr_t q, uintptr_t g, int64_t g_stride, uintptr_t summary,
              uintptr_t center, uintptr_t centered_squares, uintptr_t row_state, uintptr_t numbers,
              uintptr_t d_features, uintptr_t d_weight, uintptr_t d_bias, uintptr_t scratch) {
        auto call = chunk(problem, first, rows, upstream, log_coefficient, q, summary, center, centered_squares,
                          row_state, numbers);
        call.g = pointer<void>(g);
        call.g_stride = g_stride;
        call.d_features = pointer<void>(d_features);
        call.d_weight = pointer<void>(d_weight);
        call.d_bias = pointer<double>(d_bias);
        call.scratch = pointer<double>(scratch);
        const cpu::Target& kernels = kernels_of(cpu_target);
        py::gil_scoped_release release;
        kernels.head_chunk_cotangent(call);
      },
      py::arg("cpu_target"), py::arg("problem"), py::arg("first"), py::arg("rows"), py::arg("upstream"),
      py::arg("log_coefficient"), py::arg("q"), py::arg("g"), py::arg("g_stride"), py::arg("summary"),
      py::arg("center"), py::arg("centered_squares"), py::arg("row_state"), py::arg("numbers"), py::arg("d_features"),
      py::arg("d_weight"), py::arg("d_bias"), py::arg("scratch"));
}

}  // namespace flatcore::bind
