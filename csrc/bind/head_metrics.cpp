#include <tuple>
#include <utility>

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

cpu::HeadChunk make_chunk(const Problem& problem, int64_t first, int64_t rows, uintptr_t z, int64_t z_stride,
                          uintptr_t q, int64_t q_stride, uintptr_t summary, uintptr_t center,
                          uintptr_t centered_squares, uintptr_t row_state) {
  check_size("first", first, 0);
  check_size("rows", rows, 0);
  if (first + rows > problem.N) throw std::invalid_argument("the chunk ends behind the last row");
  cpu::HeadChunk chunk;
  static_cast<HeadProblem&>(chunk) = problem;
  chunk.first = first;
  chunk.rows = rows;
  chunk.z = pointer<const void>(z);
  chunk.z_stride = z_stride;
  chunk.q = pointer<void>(q);
  chunk.q_stride = q_stride;
  chunk.summary = pointer<const double>(summary);
  chunk.center = pointer<const double>(center);
  chunk.centered_squares = pointer<const double>(centered_squares);
  chunk.row_state = pointer<HeadRow>(row_state);
  return chunk;
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
         uintptr_t center, uintptr_t centered_squares) {
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
        const cpu::Target& kernels = kernels_of(cpu_target);
        py::gil_scoped_release release;
        kernels.head_summary(call);
      },
      py::arg("cpu_target"), py::arg("problem"), py::arg("row_workspace"), py::arg("summary"), py::arg("center"),
      py::arg("centered_squares"));
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
        call.threads = problem.threads;
        call.keys = pointer<double>(keys);
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
  module.def(
      "head_distances",
      [](const std::string& cpu_target, const Problem& problem, const py::object& weight, int exponent,
         uintptr_t distances) {
        cpu::HeadDistances call;
        call.weight = matrix(weight);
        if (call.weight.column_stride != 1) throw std::invalid_argument("distances need adjacent elements");
        call.C = problem.C;
        call.D = problem.D;
        call.bias = problem.include_bias ? problem.bias : nullptr;
        call.exponent = exponent;
        call.threads = problem.threads;
        call.distances = pointer<void>(distances);
        const cpu::Target& kernels = kernels_of(cpu_target);
        py::gil_scoped_release release;
        kernels.head_distances(call);
      },
      py::arg("cpu_target"), py::arg("problem"), py::arg("weight"), py::arg("exponent"), py::arg("distances"));
  module.def(
      "head_chunk_statistics",
      [](const std::string& cpu_target, const Problem& problem, int64_t first, int64_t rows, uintptr_t z,
         int64_t z_stride, uintptr_t q, int64_t q_stride, uintptr_t summary, uintptr_t center,
         uintptr_t centered_squares, uintptr_t row_state, uintptr_t members, uintptr_t starts, int64_t groups,
         uintptr_t near, uintptr_t near_of, int64_t near_count, uintptr_t merged, uintptr_t near_q) {
        cpu::HeadChunk call =
            make_chunk(problem, first, rows, z, z_stride, q, q_stride, summary, center, centered_squares, row_state);
        call.repeats = {pointer<const int64_t>(members), pointer<const int64_t>(starts),  groups,
                        pointer<const int64_t>(near),    pointer<const int64_t>(near_of), near_count};
        call.merged = pointer<void>(merged);
        call.merged_stride = q_stride;
        call.near_q = pointer<void>(near_q);
        const cpu::Target& kernels = kernels_of(cpu_target);
        py::gil_scoped_release release;
        return bad_row(kernels.head_chunk_statistics(call));
      },
      py::arg("cpu_target"), py::arg("problem"), py::arg("first"), py::arg("rows"), py::arg("z"), py::arg("z_stride"),
      py::arg("q"), py::arg("q_stride"), py::arg("summary"), py::arg("center"), py::arg("centered_squares"),
      py::arg("row_state"), py::arg("members"), py::arg("starts"), py::arg("groups"), py::arg("near"),
      py::arg("near_of"), py::arg("near_count"), py::arg("merged"), py::arg("near_q"));
  module.def(
      "head_chunk_weights",
      [](const std::string& cpu_target, const Problem& problem, int64_t first, int64_t rows, uintptr_t q,
         int64_t q_stride, uintptr_t summary, uintptr_t center, uintptr_t row_state, uintptr_t mean,
         int64_t mean_stride, uintptr_t distance, int64_t distance_stride, uintptr_t scratch, bool equal_rows) {
        cpu::HeadChunk call = make_chunk(problem, first, rows, 0, 0, q, q_stride, summary, center, 0, row_state);
        call.mean = pointer<const double>(mean);
        call.mean_stride = mean_stride;
        call.distance = pointer<const void>(distance);
        call.distance_stride = distance_stride;
        call.scratch = pointer<double>(scratch);
        call.equal_rows = equal_rows;
        if (mean == 0 && distance == 0 && problem.D > 0) throw std::invalid_argument("mean or distance is needed");
        const cpu::Target& kernels = kernels_of(cpu_target);
        py::gil_scoped_release release;
        kernels.head_chunk_weights(call);
      },
      py::arg("cpu_target"), py::arg("problem"), py::arg("first"), py::arg("rows"), py::arg("q"), py::arg("q_stride"),
      py::arg("summary"), py::arg("center"), py::arg("row_state"), py::arg("mean"), py::arg("mean_stride"),
      py::arg("distance"), py::arg("distance_stride"), py::arg("scratch"), py::arg("equal_rows"));
}

}  // namespace flatcore::bind
