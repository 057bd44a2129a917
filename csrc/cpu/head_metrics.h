// Per-sample statistics of a softmax head: the plain interfaces of the kernels.
//
// N samples, D features, C classes. Inputs are never written; outputs are overwritten; the caller allocates outputs and
// workspace, which must not overlap inputs. Nothing here knows Python or torch.
#pragma once

#include <cstdint>

#include "cpu/head_repeats.h"
#include "head_problem.h"
#include "status.h"

namespace flatcore::cpu {

// Small heads: one fused read of the features.
struct HeadMetrics : HeadProblem {
  void* workspace = nullptr;  // head_metrics_workspace bytes, aligned to 64
};
int64_t head_metrics_workspace(const HeadProblem& problem);

// Large heads, between the library's products. First: properties of W alone.
struct HeadSummary {
  Matrix weight;  // (C, D)
  int64_t C = 0;
  int64_t D = 0;
  const double* bias = nullptr;  // (C,), null unless it counts as a column of W
  int threads = 1;
  // outputs
  bool double_compute = false;         // center is rounded to float64, otherwise to float32
  double* row_squares = nullptr;       // (C,): workspace
  double* row_largest = nullptr;       // (C,): workspace
  double* summary = nullptr;           // (2,): log ||W||_F^2, and e: 2^e brings extreme entries into range; usually 0
  double* center = nullptr;            // (D + 1,): near the mean of 2^e W's rows, last entry for the bias; or null
  double* centered_squares = nullptr;  // (C,): ||2^e w_j - center||^2; null if center is
};

// Squared distances between the rows of W, from differences: D_jk = ||w_j - w_k||^2 times 2^(2 e).
struct HeadDistances {
  Matrix weight;  // (C, D), float32 or float64, column stride 1
  int64_t C = 0;
  int64_t D = 0;
  const double* bias = nullptr;  // (C,), null unless it counts as a column of W
  int exponent = 0;              // e
  int threads = 1;
  void* distances = nullptr;  // (C, C), of the type of weight
};

// Second: logits of a chunk of rows -> everything that needs no further product, and q for the product that follows.
struct HeadChunk : HeadProblem {
  int64_t first = 0;  // row of the problem that is row 0 of the chunk
  int64_t rows = 0;
  const void* z = nullptr;  // (rows, C): the product W phi, or the given logits, in the compute type
  int64_t z_stride = 0;
  void* q = nullptr;  // (rows, C): softmax over the classes other than the top one, 0 there; may be z itself; or null
  int64_t q_stride = 0;
  // where rows of W repeat, what the products take instead of q:
  Repeats repeats;
  void* merged = nullptr;  // (rows, C): the shares of a group in its first class, 0 in the others; may be q; or null
  int64_t merged_stride = 0;
  void* near_q = nullptr;                    // (rows, near_count): the shares of repeats.near
  const double* summary = nullptr;           // (2,)
  const double* center = nullptr;            // (D + 1,)
  const double* centered_squares = nullptr;  // (C,)
  HeadRow* row_state = nullptr;              // (rows,)
  // for the second kernel: either the mean row of q ...
  const double* mean =
      nullptr;  // (rows, D): merged (2^e W - center) + near_q (2^e (W_near - the rows of their classes))
  int64_t mean_stride = 0;
  // ... or the mean distances
  const void* distance = nullptr;  // (rows, C): merged times the table of squared distances
  int64_t distance_stride = 0;
  double* scratch = nullptr;  // threads * head_chunk_scratch doubles
  bool equal_rows = false;    // all rows of W are one: every variance is 0, and none has to be summed to see it
};

// Doubles of scratch a thread needs for rows that are summed explicitly.
inline int64_t head_chunk_scratch(int64_t C, int64_t D) { return 2 * C + D + 8; }

#define FLATCORE_DECLARE(target)                        \
  namespace target {                                    \
  Outcome head_metrics(const HeadMetrics& call);        \
  void head_summary(const HeadSummary& call);           \
  void head_distances(const HeadDistances& call);       \
  Outcome head_chunk_statistics(const HeadChunk& call); \
  void head_chunk_weights(const HeadChunk& call);       \
  }
FLATCORE_DECLARE(baseline)
FLATCORE_DECLARE(avx2)
FLATCORE_DECLARE(avx512)
#undef FLATCORE_DECLARE

}  // namespace flatcore::cpu
