// A softmax head with its inputs and outputs, as the kernels of the CPU and of CUDA devices take it.
#pragma once

#include <cstdint>

#include "element.h"
#include "math/norms.h"
#include "math/portable.h"
#include "math/softmax_tail.h"

namespace flatcore {

// The rows of the result block, by bit of `fields`; the names are in flatcore/reference/head_metrics.py.
enum Field : int {
  kConfidence,
  kMargin,
  kLogOneMinusConfidence,
  kLogFeatureNorm,
  kLogHessianTrace,
  kLogLayerwise,
  kLogNeuronwise,
  kLoss,
  kLogGradientNorm,
  kLogGradientNorm1,
  kLogGradientNormInf,
  kFieldCount
};
constexpr uint32_t kGradientFields = 1U << kLogGradientNorm | 1U << kLogGradientNorm1 | 1U << kLogGradientNormInf;
constexpr uint32_t kOtherNorms = 1U << kLogGradientNorm1 | 1U << kLogGradientNormInf;
constexpr uint32_t kWeightFields = kGradientFields | 1U << kLogNeuronwise;

// Of fields with one gradient norm.
FLATCORE_INLINE math::NormOrder norm_order(uint32_t fields) {
  return (fields >> kLogGradientNorm & 1U) != 0    ? math::NormOrder::kTwo
         : (fields >> kLogGradientNorm1 & 1U) != 0 ? math::NormOrder::kOne
                                                   : math::NormOrder::kInf;
}

// What every kernel of this stem is asked for.
struct HeadProblem {
  Matrix features;                  // (N, D)
  Matrix weight;                    // (C, D)
  Matrix logits;                    // (N, C); data null: W phi + b is computed
  const double* bias = nullptr;     // (C,) or null; added to computed logits only
  const int64_t* target = nullptr;  // (N,) or null
  int64_t N = 0;
  int64_t D = 0;
  int64_t C = 0;
  double temperature = 1.0;
  int64_t ignore_index = -100;
  bool include_bias = false;
  int norm_power = 2;
  uint32_t fields = 0;
  bool double_compute = false;  // logits in float64 (some input is float64), otherwise float32
  int threads = 1;
  // outputs
  void* values = nullptr;  // (K, N), one row per bit of fields, in the order of the bits
  bool double_values = false;
  int64_t* prediction = nullptr;  // (N,) or null
};

enum class Label { kNone, kIgnored, kValid, kBad };
FLATCORE_INLINE Label label_of(const HeadProblem& problem, int64_t n) {
  if (problem.target == nullptr) return Label::kNone;
  const int64_t y = problem.target[n];
  if (y == problem.ignore_index) return Label::kIgnored;
  return y >= 0 && y < problem.C ? Label::kValid : Label::kBad;
}

// Large heads: a row's statistics over the classes met so far, from one tile of classes to the next.
struct HeadTail {
  math::SoftmaxTail tail;  // u1 is NaN for a row that is not to be trusted
  double own;              // logit of the label
  // over the shares as stored, relative to the best logit but one: of u_j, u_j ||2^e w_j - center||^2 and
  // u_j (2^e b_j - center_b)
  double share_sum, square_sum, bias_sum;
  double log_n;
};

// Numbers of a row after the last tile, kept between the kernels around the library's products.
struct HeadRow {
  double log1p_tau, eps, log_eps, confidence, log_n;
  double square_mean;  // sum_j q_j ||2^e w_j - center||^2, if centered_squares is given
  double bias_mean;    // sum_j q_j (2^e b_j - center_b), 0 unless include_bias
  int64_t m;           // top class, kNoClass for a poisoned row
  // Sum of the shares as they were stored, by which the two means above are divided: the weights are those of the
  // product to the last bit, so that their rounding is a change of each p_j by 2^-24 and no more, however much of the
  // variance cancels.
  double q_sum;
};

// The same for its gradient.
struct HeadBackwardRow {
  double c;           // 0: the row adds nothing
  double inner;       // Var_p(w)/eps; or the norm that belongs to the shares below
  double direction2;  // ||direction||^2 with the bias's column
  double bias;        // the direction's entry for the bias's column
  double delta2;      // ||w_m - w_q||^2
  int64_t kind;       // a RowKind
  double own;         // a gradient norm's direction times the label's row of W, about the center
  double others;      // sum of dL/dz over the classes met so far apart from the top one
};
// Explicit: from differences of rows of W. Unsure (CUDA, until its direction is there): signs, or which component is
// the largest, may be a product's rounding.
enum RowKind : int64_t { kOrdinary = 0, kPoisoned = 1, kExplicit = 2, kUnsure = 3 };

}  // namespace flatcore
