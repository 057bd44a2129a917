// From per-sample logs to the mean, the sum or the weighted values, and the derivative: the plain interface.
#pragma once

#include <cstdint>

namespace flatcore::cpu {

enum class Reduction : int { kNone = 0, kSum = 1, kMean = 2 };

// s_n: sample_weights_n; without weights 1 for a valid label or without labels, 0 for an ignored one. Linear: s_n
// exp(log_n), their sum, or that over the divisor; log: the log of the same. A row with s_n = 0 counts as 0 by select,
// NaN or not.
struct HeadReduction {
  const double* logs = nullptr;            // (N,)
  const double* sample_weights = nullptr;  // (N,) or null
  const int64_t* target = nullptr;         // (N,) or null; read without weights only
  int64_t N = 0;
  int64_t ignore_index = -100;
  Reduction reduction = Reduction::kMean;
  bool log = false;
  bool count_rows = false;  // the mean's divisor is N, not the sum of s_n
  bool double_value = false;
  // outputs
  void* value = nullptr;              // one number; (N,) for kNone
  double* log_coefficient = nullptr;  // (N,): log of d value/d log_n, -inf where a row's value is 0; or null
};

#define FLATCORE_DECLARE(target)                  \
  namespace target {                              \
  void head_reduction(const HeadReduction& call); \
  }
FLATCORE_DECLARE(baseline)
FLATCORE_DECLARE(avx2)
FLATCORE_DECLARE(avx512)
#undef FLATCORE_DECLARE

}  // namespace flatcore::cpu
