// What the fused and the chunked kernels share, per row: typed access, log norms, the label rule, writing results, and
// the explicit sums for the rare rows where a shared table of distances is not accurate enough.
#pragma once

#include <atomic>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "cpu/head_metrics.h"
#include "cpu/simd.h"
#include "math/cancellation.h"
#include "math/epsilon_split.h"
#include "math/explicit_rows.h"
#include "math/norms.h"
#include "math/softmax_tail.h"

namespace flatcore::cpu::FLATCORE_TARGET {

constexpr double kNan = __builtin_nan("");
using math::kLn2;
using math::log_head_square;
using math::scaling_exponent;

template <class Pointer>
using ElementOf = std::remove_const_t<std::remove_pointer_t<Pointer>>;

FLATCORE_INLINE double element(const Matrix& a, int64_t row, int64_t column) {
  const int64_t at = row * a.row_stride + column * a.column_stride;
  double value = 0.0;
  with_element(a.dtype,
               [&](auto* type) { value = static_cast<double>(widen(static_cast<decltype(type)>(a.data)[at])); });
  return value;
}

// log sum x_d^2 of `count` elements: no square leaves the range. NaN if an element is not finite.
template <class T>
double log_sum_squares(const T* x, int64_t stride, int64_t count) {
  double largest = 0.0;
  for (int64_t d = 0; d < count; ++d) {
    const double a = std::fabs(static_cast<double>(widen(x[d * stride])));
    if (!(a < math::kInfinity)) return kNan;
    if (a > largest) largest = a;
  }
  if (largest == 0.0) return -math::kInfinity;
  const int exponent = std::ilogb(largest);
  double sum = 0.0;
  for (int64_t d = 0; d < count; ++d) {
    const double a = std::scalbn(static_cast<double>(widen(x[d * stride])), -exponent);
    sum += a * a;
  }
  return std::log(sum) + 2.0 * exponent * kLn2;
}

// Where each wanted field's values go.
class Values {
 public:
  explicit Values(const HeadProblem& problem) : double_(problem.double_values) {
    int64_t row = 0;
    for (int field = 0; field < kFieldCount; ++field) {
      const bool wanted = problem.fields >> field & 1U;
      float_at_[field] = wanted && !double_ ? static_cast<float*>(problem.values) + row * problem.N : nullptr;
      double_at_[field] = wanted && double_ ? static_cast<double*>(problem.values) + row * problem.N : nullptr;
      row += wanted;
    }
  }
  bool wants(Field field) const {
    return (double_ ? static_cast<void*>(double_at_[field]) : float_at_[field]) != nullptr;
  }
  // values[0..count) become the field of rows n, n+1, ...
  void put(Field field, int64_t n, const double* values, int count = 1) const {
    double* as_double = double_at_[field];
    float* as_float = float_at_[field];
    if (as_double != nullptr) {
      for (int i = 0; i < count; ++i) as_double[n + i] = values[i];
    } else if (as_float != nullptr) {
      for (int i = 0; i < count; ++i) as_float[n + i] = static_cast<float>(values[i]);
    }
  }
  void put(Field field, int64_t n, const float* values, int count) const {
    if (float_at_[field] != nullptr)
      std::memcpy(float_at_[field] + n, values, static_cast<size_t>(count) * sizeof(float));
  }
  void put(Field field, int64_t n, double value) const { put(field, n, &value, 1); }

 private:
  bool double_;
  float* float_at_[kFieldCount];
  double* double_at_[kFieldCount];
};

// The first row with a label that is no class, whichever thread meets it.
class FirstBadRow {
 public:
  void report(int64_t n) {
    int64_t seen = row_.load(std::memory_order_relaxed);
    while ((seen < 0 || n < seen) && !row_.compare_exchange_weak(seen, n, std::memory_order_relaxed)) {
    }
  }
  Outcome outcome() const {
    const int64_t row = row_.load(std::memory_order_relaxed);
    return row < 0 ? Outcome{} : Outcome{Status::kBadLabel, row};
  }

