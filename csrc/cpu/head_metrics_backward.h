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

// Large heads, between the library's products: tiles of classes outside, blocks of rows inside.
struct HeadBackwardLoop : HeadBackwardProblem {
  const double* summary = nullptr;           // (2,)
  const double* center = nullptr;            // (D + 1,)
  const double* centered_squares = nullptr;  // (C,), by class
  const HeadTail* tails = nullptr;           // (rows of a block,), or (N,) if all_tails
  bool all_tails = false;
  const HeadRow* row_state = nullptr;  // (rows of a block,)
  HeadBackwardRow* numbers = nullptr;  // (rows of a block,)
  const void* mean = nullptr;          // (rows of a block, D), compute type: shares times 2^e W - center
  // from the mean row of q to the mean row of p, or to the dual direction of the gradient; (rows of a block, ...)
  void* direction = nullptr;   // (., D), compute type
  void* top_row = nullptr;     // (., D), compute type: what row `top` of W's gradient gains; neuronwise only
  double* top_bias = nullptr;  // (.,): the same of the bias
  int64_t* top = nullptr;      // (.,): the top class; 0 where nothing is to be added to it
  void* d_features = nullptr;  // (N, D), contiguous: the part that does not pass through the logits; or null
  void* d_weight = nullptr;    // (C, D), contiguous: gains the explicit rows' part; or null
  double* d_bias = nullptr;    // (C,)
  double* scratch = nullptr;   // threads * head_chunk_scratch doubles
  bool equal_rows = false;     // as in HeadLoop
};
struct HeadBackwardTile {
  int64_t first = 0;  // row of the problem that is row 0 of the block
  int64_t rows = 0;
  int64_t first_class = 0;
  int64_t classes = 0;
  void* z = nullptr;   // (rows, classes), compute type: in, logits; out, factors of the directions (trace: dL/dz)
  void* g = nullptr;   // (rows, classes): in, direction (2^e W - center)^T; out, dL/dz; z itself for the trace
  int64_t stride = 0;  // of both
};

#define FLATCORE_DECLARE(target)                                                                               \
  namespace target {                                                                                           \
  void head_metrics_backward(const HeadMetricsBackward&);                                                      \
  void head_backward_rows(const HeadBackwardLoop& call, int64_t first, int64_t rows);                          \
  void head_backward_tile(const HeadBackwardLoop& call, const HeadBackwardTile& tile);                         \
  /* rows: (count,), of the block; g: (count, C), dL/dz */                                                     \
  void head_backward_explicit(const HeadBackwardLoop& call, int64_t first, const int64_t* rows, int64_t count, \
                              void* g);                                                                        \
  }
FLATCORE_DECLARE(baseline)
FLATCORE_DECLARE(avx2)
FLATCORE_DECLARE(avx512)
#undef FLATCORE_DECLARE

}  // namespace flatcore::cpu
