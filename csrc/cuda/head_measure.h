// One measure of a small head (at most kFusedClasses classes), reduced, and its gradient: the plain interfaces of the
// kernels. Two launches each way, whatever is asked for.
#pragma once

#include "cuda/head_metrics.h"

namespace flatcore::cuda {

enum class Reduction : int { kNone = 0, kSum = 1, kMean = 2 };

// `fields` holds the one bit of the measure; `values` and `prediction` are not used. s_n: sample_weights_n; else 1
// without labels, the class weight of a valid one (1 without any), 0 for an ignored one, NaN for one that is no class
// and for a class weight below 0. Linear: s_n exp(log_n), their sum, or that over the divisor; log: the log of the
// same. A row with s_n = 0 counts as 0 by select, NaN or not.
struct HeadMeasure : HeadCall {
  const double* sample_weights = nullptr;  // (N,) or null
  Matrix class_weight;                     // (C,), one row; data null: 1
  Reduction reduction = Reduction::kMean;
  bool log = false;
  bool count_rows = false;  // the mean's divisor is N, not the sum of s_n
  bool double_value = false;
  void* value = nullptr;        // one number; (N,) for kNone
  double* row_logs = nullptr;   // (N,): out, log of d value/d log_n, -inf where a row's value is 0
  double* workspace = nullptr;  // (C,)
};
Launched head_measure(const HeadMeasure& call);

// c_n = upstream_n exp(log_coefficient_n) is the derivative of the result with respect to row n's log value; which rows
// add nothing and which poison the rest: csrc/cpu/head_metrics_backward.h. Outputs are contiguous, each of its own
// dtype; null where not wanted.
struct HeadMeasureBackward : HeadCall {
  Matrix upstream;                          // one row of N numbers, or of one number for all (a stride of 0)
  const double* log_coefficient = nullptr;  // (N,) or null: 0
  double* workspace = nullptr;              // head_measure_backward_workspace doubles
  Matrix d_features;                        // (N, D)
  Matrix d_weight;                          // (C, D)
  Matrix d_bias;                            // (C,)
  Matrix d_logits;                          // (N, C); given logits only
};
int64_t head_measure_backward_workspace(const HeadProblem& problem);
Launched head_measure_backward(const HeadMeasureBackward& call);

}  // namespace flatcore::cuda
