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

template <class Call>
Call chunk_call(int device, uintptr_t stream, const Problem& problem, int64_t first, int64_t rows) {
  check_size("first", first, 0);
  check_size("rows", rows, 0);
  if (first + rows > problem.N) throw std::invalid_argument("the chunk ends behind the last row");
  Call call = head_call<Call>(device, stream, problem);
  call.first = first;
  call.rows = rows;
  return call;
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
        auto call = chunk_call<cuda::HeadExplicit>(device, stream, problem, first, rows);
        call.special = pointer<const uint8_t>(special);
        call.summary = pointer<const double>(summary);
        call.scratch = pointer<double>(scratch);
        call.slots = slots;
        run_released([&] { return cuda::head_explicit(call); });
      },
      py::arg("device"), py::arg("stream"), py::arg("problem"), py::arg("first"), py::arg("rows"), py::arg("special"),
      py::arg("summary"), py::arg("scratch"), py::arg("slots"));
  module.def(
      "cuda_head_chunk_statistics",
      [](int device, uintptr_t stream, const Problem& problem, int64_t first, int64_t rows, uintptr_t z,
         int64_t z_stride, uintptr_t q, uintptr_t q_pieces, int pieces, uintptr_t summary, uintptr_t center,
         uintptr_t centered_squares, uintptr_t row_state) {
        auto call = chunk_call<cuda::HeadChunk>(device, stream, problem, first, rows);
        call.z = pointer<const void>(z);
        call.z_stride = z_stride;
        call.q = pointer<void>(q);
        call.q_pieces = pointer<void>(q_pieces);
        call.pieces = pieces;
        call.summary = pointer<const double>(summary);
        call.center = pointer<const double>(center);
        call.centered_squares = pointer<const double>(centered_squares);
        call.row_state = pointer<HeadRow>(row_state);
        run_released([&] { return cuda::head_chunk_statistics(call); });
      },
      py::arg("device"), py::arg("stream"), py::arg("problem"), py::arg("first"), py::arg("rows"), py::arg("z"),
      py::arg("z_stride"), py::arg("q"), py::arg("q_pieces"), py::arg("pieces"), py::arg("summary"), py::arg("center"),
      py::arg("centered_squares"), py::arg("row_state"));
  module.def(
      "cuda_head_repeat_keys",
      [](int device, uintptr_t stream, const Problem& problem, uintptr_t summary, uintptr_t keys) {
        auto call = head_call<cuda::HeadRepeats>(device, stream, problem);
        call.summary = pointer<const double>(summary);
        call.keys = pointer<double>(keys);
        run_released([&] { return cuda::head_repeat_keys(call); });
      },
      py::arg("device"), py::arg("stream"), py::arg("problem"), py::arg("summary"), py::arg("keys"));
  module.def(
      "cuda_head_repeat_joins",
      [](int device, uintptr_t stream, const Problem& problem, uintptr_t keys, uintptr_t order, uintptr_t joins) {
        auto call = head_call<cuda::HeadRepeats>(device, stream, problem);
        call.keys = pointer<double>(keys);
        call.order = pointer<const int64_t>(order);
        call.joins = pointer<uint8_t>(joins);
        run_released([&] { return cuda::head_repeat_joins(call); });
      },
      py::arg("device"), py::arg("stream"), py::arg("problem"), py::arg("keys"), py::arg("order"), py::arg("joins"));
  module.def(
      "cuda_head_chunk_merge",
      [](int device, uintptr_t stream, const Problem& problem, int64_t first, int64_t rows, uintptr_t q,
         uintptr_t merged, uintptr_t q_pieces, int pieces, uintptr_t order, uintptr_t runs, uintptr_t repeated,
         uintptr_t summary, uintptr_t center, uintptr_t centered_squares, uintptr_t row_state) {
        auto call = chunk_call<cuda::HeadChunk>(device, stream, problem, first, rows);
        call.q = pointer<void>(q);
        call.merged = pointer<void>(merged);
        call.q_pieces = pointer<void>(q_pieces);
        call.pieces = pieces;
        call.order = pointer<const int64_t>(order);
        call.runs = pointer<const int32_t>(runs);
        call.repeated = pointer<const uint8_t>(repeated);
        call.summary = pointer<const double>(summary);
        call.center = pointer<const double>(center);
        call.centered_squares = pointer<const double>(centered_squares);
        call.row_state = pointer<HeadRow>(row_state);
        run_released([&] { return cuda::head_chunk_merge(call); });
      },
      py::arg("device"), py::arg("stream"), py::arg("problem"), py::arg("first"), py::arg("rows"), py::arg("q"),
      py::arg("merged"), py::arg("q_pieces"), py::arg("pieces"), py::arg("order"), py::arg("runs"), py::arg("repeated"),
      py::arg("summary"), py::arg("center"), py::arg("centered_squares"), py::arg("row_state"));
  module.def(
      "cuda_head_chunk_weights",
      [](int device, uintptr_t stream, const Problem& problem, int64_t first, int64_t rows, uintptr_t q_pieces,
         uintptr_t summary, uintptr_t center, uintptr_t row_state, uintptr_t mean, uintptr_t special, uintptr_t runs) {
        auto call = chunk_call<cuda::HeadChunk>(device, stream, problem, first, rows);
        call.q_pieces = pointer<void>(q_pieces);
        call.summary = pointer<const double>(summary);
        call.center = pointer<const double>(center);
        call.row_state = pointer<HeadRow>(row_state);
        call.mean = pointer<const double>(mean);
        call.special = pointer<uint8_t>(special);
        call.runs = pointer<const int32_t>(runs);
        run_released([&] { return cuda::head_chunk_weights(call); });
      },
      py::arg("device"), py::arg("stream"), py::arg("problem"), py::arg("first"), py::arg("rows"), py::arg("q_pieces"),
      py::arg("summary"), py::arg("center"), py::arg("row_state"), py::arg("mean"), py::arg("special"),
      py::arg("runs"));
  module.def(
      "cuda_head_chunk_directions",
      [](int device, uintptr_t stream, const Problem& problem, int64_t first, int64_t rows, uintptr_t upstream,
         uintptr_t log_coefficient, uintptr_t summary, uintptr_t center, uintptr_t row_state, uintptr_t numbers,
         uintptr_t mean, uintptr_t direction, uintptr_t q, uintptr_t top_row, uintptr_t top_bias, uintptr_t top,
         uintptr_t runs) {
        auto call = chunk_call<cuda::HeadBackwardChunk>(device, stream, problem, first, rows);
        call.upstream = pointer<const double>(upstream);
        call.log_coefficient = pointer<const double>(log_coefficient);
        call.summary = pointer<const double>(summary);
        call.center = pointer<const double>(center);
        call.row_state = pointer<const HeadRow>(row_state);
        call.numbers = pointer<HeadBackwardRow>(numbers);
        call.mean = pointer<const double>(mean);
        call.direction = pointer<void>(direction);
        call.q = pointer<void>(q);
        call.top_row = pointer<void>(top_row);
        call.top_bias = pointer<double>(top_bias);
        call.top = pointer<int64_t>(top);
        call.runs = pointer<const int32_t>(runs);
        run_released([&] { return cuda::head_chunk_directions(call); });
      },
      py::arg("device"), py::arg("stream"), py::arg("problem"), py::arg("first"), py::arg("rows"), py::arg("upstream"),
      py::arg("log_coefficient"), py::arg("summary"), py::arg("center"), py::arg("row_state"), py::arg("numbers"),
      py::arg("mean"), py::arg("direction"), py::arg("q"), py::arg("top_row"), py::arg("top_bias"), py::arg("top"),
      py::arg("runs"));
  module.def(
      "cuda_head_chunk_cotangent",
      [](int device, uintptr_t stream, const Problem& problem, int64_t first, int64_t rows, uintptr_t upstream,
         uintptr_t log_coefficient, uintptr_t q, uintptr_t g, uintptr_t summary, uintptr_t center,
         uintptr_t centered_squares, uintptr_t row_state, uintptr_t numbers, uintptr_t d_features, uintptr_t d_weight,
         uintptr_t d_bias, uintptr_t scratch) {
        auto call = chunk_call<cuda::HeadBackwardChunk>(device, stream, problem, first, rows);
        call.upstream = pointer<const double>(upstream);
        call.log_coefficient = pointer<const double>(log_coefficient);
        call.q = pointer<void>(q);
        call.g = pointer<void>(g);
        call.summary = pointer<const double>(summary);
        call.center = pointer<const double>(center);
        call.centered_squares = pointer<const double>(centered_squares);
        call.row_state = pointer<const HeadRow>(row_state);
        call.numbers = pointer<HeadBackwardRow>(numbers);
        call.d_features = pointer<void>(d_features);
        call.d_weight = pointer<void>(d_weight);
        call.d_bias = pointer<double>(d_bias);
        call.scratch = pointer<double>(scratch);
        run_released([&] { return cuda::head_chunk_cotangent(call); });
      },
      py::arg("device"), py::arg("stream"), py::arg("problem"), py::arg("first"), py::arg("rows"), py::arg("upstream"),
      py::arg("log_coefficient"), py::arg("q"), py::arg("g"), py::arg("summary"), py::arg("center"),
      py::arg("centered_squares"), py::arg("row_state"), py::arg("numbers"), py::arg("d_features"), py::arg("d_weight"),
      py::arg("d_bias"), py::arg("scratch"));
}

}  // namespace flatcore::bind
