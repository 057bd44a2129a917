#include "bind/bind.h"
#include "bind/cuda.h"
#include "cuda/head_metrics.h"

namespace flatcore::bind {
namespace {

template <class Call>
Call head_call(int device, uintptr_t stream, const Problem& problem) {
  Call call;
  static_cast<HeadProblem&>(call) = problem;
  call.device = device;
  call.stream = pointer<void>(stream);
  return call;
}

cuda::HeadRepeats repeats_call(int device, uintptr_t stream, const Problem& problem, int64_t tile_classes,
                               int64_t positions, uintptr_t keys) {
  check_size("tile_classes", tile_classes, 1);
  check_size("positions", positions, problem.C);
  auto call = head_call<cuda::HeadRepeats>(device, stream, problem);
  call.tile_classes = tile_classes;
  call.positions = positions;
  call.keys = pointer<double>(keys);
  return call;
}

// Loops over a large head, built once a call.
struct CudaLoop {
  cuda::HeadLoop call;
};
CudaLoop make_loop(int device, uintptr_t stream, const Problem& problem, uintptr_t summary, uintptr_t center,
                   uintptr_t centered_squares, uintptr_t order, uintptr_t runs, uintptr_t found, int pieces,
                   uintptr_t distances, uintptr_t tails, bool all_tails, uintptr_t row_state, uintptr_t mean,
                   uintptr_t special) {
  auto call = head_call<cuda::HeadLoop>(device, stream, problem);
  call.summary = pointer<const double>(summary);
  call.center = pointer<const double>(center);
  call.centered_squares = pointer<const double>(centered_squares);
  call.order = pointer<const int64_t>(order);
  call.runs = pointer<const int32_t>(runs);
  call.found = pointer<const int32_t>(found);
  call.pieces = pieces;
  call.distances = pointer<const double>(distances);
  call.tails = pointer<HeadTail>(tails);
  call.all_tails = all_tails;
  call.row_state = pointer<HeadRow>(row_state);
  call.mean = pointer<void>(mean);
  call.special = pointer<uint8_t>(special);
  return {call};
}

struct CudaBackwardLoop {
  cuda::HeadBackwardLoop call;
};
CudaBackwardLoop make_backward_loop(int device, uintptr_t stream, const Problem& problem, uintptr_t upstream,
                                    uintptr_t log_coefficient, uintptr_t summary, uintptr_t center,
                                    uintptr_t centered_squares, uintptr_t found, uintptr_t tails, bool all_tails,
                                    uintptr_t row_state, uintptr_t numbers, uintptr_t mean, uintptr_t direction,
                                    uintptr_t top_row, uintptr_t top_bias, uintptr_t top, uintptr_t d_features,
                                    uintptr_t d_weight, uintptr_t d_bias, uintptr_t d_logits, uintptr_t exact,
                                    uintptr_t special, uintptr_t scratch, int64_t slots) {
  check_size("slots", slots, 1);
  auto call = head_call<cuda::HeadBackwardLoop>(device, stream, problem);
  call.upstream = pointer<const double>(upstream);
  call.log_coefficient = pointer<const double>(log_coefficient);
  call.summary = pointer<const double>(summary);
  call.center = pointer<const double>(center);
  call.centered_squares = pointer<const double>(centered_squares);
  call.found = pointer<const int32_t>(found);
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
  call.d_logits = pointer<void>(d_logits);
  call.exact = pointer<double>(exact);
  call.special = pointer<uint8_t>(special);
  call.scratch = pointer<double>(scratch);
  call.slots = slots;
  return {call};
}

void check_classes(const HeadProblem& problem, int64_t first_class, int64_t classes) {
  check_size("first_class", first_class, 0);
  check_size("classes", classes, 1);
  const int64_t most = cuda::kHeadTileBytes / (problem.double_compute ? 8 : 4);
  if (classes > most || first_class + classes > problem.C) throw std::invalid_argument("the tile is too wide");
}

// One of the kernels that take a block of rows.
template <class Loop, class Launch>
auto over_rows(Launch launch) {
  return [launch](const Loop& loop, int64_t first, int64_t rows) {
    check_rows(loop.call, first, rows);
    run_released([&] { return launch(loop.call, first, rows); });
  };
}

// One of the gradient's kernels that take a tile.
template <class Launch>
auto over_tile(Launch launch) {
  return [launch](const CudaBackwardLoop& loop, int64_t first, int64_t rows, int64_t first_class, int64_t classes,
                  uintptr_t z, uintptr_t g) {
    check_rows(loop.call, first, rows);
    check_classes(loop.call, first_class, classes);
    const cuda::HeadBackwardTile tile{first, rows, first_class, classes, pointer<void>(z), pointer<void>(g)};
    run_released([&] { return launch(loop.call, tile); });
  };
}

}  // namespace

void register_cuda_head(py::module_& module) {
  module.attr("CUDA_FUSED_CLASSES") = cuda::kFusedClasses;
  module.def("cuda_head_weights_workspace", &cuda::head_weights_workspace, py::arg("D"), py::arg("C"));
  module.def(
      "cuda_head_packing",
      [](const Problem& problem) {
        const cuda::HeadPacking packing = cuda::head_packing(problem);
        return py::make_tuple(packing.rows, packing.stride);
      },
      py::arg("problem"), "Rows and stride of W as the fused kernel reads it, in elements of the compute type.");
  module.def(
      "cuda_head_weights",
      [](int device, uintptr_t stream, const Problem& problem, uintptr_t workspace, uintptr_t summary, uintptr_t center,
         uintptr_t centered_squares, uintptr_t packed, int64_t packed_rows, int64_t packed_stride, uintptr_t distances,
         uintptr_t bias_distances) {
        auto call = head_call<cuda::HeadWeights>(device, stream, problem);
        call.workspace = pointer<double>(workspace);
        call.summary = pointer<double>(summary);
        call.center = pointer<double>(center);
        call.centered_squares = pointer<double>(centered_squares);
        call.packed = pointer<void>(packed);
        call.packed_rows = packed_rows;
        call.packed_stride = packed_stride;
        call.distances = pointer<double>(distances);
        call.bias_distances = pointer<double>(bias_distances);
        run_released([&] { return cuda::head_weights(call); });
      },
      py::arg("device"), py::arg("stream"), py::arg("problem"), py::arg("workspace"), py::arg("summary"),
      py::arg("center"), py::arg("centered_squares"), py::arg("packed"), py::arg("packed_rows"),
      py::arg("packed_stride"), py::arg("distances"), py::arg("bias_distances"));
  module.def(
      "cuda_head_metrics",
      [](int device, uintptr_t stream, const Problem& problem, uintptr_t packed, int64_t packed_stride,
         uintptr_t summary, uintptr_t distances, uintptr_t bias_distances, uintptr_t special) {
        auto call = head_call<cuda::HeadMetrics>(device, stream, problem);
        call.packed = pointer<const void>(packed);
        call.packed_stride = packed_stride;
        call.summary = pointer<const double>(summary);
        call.distances = pointer<const double>(distances);
        call.bias_distances = pointer<const double>(bias_distances);
        call.special = pointer<uint8_t>(special);
        run_released([&] { return cuda::head_metrics(call); });
      },
      py::arg("device"), py::arg("stream"), py::arg("problem"), py::arg("packed"), py::arg("packed_stride"),
      py::arg("summary"), py::arg("distances"), py::arg("bias_distances"), py::arg("special"));
  module.def(
      "cuda_head_explicit",
      [](int device, uintptr_t stream, const Problem& problem, int64_t first, int64_t rows, uintptr_t special,
         uintptr_t summary, uintptr_t scratch, int64_t slots) {
        check_size("slots", slots, 1);
        check_rows(problem, first, rows);
        auto call = head_call<cuda::HeadExplicit>(device, stream, problem);
        call.first = first;
        call.rows = rows;
        call.special = pointer<const uint8_t>(special);
        call.summary = pointer<const double>(summary);
        call.scratch = pointer<double>(scratch);
        call.slots = slots;
        run_released([&] { return cuda::head_explicit(call); });
      },
      py::arg("device"), py::arg("stream"), py::arg("problem"), py::arg("first"), py::arg("rows"), py::arg("special"),
      py::arg("summary"), py::arg("scratch"), py::arg("slots"));
  module.def(
      "cuda_head_repeat_keys",
      [](int device, uintptr_t stream, const Problem& problem, int64_t tile_classes, int64_t positions,
         uintptr_t keys) {
        auto call = repeats_call(device, stream, problem, tile_classes, positions, keys);
        run_released([&] { return cuda::head_repeat_keys(call); });
      },
      py::arg("device"), py::arg("stream"), py::arg("problem"), py::arg("tile_classes"), py::arg("positions"),
      py::arg("keys"));
  module.def(
      "cuda_head_repeat_runs",
      [](int device, uintptr_t stream, const Problem& problem, int64_t tile_classes, int64_t positions, uintptr_t keys,
         uintptr_t order, uintptr_t joins, uintptr_t runs, uintptr_t found) {
        auto call = repeats_call(device, stream, problem, tile_classes, positions, keys);
        call.order = pointer<const int64_t>(order);
        call.joins = pointer<uint8_t>(joins);
        call.runs = pointer<int32_t>(runs);
        call.found = pointer<int32_t>(found);
        run_released([&] { return cuda::head_repeat_runs(call); });
      },
      py::arg("device"), py::arg("stream"), py::arg("problem"), py::arg("tile_classes"), py::arg("positions"),
      py::arg("keys"), py::arg("order"), py::arg("joins"), py::arg("runs"), py::arg("found"));
  module.attr("HEAD_TILE_BYTES") = cuda::kHeadTileBytes;
  module.attr("HEAD_TABLE_CLASSES") = cuda::kTableClasses;
  module.attr("HEAD_PIECE_CLASSES") = cuda::kPieceClasses;
  module.attr("HEAD_EXPLICIT_ALONE") = cuda::kExplicitAlone;
  module.def("cuda_head_explicit_slot", &cuda::head_explicit_slot, py::arg("D"));
  module.def("cuda_head_explicit_row", &cuda::head_explicit_row, py::arg("D"));
  py::class_<CudaLoop>(module, "HeadLoop")
      .def(py::init(&make_loop), py::arg("device"), py::arg("stream"), py::arg("problem"), py::arg("summary"),
           py::arg("center"), py::arg("centered_squares"), py::arg("order"), py::arg("runs"), py::arg("found"),
           py::arg("pieces"), py::arg("distances"), py::arg("tails"), py::arg("all_tails"), py::arg("row_state"),
           py::arg("mean"), py::arg("special"))
      .def("start", over_rows<CudaLoop>(&cuda::head_loop_start), py::arg("first"), py::arg("rows"))
      .def(
          "statistics",
          [](const CudaLoop& loop, int64_t first, int64_t rows, int64_t first_class, int64_t classes, uintptr_t z,
             int64_t z_stride, uintptr_t shares) {
            check_rows(loop.call, first, rows);
            check_classes(loop.call, first_class, classes);
            const cuda::HeadTile tile{
                first, rows, first_class, classes, pointer<const void>(z), z_stride, pointer<void>(shares)};
            run_released([&] { return cuda::head_loop_statistics(loop.call, tile); });
          },
          py::arg("first"), py::arg("rows"), py::arg("first_class"), py::arg("classes"), py::arg("z"),
          py::arg("z_stride"), py::arg("shares"))
      .def("values", over_rows<CudaLoop>(&cuda::head_loop_values), py::arg("first"), py::arg("rows"))
      .def(
          "table",
          [](const CudaLoop& loop, int64_t first, int64_t rows, uintptr_t shares, uintptr_t sums, uintptr_t bias_sums) {
            check_rows(loop.call, first, rows);
            const cuda::HeadTable table{first, rows, pointer<const void>(shares), pointer<const void>(sums),
                                        pointer<const void>(bias_sums)};
            run_released([&] { return cuda::head_loop_table(loop.call, table); });
          },
          py::arg("first"), py::arg("rows"), py::arg("shares"), py::arg("sums"), py::arg("bias_sums"));
  py::class_<CudaBackwardLoop>(module, "HeadBackwardLoop")
      .def(py::init(&make_backward_loop), py::arg("device"), py::arg("stream"), py::arg("problem"), py::arg("upstream"),
           py::arg("log_coefficient"), py::arg("summary"), py::arg("center"), py::arg("centered_squares"),
           py::arg("found"), py::arg("tails"), py::arg("all_tails"), py::arg("row_state"), py::arg("numbers"),
           py::arg("mean"), py::arg("direction"), py::arg("top_row"), py::arg("top_bias"), py::arg("top"),
           py::arg("d_features"), py::arg("d_weight"), py::arg("d_bias"), py::arg("d_logits"), py::arg("exact"),
           py::arg("special"), py::arg("scratch"), py::arg("slots"))
      .def("rows", over_rows<CudaBackwardLoop>(&cuda::head_backward_rows), py::arg("first"), py::arg("rows"))
      .def("tile", over_tile(&cuda::head_backward_tile), py::arg("first"), py::arg("rows"), py::arg("first_class"),
           py::arg("classes"), py::arg("z"), py::arg("g"))
      .def("unsure_tile", over_tile(&cuda::head_backward_unsure_tile), py::arg("first"), py::arg("rows"),
           py::arg("first_class"), py::arg("classes"), py::arg("z"), py::arg("g"))
      .def("unsure", over_rows<CudaBackwardLoop>(&cuda::head_backward_unsure), py::arg("first"), py::arg("rows"))
      .def("tops", over_rows<CudaBackwardLoop>(&cuda::head_backward_tops), py::arg("first"), py::arg("rows"))
      .def("explicit_rows", over_rows<CudaBackwardLoop>(&cuda::head_backward_explicit), py::arg("first"),
           py::arg("rows"));
}

}  // namespace flatcore::bind
