#include <tuple>
#include <utility>
#include <vector>

#include "bind/bind.h"

namespace flatcore::bind {
namespace {

// The first row whose label is no class, or -1.
int64_t bad_row(const Outcome& outcome) { return outcome.status == Status::kBadLabel ? outcome.row : -1; }

cpu::HeadReduction make_reduction(uintptr_t logs, uintptr_t sample_weights, uintptr_t target, int64_t N,
                                  int64_t ignore_index, int reduction, bool log, bool count_rows, uintptr_t value,
                                  bool double_value, uintptr_t log_coefficient) {
  cpu::HeadReduction call;
  call.logs = pointer<const double>(logs);
  call.sample_weights = pointer<const double>(sample_weights);
  call.target = pointer<const int64_t>(target);
  call.N = N;
  call.ignore_index = ignore_index;
  call.reduction = static_cast<cpu::Reduction>(reduction);
  call.log = log;
  call.count_rows = count_rows;
  call.value = pointer<void>(value);
  call.double_value = double_value;
  call.log_coefficient = pointer<double>(log_coefficient);
  return call;
}

// The same numbers as floats, or nothing if one of them is not a float.
std::vector<float> as_floats(const double* from, int64_t count) {
  std::vector<float> floats(from == nullptr ? 0 : static_cast<size_t>(count));
  for (size_t k = 0; k < floats.size(); ++k) {
    floats[k] = static_cast<float>(from[k]);
    if (static_cast<double>(floats[k]) != from[k] && from[k] == from[k]) return {};
  }
  return floats;
}

// A loop over a large head, built once a call.
struct Loop {
  cpu::HeadLoop call;
  const cpu::Target* kernels;
  std::vector<float> float_bias;
};
Loop make_loop(const std::string& cpu_target, const Problem& problem, uintptr_t summary, uintptr_t center,
               uintptr_t centered_squares, uintptr_t classes, uintptr_t positions, uintptr_t bias_by_position,
               uintptr_t tails, bool all_tails, uintptr_t row_state, uintptr_t mean, uintptr_t scratch,
               bool equal_rows) {
  Loop loop{{}, &kernels_of(cpu_target), {}};
  static_cast<HeadProblem&>(loop.call) = problem;
  loop.call.summary = pointer<const double>(summary);
  loop.call.center = pointer<const double>(center);
  loop.call.centered_squares = pointer<const double>(centered_squares);
  loop.call.classes = pointer<const int64_t>(classes);
  loop.call.positions = pointer<const int64_t>(positions);
  loop.call.bias_by_position = pointer<const double>(bias_by_position);
  if (!problem.double_compute) {
    loop.float_bias = as_floats(bias_by_position != 0 ? loop.call.bias_by_position : problem.bias, problem.C);
    loop.call.float_bias = loop.float_bias.empty() ? nullptr : loop.float_bias.data();
  }
  loop.call.tails = pointer<HeadTail>(tails);
  loop.call.all_tails = all_tails;
  loop.call.row_state = pointer<HeadRow>(row_state);
  loop.call.mean = pointer<void>(mean);
  loop.call.scratch = pointer<double>(scratch);
  loop.call.equal_rows = equal_rows;
  return loop;
}

}  // namespace

void register_head_metrics(py::module_& module) {
  module.def("head_chunk_scratch", &cpu::head_chunk_scratch, py::arg("C"), py::arg("D"));
  module.def(
      "head_metrics",
      [](const std::string& cpu_target, const Problem& problem) {
        cpu::HeadMetrics call;
        static_cast<HeadProblem&>(call) = problem;
        const Workspace workspace(cpu::head_metrics_workspace(problem));
        call.workspace = workspace.data();
        const cpu::Target& kernels = kernels_of(cpu_target);
        py::gil_scoped_release release;
        return bad_row(kernels.head_metrics(call));
      },
      py::arg("cpu_target"), py::arg("problem"));
  module.def(
      "head_reduction",
      [](const std::string& cpu_target, uintptr_t logs, uintptr_t sample_weights, uintptr_t target, int64_t N,
         int64_t ignore_index, int reduction, bool log, bool count_rows, uintptr_t value, bool double_value,
         uintptr_t log_coefficient) {
        check_size("N", N, 0);
        const cpu::HeadReduction call = make_reduction(logs, sample_weights, target, N, ignore_index, reduction, log,
                                                       count_rows, value, double_value, log_coefficient);
        const cpu::Target& kernels = kernels_of(cpu_target);
        py::gil_scoped_release release;
        kernels.head_reduction(call);
      },
      py::arg("cpu_target"), py::arg("logs"), py::arg("sample_weights"), py::arg("target"), py::arg("N"),
      py::arg("ignore_index"), py::arg("reduction"), py::arg("log"), py::arg("count_rows"), py::arg("value"),
      py::arg("double_value"), py::arg("log_coefficient"));
  module.def(
      "head_measure",
      [](const std::string& cpu_target, const Problem& problem, uintptr_t sample_weights, int reduction, bool log,
         bool count_rows, uintptr_t value, bool double_value, uintptr_t log_coefficient) {
        cpu::HeadMetrics call;
        static_cast<HeadProblem&>(call) = problem;
        const Workspace workspace(cpu::head_metrics_workspace(problem)), logs(8 * problem.N);
        call.workspace = workspace.data();
        call.values = logs.data();
        call.double_values = true;
        const cpu::HeadReduction reduce = make_reduction(
            reinterpret_cast<uintptr_t>(logs.data()), sample_weights, reinterpret_cast<uintptr_t>(problem.target),
            problem.N, problem.ignore_index, reduction, log, count_rows, value, double_value, log_coefficient);
        const cpu::Target& kernels = kernels_of(cpu_target);
        py::gil_scoped_release release;
        const int64_t bad = problem.N > 0 ? bad_row(kernels.head_metrics(call)) : -1;
        if (bad < 0) kernels.head_reduction(reduce);
        return bad;
      },
      py::arg("cpu_target"), py::arg("problem"), py::arg("sample_weights"), py::arg("reduction"), py::arg("log"),
      py::arg("count_rows"), py::arg("value"), py::arg("double_value"), py::arg("log_coefficient"));
  module.def(
      "head_summary",
      [](const std::string& cpu_target, const Problem& problem, uintptr_t row_workspace, uintptr_t summary,
         uintptr_t center, uintptr_t centered_squares, uintptr_t keys) {
        cpu::HeadSummary call;
        call.weight = problem.weight;
        call.C = problem.C;
        call.D = problem.D;
        call.bias = problem.include_bias ? problem.bias : nullptr;
        call.threads = problem.threads;
        call.double_compute = problem.double_compute;
        call.row_squares = pointer<double>(row_workspace);
        call.row_largest = call.row_squares + problem.C;
        call.summary = pointer<double>(summary);
        call.center = pointer<double>(center);
        call.centered_squares = pointer<double>(centered_squares);
        call.keys = pointer<double>(keys);
        const cpu::Target& kernels = kernels_of(cpu_target);
        py::gil_scoped_release release;
        kernels.head_summary(call);
      },
      py::arg("cpu_target"), py::arg("problem"), py::arg("row_workspace"), py::arg("summary"), py::arg("center"),
      py::arg("centered_squares"), py::arg("keys"));
  module.def(
      "head_repeats",  // (groups, near)
      [](const std::string& cpu_target, const Problem& problem, int exponent, uintptr_t centered_squares,
         uintptr_t keys, uintptr_t members, uintptr_t starts, uintptr_t near, uintptr_t near_of) {
        cpu::HeadRepeats call;
        call.weight = problem.weight;
        call.C = problem.C;
        call.D = problem.D;
        call.bias = problem.include_bias ? problem.bias : nullptr;
        call.exponent = exponent;
        call.centered_squares = pointer<const double>(centered_squares);
        call.keys = pointer<const double>(keys);
        call.members = pointer<int64_t>(members);
        call.starts = pointer<int64_t>(starts);
        call.near = pointer<int64_t>(near);
        call.near_of = pointer<int64_t>(near_of);
        const cpu::Target& kernels = kernels_of(cpu_target);
        py::gil_scoped_release release;
        const cpu::RepeatCounts counts = kernels.head_repeats(call);
        return std::make_tuple(counts.groups, counts.near);
      },
      py::arg("cpu_target"), py::arg("problem"), py::arg("exponent"), py::arg("centered_squares"), py::arg("keys"),
      py::arg("members"), py::arg("starts"), py::arg("near"), py::arg("near_of"));
  py::class_<Loop>(module, "HeadLoop")
      .def(py::init(&make_loop), py::arg("cpu_target"), py::arg("problem"), py::arg("summary"), py::arg("center"),
           py::arg("centered_squares"), py::arg("classes"), py::arg("positions"), py::arg("bias_by_position"),
           py::arg("tails"), py::arg("all_tails"), py::arg("row_state"), py::arg("mean"), py::arg("scratch"),
           py::arg("equal_rows"))
      .def(
          "statistics",
          [](const Loop& loop, int64_t first, int64_t rows, int64_t first_class, int64_t classes, uintptr_t z,
             int64_t z_stride, uintptr_t starts, int64_t pieces, int64_t end, uintptr_t near, uintptr_t near_of,
             int64_t near_count, uintptr_t near_shares) {
            check_rows(loop.call, first, rows);
            cpu::HeadTile tile;
            tile.first = first;
            tile.rows = rows;
            tile.first_class = first_class;
            tile.classes = classes;
            tile.z = pointer<void>(z);
            tile.z_stride = z_stride;
            tile.repeats = {first_class, pointer<const int64_t>(starts), pieces,
                            end,         pointer<const int64_t>(near),   pointer<const int64_t>(near_of),
                            near_count};
            tile.near = pointer<void>(near_shares);
            py::gil_scoped_release release;
            return bad_row(loop.kernels->head_loop_statistics(loop.call, tile));
          },
          py::arg("first"), py::arg("rows"), py::arg("first_class"), py::arg("classes"), py::arg("z"),
          py::arg("z_stride"), py::arg("starts"), py::arg("pieces"), py::arg("end"), py::arg("near"),
          py::arg("near_of"), py::arg("near_count"), py::arg("near_shares"))
      .def(
          "own_logits",
          [](const Loop& loop, int64_t rows, int64_t first_class, int64_t classes, bool in_order, uintptr_t x,
             int64_t x_stride, uintptr_t z, int64_t z_stride) {
            const cpu::OwnProduct product{
                rows,     first_class,      classes, in_order ? loop.call.classes : nullptr, pointer<const void>(x),
                x_stride, pointer<void>(z), z_stride};
            py::gil_scoped_release release;
            loop.kernels->head_own_logits(loop.call, product);
          },
          py::arg("rows"), py::arg("first_class"), py::arg("classes"), py::arg("in_order"), py::arg("x"),
          py::arg("x_stride"), py::arg("z"), py::arg("z_stride"))
      .def(
          "own_tile",  // the logits, statistics and sums of a tile without repeats
          [](const Loop& loop, int64_t first, int64_t rows, int64_t first_class, int64_t classes, uintptr_t x,
             int64_t x_stride, uintptr_t z) {
            check_rows(loop.call, first, rows);
            const cpu::OwnProduct product{rows,     first_class,      classes, nullptr, pointer<const void>(x),
                                          x_stride, pointer<void>(z), classes};
            cpu::HeadTile tile;
            tile.first = first;
            tile.rows = rows;
            tile.first_class = first_class;
            tile.classes = classes;
            tile.z = product.z;
            tile.z_stride = classes;
            py::gil_scoped_release release;
            loop.kernels->head_own_logits(loop.call, product);
            const int64_t bad = bad_row(loop.kernels->head_loop_statistics(loop.call, tile));
            if (loop.call.mean != nullptr) loop.kernels->head_own_sums(loop.call, product);
            return bad;
          },
          py::arg("first"), py::arg("rows"), py::arg("first_class"), py::arg("classes"), py::arg("x"),
          py::arg("x_stride"), py::arg("z"))
      .def(
          "own_sums",
          [](const Loop& loop, int64_t rows, int64_t first_class, int64_t classes, uintptr_t z, int64_t z_stride) {
            const cpu::OwnProduct product{rows,    first_class, classes,          loop.call.classes,
                                          nullptr, 0,           pointer<void>(z), z_stride};
            py::gil_scoped_release release;
            loop.kernels->head_own_sums(loop.call, product);
          },
          py::arg("rows"), py::arg("first_class"), py::arg("classes"), py::arg("z"), py::arg("z_stride"))
      .def(
          "values",
          [](const Loop& loop, int64_t first, int64_t rows) {
            check_rows(loop.call, first, rows);
            py::gil_scoped_release release;
            loop.kernels->head_loop_values(loop.call, first, rows);
          },
          py::arg("first"), py::arg("rows"));
}

}  // namespace flatcore::bind
