// What the kernels of a head share, per row: any element as float64, and ||phi||^2; included by .cu files only.
#pragma once

#include "cuda/row_norms_block.h"
#include "cuda/team.h"
#include "head_problem.h"
#include "math/epsilon_split.h"
#include "math/norms.h"
#include "math/softmax_tail.h"

namespace flatcore::cuda {

constexpr double kNan = __builtin_nan("");

__device__ __forceinline__ bool is_gradient(const HeadProblem& call) { return (call.fields & kGradientFields) != 0; }
__device__ __forceinline__ bool asks_for(const HeadProblem& call, Field field) {
  return (call.fields >> field & 1U) != 0;
}

__device__ __forceinline__ double element(const Matrix& a, int64_t row, int64_t column) {
  const int64_t at = row * a.row_stride + column * a.column_stride;
  switch (a.dtype) {
    case Dtype::kFloat16:
      return static_cast<double>(widened(static_cast<const Half*>(a.data)[at]));
    case Dtype::kBFloat16:
      return static_cast<double>(widened(static_cast<const BHalf*>(a.data)[at]));
    case Dtype::kFloat32:
      return static_cast<double>(static_cast<const float*>(a.data)[at]);
    case Dtype::kFloat64:
      return static_cast<const double*>(a.data)[at];
  }
  return kNan;
}

// log ||phi||^2 of row n, NaN if an element is not finite; known to every lane of the team.
template <int width>
__device__ __forceinline__ double log_feature_squares(const HeadProblem& call, int64_t n) {
  const int64_t at = n * call.features.row_stride, step = call.features.column_stride;
  switch (call.features.dtype) {
    case Dtype::kFloat16:
      return log_squares<width>(static_cast<const Half*>(call.features.data) + at, step, call.D);
    case Dtype::kBFloat16:
      return log_squares<width>(static_cast<const BHalf*>(call.features.data) + at, step, call.D);
    case Dtype::kFloat32:
      return log_squares<width>(static_cast<const float*>(call.features.data) + at, step, call.D);
    case Dtype::kFloat64:
      return log_squares<width>(static_cast<const double*>(call.features.data) + at, step, call.D);
  }
  return kNan;
}

struct CombineTails {
  double inverse_temperature;
  __device__ __forceinline__ math::SoftmaxTail operator()(const math::SoftmaxTail& a,
                                                          const math::SoftmaxTail& b) const {
    return math::combine(a, b, inverse_temperature);
  }
};

// Where each wanted field's values go: row of the block by the number of wanted fields before it.
struct Values {
  void* values;
  int64_t stride;
  uint32_t fields;
  bool is_double;

  __device__ __forceinline__ explicit Values(const HeadProblem& call)
      : values(call.values), stride(call.N), fields(call.fields), is_double(call.double_values) {}
  __device__ __forceinline__ bool wants(Field field) const { return (fields >> field & 1U) != 0; }
  __device__ __forceinline__ void put(Field field, int64_t n, double value) const {
    if (!wants(field)) return;
    const int64_t at = __popc(fields & ((1U << field) - 1U)) * stride + n;
    if (is_double) {
      static_cast<double*>(values)[at] = value;
    } else {
      static_cast<float*>(values)[at] = static_cast<float>(value);
    }
  }
};

// What a row's softmax gives without W's rows: prediction, loss and the fields that need no more.
__device__ __forceinline__ void put_softmax_fields(const HeadProblem& call, const Values& values, int64_t n, bool bad,
                                                   const math::SoftmaxTail& tail,
                                                   const math::EpsilonSplit<double>& split, double log_n,
                                                   double log_weight, Label label, double own) {
  const auto put = [&](Field field, double value) { values.put(field, n, bad ? kNan : value); };
  const double log_trace = math::log_head_square(log_n, call.include_bias) + split.log_one_minus_sum_p2 -
                           2.0 * math::log_nonnegative(call.temperature);
  put(kConfidence, split.confidence);
  put(kMargin, split.margin);
  put(kLogOneMinusConfidence, split.log_eps);
  put(kLogFeatureNorm, 0.5 * log_n);
  put(kLogHessianTrace, log_trace);
  put(kLogLayerwise, log_trace + 0.5 * call.norm_power * log_weight);
  if (label == Label::kIgnored) {
    values.put(kLoss, n, 0.0);
  } else {
    put(kLoss, label == Label::kValid ? (tail.t - own) * (1.0 / call.temperature) + split.log1p_tau : kNan);
  }
  if (call.prediction != nullptr) call.prediction[n] = bad ? -1 : tail.m;
}

__device__ __forceinline__ void put_gradient_norms(const Values& values, int64_t n, double value) {
  values.put(kLogGradientNorm, n, value);
  values.put(kLogGradientNorm1, n, value);
  values.put(kLogGradientNormInf, n, value);
}

// What a share is multiplied by before it is cut into pieces of 16 bits.
template <class T>
constexpr double kPieceScale = 1.0;
template <>
constexpr double kPieceScale<Half> = 0x1p15;  // small q would meet float16's least number
// The same for a head whose shares come in so many pieces, 0 for none.
__device__ __forceinline__ double piece_scale(const HeadProblem& call, int pieces) {
  if (pieces == 0) return 1.0;
  return call.weight.dtype == Dtype::kFloat16 ? kPieceScale<Half> : kPieceScale<BHalf>;
}

}  // namespace flatcore::cuda
