// Gradients of one per-sample measure of a softmax head: the plain interfaces of the kernels.
#pragma once

#include <cmath>

#include "cpu/head_metrics.h"
#include "math/exp_log.h"
#include "math/upstream.h"

namespace flatcore::cpu {

// c_n = upstream_n exp(log_coefficient_n) is the derivative of the result with respect to row n's log value. A row with
// upstream_n = 0 or log_coefficient_n = -inf adds nothing, whatever stands in it and in the other of the two, nor does
// one of value 0 whose upstream is not finite; any other that is not finite makes its own gradient NaN, and W's. Of
// HeadProblem, `fields` holds the one bit of the measure; `values` and `prediction` are not used.
struct HeadBackwardProblem : HeadProblem {
  const double* upstream = nullptr;         // (N,), or one number for all rows
  int64_t upstream_stride = 1;              // 0: one number
  const double* log_coefficient = nullptr;  // (N,) or null: 0
};

// c of a row. `live` where it adds something: of a gradient norm's e^-760 the row itself adds nothing that float64
// holds, but a class whose row of W equals the label's gets c p_j over the norm, which it does (math::twin_factor).
struct RowUpstream {
  double upstream = 0.0, log_coefficient = 0.0, c = 0.0;
  bool live = false;
};
FLATCORE_INLINE RowUpstream row_upstream(const HeadBackwardProblem& call, int64_t n) {
  const bool gradient = (call.fields & kGradientFields) != 0;
  RowUpstream row;
  row.upstream = call.upstream[n * call.upstream_stride];
  if (call.log_coefficient != nullptr) row.log_coefficient = call.log_coefficient[n];
  if (math::counts_as_nothing(row.upstream, row.log_coefficient, call.double_compute)) return row;
  if (gradient && label_of(call, n) == Label::kIgnored) return row;
  row.c = math::row_derivative(row.upstream, row.log_coefficient);
  row.live = row.c != 0.0 || gradient;
  return row;
}

// Small heads: every gradient from one fused read of the features. Outputs are of the compute type (float64 if
// double_compute), contiguous, overwritten; null where not wanted.
struct HeadMetricsBackward : HeadBackwardProblem {
  void* workspace = nullptr;   // head_metrics_backward_workspace bytes, aligned to 64
  void* d_features = nullptr;  // (N, D)
  void* d_weight = nullptr;    // (C, D)
  double* d_bias = nullptr;    // (C,)
  void* d_logits = nullptr;    // (N, C); given logits only
};
int64_t head_metrics_backward_workspace(const HeadProblem& problem);

// Large heads, between the library's products, for a chunk of rows whose q and row_state head_chunk_statistics left.
struct HeadBackwardChunk : HeadBackwardProblem {
  int64_t first = 0;
  int64_t rows = 0;
  void* q = nullptr;  // (rows, C): in, softmax over the classes other than the top one; out, factors of the directions
  int64_t q_stride = 0;
  const double* summary = nullptr;           // (2,)
  const double* center = nullptr;            // (D + 1,)
  const double* centered_squares = nullptr;  // (C,)
  const HeadRow* row_state = nullptr;        // (rows,)
  HeadBackwardRow* numbers = nullptr;        // (rows,)
  // head_chunk_directions: from the mean row of q to the mean row of p, or to the dual direction of the gradient
  const double* mean = nullptr;  // (rows, D): q (2^e W - center)
  void* direction = nullptr;     // (rows, D), compute type
  void* top_row = nullptr;       // (rows, D), compute type: what row `top` of W's gradient gains; neuronwise only
  double* top_bias = nullptr;    // (rows,): the same of the bias
  int64_t* top = nullptr;        // (rows,)
  // head_chunk_cotangent
  void* g = nullptr;  // (rows, C), compute type: in, direction (2^e W - center)^T (trace: not read); out, dL/dz
  int64_t g_stride = 0;
  void* d_features = nullptr;  // (rows, D), contiguous: the part that does not pass through the logits; or null
  void* d_weight = nullptr;    // (C, D), contiguous: gains the explicit rows' part; or null
  double* d_bias = nullptr;    // (C,)
  double* scratch = nullptr;   // head_chunk_scratch doubles
  bool equal_rows = false;     // as in HeadChunk
};

#define FLATCORE_DECLARE(target)                          \
  namespace target {                                      \
  void head_metrics_backward(const HeadMetricsBackward&); \
  void head_chunk_directions(const HeadBackwardChunk&);   \
  void head_chunk_cotangent(const HeadBackwardChunk&);    \
  }
FLATCORE_DECLARE(baseline)
FLATCORE_DECLARE(avx2)
FLATCORE_DECLARE(avx512)
#undef FLATCORE_DECLARE

}  // namespace flatcore::cpu
