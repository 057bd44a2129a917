// head_reduction: weights, ignored rows, mean, sum or none, log or linear, in one call. As library operators the same
// is a dozen of calls, which at N = 128 take longer than the kernel before them.
//
// Numerics: float64. Sums are taken relative to the largest log, so that nothing leaves the range before the result
// does, and in blocks of 4096 rows in a fixed order. The log of a mean is the log of the sum, never a mean of logs.
// The derivatives by the rows' logs are left as logs: e^-760, where a row has it, is 0 in float64, and its product with
// what the backward pass divides by as small a value is not.
//
// Cost: 8 bytes a row, read twice and, for the derivatives, once more; one thread.
#include "cpu/head_reduction.h"

#include <cmath>

#include "cpu/simd.h"

namespace flatcore::cpu::FLATCORE_TARGET {
namespace {

constexpr int kBlock = 4096;

double sample_weight_of(const HeadReduction& call, int64_t n) {
  if (call.sample_weights != nullptr) return call.sample_weights[n];
  return call.target == nullptr || call.target[n] != call.ignore_index ? 1.0 : 0.0;
}

void put(const HeadReduction& call, int64_t n, double value) {
  if (call.double_value) {
    static_cast<double*>(call.value)[n] = value;
  } else {
    static_cast<float*>(call.value)[n] = static_cast<float>(value);
  }
}

// s_n exp(log_n - top) of a block; rows of s_n = 0 become 0.
void scaled_block(const HeadReduction& call, int64_t first, int count, double top, double* out) {
  int i = 0;
  for (; i + kDoubles <= count; i += kDoubles) {
    store_unaligned(out + i, math::exp_nonpositive(load_unaligned<DoubleV>(call.logs + first + i) - top));
  }
  for (; i < count; ++i) out[i] = math::exp_nonpositive(call.logs[first + i] - top);
  if (call.sample_weights == nullptr && call.target == nullptr) return;
  for (i = 0; i < count; ++i) {
    const double s = sample_weight_of(call, first + i);
    out[i] = s == 0.0 ? 0.0 : s * out[i];
  }
}

void without_reduction(const HeadReduction& call) {
  for (int64_t n = 0; n < call.N; ++n) {
    const double s = sample_weight_of(call, n);
    const double log_value = s == 0.0 ? -math::kInfinity : s == 1.0 ? call.logs[n] : call.logs[n] + std::log(s);
    const double value = call.log ? log_value : std::exp(log_value);
    put(call, n, value);
    if (call.log_coefficient == nullptr) continue;
    call.log_coefficient[n] = call.log && log_value != -math::kInfinity ? log_value * 0.0 : log_value;
  }
}

}  // namespace

void head_reduction(const HeadReduction& call) {
  if (call.reduction == Reduction::kNone) return without_reduction(call);
  double top = -math::kInfinity, divisor = 0.0;
  for (int64_t n = 0; n < call.N; ++n) {
    const double s = sample_weight_of(call, n);
    divisor += s;
    if (s != 0.0 && call.logs[n] > top) top = call.logs[n];
  }
  if (call.count_rows) divisor = static_cast<double>(call.N);
  const double base = top == -math::kInfinity ? 0.0 : top;
  alignas(64) double block[kBlock];
  double sum = 0.0;
  for (int64_t first = 0; first < call.N; first += kBlock) {
    const int count = static_cast<int>(call.N - first < kBlock ? call.N - first : kBlock);
    scaled_block(call, first, count, base, block);
    double part = 0.0;
    for (int i = 0; i < count; ++i) part += block[i];
    sum += part;
  }
  const bool mean = call.reduction == Reduction::kMean;
  const double scale = mean ? 1.0 / divisor : 1.0;
  double value = call.log ? base + std::log(sum) - (mean ? std::log(divisor) : 0.0) : std::exp(base) * sum * scale;
  if (sum == 0.0) value = call.log ? -math::kInfinity : 0.0;
  if (mean && divisor == 0.0) value = __builtin_nan("");
  put(call, 0, value);
  if (call.log_coefficient == nullptr) return;
  const double log_slope = call.log ? -base - std::log(sum) : mean ? -std::log(divisor) : 0.0;
  for (int64_t n = 0; n < call.N; ++n) {
    const double s = sample_weight_of(call, n);
    const bool none = s == 0.0 || call.logs[n] == -math::kInfinity || sum == 0.0;
    call.log_coefficient[n] = none ? -math::kInfinity : call.logs[n] + (s == 1.0 ? 0.0 : std::log(s)) + log_slope;
  }
}

}  // namespace flatcore::cpu::FLATCORE_TARGET