 private:
  std::atomic<int64_t> row_{-1};
};

// Logits of one row in float64, for the explicit sums.
inline void explicit_logits(const HeadProblem& call, int64_t n, double* z) {
  if (call.logits.data != nullptr) {
    for (int64_t j = 0; j < call.C; ++j) z[j] = element(call.logits, n, j);
    return;
  }
  with_element(call.features.dtype, [&](auto* x_type) {
    using X = ElementOf<decltype(x_type)>;
    with_element(call.weight.dtype, [&](auto* w_type) {
      using W = ElementOf<decltype(w_type)>;
      const X* x = static_cast<const X*>(call.features.data) + n * call.features.row_stride;
      for (int64_t j = 0; j < call.C; ++j) {
        const W* w = static_cast<const W*>(call.weight.data) + j * call.weight.row_stride;
        double sum = 0.0;
        for (int64_t d = 0; d < call.D; ++d) {
          sum += static_cast<double>(widen(x[d * call.features.column_stride])) *
                 static_cast<double>(widen(w[d * call.weight.column_stride]));
        }
        z[j] = call.bias != nullptr ? sum + call.bias[j] : sum;
      }
    });
  });
}

// The sum sum_j p_j (w_j - w_a) over the classes j whose row differs from row a, and what varies about their mean, with
// p_j = exp(log_scale) u_j and the largest u_j equal to 1: nothing underflows, nothing cancels that need not.
// z are the C logits; `sum` is D doubles of scratch, `u` C doubles.
struct ExplicitSum {
  double log_scale;                       // -inf if no class differs
  double group;                           // sum of the other p_j: of the classes whose row equals row a
  double total;                           // sum_j u_j
  double spread;                          // sum_j u_j ||w_j - w_q||^2, w_q the mean of u, times 2^(2 exponent)
  double norm1, norm2_squared, norm_inf;  // of sum_j u_j (w_j - w_a), times 2^exponent (its square for norm2_squared)
  double bias_sum;                        // sum_j u_j (b_j - b_a), times 2^exponent
};
inline ExplicitSum explicit_sum(const HeadProblem& problem, bool with_bias, int64_t anchor, int exponent,
                                const double* z, double t, double log1p_tau, bool with_spread, double* sum, double* u) {
  ExplicitSum out{-math::kInfinity, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0};
  const double inverse_temperature = 1.0 / problem.temperature;
  with_element(problem.weight.dtype, [&](auto* type) {
    using T = ElementOf<decltype(type)>;
    const T* w = static_cast<const T*>(problem.weight.data);
    const int64_t step = problem.weight.column_stride;
    const T* wa = w + anchor * problem.weight.row_stride;
    double top = -math::kInfinity;
    for (int64_t j = 0; j < problem.C; ++j) {
      u[j] = -math::kInfinity;
      const double logit = z[j];
      if (logit == -math::kInfinity) continue;
      const T* wj = w + j * problem.weight.row_stride;
      bool differs = with_bias && problem.bias[j] != problem.bias[anchor];
      for (int64_t d = 0; d < problem.D && !differs; ++d) differs = widen(wj[d * step]) != widen(wa[d * step]);
      if (!differs) {
        out.group += std::exp((logit - t) * inverse_temperature - log1p_tau);
        continue;
      }
      u[j] = logit;
      if (logit > top) top = logit;
    }
    if (top == -math::kInfinity) return;
    out.log_scale = (top - t) * inverse_temperature - log1p_tau;
    const double scale = std::scalbn(1.0, exponent);
    double square_sum = 0.0;  // sum_j u_j ||w_j - w_a||^2
    for (int64_t d = 0; d < problem.D; ++d) sum[d] = 0.0;
    for (int64_t j = 0; j < problem.C; ++j) {
      if (u[j] == -math::kInfinity) continue;
      const double uj = u[j] = math::exp_nonpositive((u[j] - top) * inverse_temperature);
      if (!math::explicit_share_counts(uj)) {
        u[j] = -math::kInfinity;
        continue;
      }
      const T* wj = w + j * problem.weight.row_stride;
      double square = 0.0;
      for (int64_t d = 0; d < problem.D; ++d) {
        const double difference =
            (static_cast<double>(widen(wj[d * step])) - static_cast<double>(widen(wa[d * step]))) * scale;
        sum[d] += uj * difference;
        square += difference * difference;
      }
      if (with_bias) {
        const double difference = (problem.bias[j] - problem.bias[anchor]) * scale;
        out.bias_sum += uj * difference;
        square += difference * difference;
      }
      out.total += uj;
      square_sum += uj * square;
    }
    for (int64_t d = 0; d < problem.D; ++d) {
      const double value = std::fabs(sum[d]);
      out.norm1 += value;
      out.norm2_squared += value * value;
      out.norm_inf = value > out.norm_inf ? value : out.norm_inf;
    }
    if (out.norm1 != out.norm1) out.norm_inf = kNan;  // a comparison drops the NaN that a sum keeps
    if (!with_spread) return;
    const double mean2 = (out.norm2_squared + out.bias_sum * out.bias_sum) / out.total;
    if (math::spread_may_be_a_difference(out.group)) {
      out.spread = square_sum > mean2 ? square_sum - mean2 : 0.0;
      return;
    }
    for (int64_t j = 0; j < problem.C; ++j) {
      if (u[j] == -math::kInfinity) continue;
      const T* wj = w + j * problem.weight.row_stride;
      double square = 0.0;
      for (int64_t d = 0; d < problem.D; ++d) {
        const double difference =
            (static_cast<double>(widen(wj[d * step])) - static_cast<double>(widen(wa[d * step]))) * scale -
            sum[d] / out.total;
        square += difference * difference;
      }
      if (with_bias) {
        const double difference = (problem.bias[j] - problem.bias[anchor]) * scale - out.bias_sum / out.total;
        square += difference * difference;
      }
      out.spread += u[j] * square;
    }
  });
  return out;
}

// log Var_p(w).
FLATCORE_INLINE double log_variance(const ExplicitSum& sum, int exponent) {
  if (sum.log_scale == -math::kInfinity) return -math::kInfinity;
  const double norm2 = sum.norm2_squared + sum.bias_sum * sum.bias_sum;
  const double inner = math::explicit_variance(sum.spread, sum.group, norm2, sum.total);
  return sum.log_scale + std::log(inner) - 2.0 * exponent * kLn2;
}

// Writes the gradient norms of row n from the explicit sum about the target's row.
inline void put_gradient_norms(const HeadProblem& problem, const Values& values, int64_t n, const ExplicitSum& sum,
                               int exponent) {
  const double shift = sum.log_scale - exponent * kLn2 - std::log(problem.temperature);
  const bool none = sum.log_scale == -math::kInfinity;
  values.put(kLogGradientNorm, n, none ? -math::kInfinity : shift + 0.5 * std::log(sum.norm2_squared));
  values.put(kLogGradientNorm1, n, none ? -math::kInfinity : shift + std::log(sum.norm1));
  values.put(kLogGradientNormInf, n, none ? -math::kInfinity : shift + std::log(sum.norm_inf));
}

inline void put_gradient_norms(const Values& values, int64_t n, double value) {
  for (Field field : {kLogGradientNorm, kLogGradientNorm1, kLogGradientNormInf}) values.put(field, n, value);
}

}  // namespace flatcore::cpu::FLATCORE_TARGET
