#include "bind/bind.h"

namespace flatcore::bind {
namespace {

// A gradient's loop over a large head, built once a call.
struct BackwardLoop {
  cpu::HeadBackwardLoop call;
  const cpu::Target* kernels;
};
BackwardLoop make_loop(const std::string& cpu_target, const Problem& problem, uintptr_t upstream,
                       uintptr_t log_coefficient, uintptr_t summary, uintptr_t center, uintptr_t centered_squares,
                       uintptr_t tails, bool all_tails, uintptr_t row_state, uintptr_t numbers, uintptr_t mean,
                       uintptr_t direction, uintptr_t top_row, uintptr_t top_bias, uintptr_t top, uintptr_t d_features,
                       uintptr_t d_weight, uintptr_t d_bias, uintptr_t scratch, bool equal_rows) {
  BackwardLoop loop{{}, &kernels_of(cpu_target)};
  cpu::HeadBackwardLoop& call = loop.call;
  static_cast<HeadProblem&>(call) = problem;
  call.upstream = pointer<const double>(upstream);
  call.log_coefficient = pointer<const double>(log_coefficient);
  call.summary = pointer<const double>(summary);
  call.center = pointer<const double>(center);
  call.centered_squares = pointer<const double>(centered_squares);
  call.tails = pointer<const HeadTail>(tails);
  call.all_tails = all_tails;
  call.row_state = pointer<const HeadRow>(row_state);
  call.numbers = pointer<HeadBackwardRow>(numbers);
  call.mean = pointer<const void>(mean);
  call.direction = pointer<void>(direction);
  call.top_row = pointer<void>(top_row);
  call.top_bias = pointer<double>(top_bias);
  call.top = pointer<int64_t>(top);
  call.d_features = pointer<void>(d_features);
  call.d_weight = pointer<void>(d_weight);
  call.d_bias = pointer<double>(d_bias);
  call.scratch = pointer<double>(scratch);
  call.equal_rows = equal_rows;
  return loop;
}

}  // namespace

void register_head_metrics_backward(py::module_& module) {
  // upstream and d_bias in float64 or, where a tensor's conversion would take 2 us each, in float32
  module.def(
      "head_metrics_backward",
      [](const std::string& cpu_target, const Problem& problem, uintptr_t upstream, int64_t upstream_stride,
         bool double_upstream, uintptr_t log_coefficient, uintptr_t d_features, uintptr_t d_weight, uintptr_t d_bias,
         bool double_bias, uintptr_t d_logits) {
        cpu::HeadMetricsBackward call;
        static_cast<HeadProblem&>(call) = problem;
        std::vector<double> wide_upstream, wide_bias;
        if (!double_upstream) {
          const auto* from = pointer<const float>(upstream);
          wide_upstream.assign(from, from + (upstream_stride == 0 ? 1 : problem.N));
        }
        if (!double_bias && d_bias != 0) wide_bias.resize(static_cast<size_t>(problem.C));
        call.upstream = double_upstream ? pointer<const double>(upstream) : wide_upstream.data();
        call.upstream_stride = upstream_stride;
        call.log_coefficient = pointer<const double>(log_coefficient);
        call.d_features = pointer<void>(d_features);
        call.d_weight = pointer<void>(d_weight);
        call.d_bias = wide_bias.empty() ? pointer<double>(d_bias) : wide_bias.data();
        call.d_logits = pointer<void>(d_logits);
        const Workspace workspace(cpu::head_metrics_backward_workspace(problem));
        call.workspace = workspace.data();
        const cpu::Target& kernels = kernels_of(cpu_target);
        py::gil_scoped_release release;
        kernels.head_metrics_backward(call);
        for (size_t j = 0; j < wide_bias.size(); ++j) pointer<float>(d_bias)[j] = static_cast<float>(wide_bias[j]);
      },
      py::arg("cpu_target"), py::arg("problem"), py::arg("upstream"), py::arg("upstream_stride"),
      py::arg("double_upstream"), py::arg("log_coefficient"), py::arg("d_features"), py::arg("d_weight"),
      py::arg("d_bias"), py::arg("double_bias"), py::arg("d_logits"));
  py::class_<BackwardLoop>(module, "HeadBackwardLoop")
      .def(py::init(&make_loop), py::arg("cpu_target"), py::arg("problem"), py::arg("upstream"),
           py::arg("log_coefficient"), py::arg("summary"), py::arg("center"), py::arg("centered_squares"),
           py::arg("tails"), py::arg("all_tails"), py::arg("row_state"), py::arg("numbers"), py::arg("mean"),
           py::arg("direction"), py::arg("top_row"), py::arg("top_bias"), py::arg("top"), py::arg("d_features"),
           py::arg("d_weight"), py::arg("d_bias"), py::arg("scratch"), py::arg("equal_rows"))
      .def(
          "rows",
          [](const BackwardLoop& loop, int64_t first, int64_t rows) {
            check_rows(loop.call, first, rows);
            py::gil_scoped_release release;
            loop.kernels->head_backward_rows(loop.call, first, rows);
          },
          py::arg("first"), py::arg("rows"))
      .def(
          "tile",
          [](const BackwardLoop& loop, int64_t first, int64_t rows, int64_t first_class, int64_t classes, uintptr_t z,
             uintptr_t g, int64_t stride) {
            check_rows(loop.call, first, rows);
            const cpu::HeadBackwardTile tile{first, rows, first_class, classes, pointer<void>(z), pointer<void>(g),
                                             stride};
            py::gil_scoped_release release;
            loop.kernels->head_backward_tile(loop.call, tile);
          },
          py::arg("first"), py::arg("rows"), py::arg("first_class"), py::arg("classes"), py::arg("z"), py::arg("g"),
          py::arg("stride"))
      .def(
          "explicit_rows",
          [](const BackwardLoop& loop, int64_t first, uintptr_t rows, int64_t count, uintptr_t g) {
            py::gil_scoped_release release;
            loop.kernels->head_backward_explicit(loop.call, first, pointer<const int64_t>(rows), count,
                                                 pointer<void>(g));
          },
          py::arg("first"), py::arg("rows"), py::arg("count"), py::arg("g"));
}

}  // namespace flatcore::bind
