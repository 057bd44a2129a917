// Per-sample statistics of a softmax head and their gradients on a CUDA device: the plain interfaces of the kernels.
//
// All addresses are on `device`; outputs are overwritten; the caller allocates outputs and workspace, apart from the
// inputs. Work goes to the stream; nothing waits for the device, nothing is allocated. A row whose label is no class is
// NaN where the label is used.
#pragma once

#include "cuda/device.h"
#include "head_problem.h"

namespace flatcore::cuda {

struct HeadCall : HeadProblem {
  int device = 0;
  Stream stream = nullptr;
};

// Properties of W alone, for small and large heads.
struct HeadWeights : HeadCall {
  double* workspace = nullptr;         // head_weights_workspace doubles
  double* summary = nullptr;           // (2,): log ||W||_F^2, and e: 2^e brings extreme entries into range; usually 0
  double* center = nullptr;            // (D + 1,): near the mean of 2^e W's rows, last entry for the bias; or null
  double* centered_squares = nullptr;  // (C,): ||2^e w_j - center||^2; null if center is
  void* packed = nullptr;              // packed_rows x packed_stride: W in the compute type, zeros behind; or null
  int64_t packed_rows = 0;
  int64_t packed_stride = 0;
  double* distances = nullptr;       // (C, C): ||2^e (w_j - w_k)||^2 from differences; or null
  double* bias_distances = nullptr;  // the same with the bias as a column; null unless include_bias
};
int64_t head_weights_workspace(int64_t D, int64_t C);
Launched head_weights(const HeadWeights& call);

// Small heads: every statistic from one read of the features. Fields whose bit a row sets in `special` are left to
// head_explicit.
constexpr int64_t kFusedClasses = 32;
struct HeadMetrics : HeadCall {
  const void* packed = nullptr;  // as head_weights packs it, for head_packing's sizes
  int64_t packed_stride = 0;
  const double* summary = nullptr;
  const double* distances = nullptr;
  const double* bias_distances = nullptr;
  uint8_t* special = nullptr;  // (N,): written if distances are there
};
struct HeadPacking {
  int64_t rows, stride;
};
HeadPacking head_packing(const HeadProblem& problem);
// Classes whose products are formed together: the fewest passes, and of those the least padding.
int head_class_block(int64_t C, bool double_compute);
Launched head_metrics(const HeadMetrics& call);
// the same for features of one dtype
Launched head_metrics_float16(const HeadMetrics& call);
Launched head_metrics_bfloat16(const HeadMetrics& call);
Launched head_metrics_float32(const HeadMetrics& call);
Launched head_metrics_float64(const HeadMetrics& call);

// Rows to be done from explicit differences between rows of W: those with bits in `special`.
enum SpecialField : uint8_t { kSpecialNeuronwise = 1, kSpecialGradient = 2 };
struct HeadExplicit : HeadCall {
  int64_t first = 0;  // row of the problem that special[0] is for
  int64_t rows = 0;
  const uint8_t* special = nullptr;  // (rows,)
  const double* summary = nullptr;
  double* scratch = nullptr;  // slots x 2 C doubles
  int64_t slots = 0;
};
Launched head_explicit(const HeadExplicit& call);

// Classes that share a row of W: the library sorts the keys into `order`, and makes `runs` of `joins`.
// All rows are one where the first group is of all C classes: every variance is 0.
struct HeadRepeats : HeadCall {
  const double* summary = nullptr;  // (2,)
  double* keys = nullptr;           // (C,): equal for equal rows
  const int64_t* order = nullptr;   // (C,): classes by their keys
  uint8_t* joins = nullptr;         // (C,): whether row order[k] equals row order[k - 1]
};
Launched head_repeat_keys(const HeadRepeats& call);
Launched head_repeat_joins(const HeadRepeats& call);

// Large heads, between the library's products, for a chunk of rows.
struct HeadChunk : HeadCall {
  int64_t first = 0;  // row of the problem that is row 0 of the chunk
  int64_t rows = 0;
  const void* z = nullptr;  // (rows, C): the product W phi, or the given logits, in the compute type
  int64_t z_stride = 0;
  void* q = nullptr;  // (rows, C), contiguous: softmax over the classes other than the top one; may be z; or null
  // or q in pieces of 16 bits whose sum, over 2^15 for float16, is q: (pieces, rows, C), of W's dtype
  void* q_pieces = nullptr;
  int pieces = 0;
  const double* summary = nullptr;
  const double* center = nullptr;
  const double* centered_squares = nullptr;
  HeadRow* row_state = nullptr;  // (rows,)
  // head_chunk_merge, before the product: the shares of a group in its first class, 0 in the others
  const int64_t* order = nullptr;     // (C,)
  const int32_t* runs = nullptr;      // (C,): classes of the group that begins at order[k], or less than 2
  const uint8_t* repeated = nullptr;  // (1,): whether there is such a group
  void* merged = nullptr;             // (rows, C): may be q; pieces are merged in place
  // head_chunk_weights: runs, to see that all rows of W are one; the mean row of q
  const double* mean = nullptr;  // (rows, D): q (2^e W - center), or the pieces' sum times W
  uint8_t* special = nullptr;    // (rows,)
};
Launched head_chunk_statistics(const HeadChunk& call);
Launched head_chunk_merge(const HeadChunk& call);
Launched head_chunk_weights(const HeadChunk& call);

// Gradients, between the library's products; q and row_state as head_chunk_statistics left them (not in pieces).
struct HeadBackwardChunk : HeadCall {
  const double* upstream = nullptr;         // (N,): dL/dlog v_n is upstream exp(log_coefficient)
  const double* log_coefficient = nullptr;  // (N,), or null: 0
  int64_t first = 0;
  int64_t rows = 0;
  void* q = nullptr;  // (rows, C): in, softmax over the classes other than the top one; out, factors of the directions
  const double* summary = nullptr;
  const double* center = nullptr;
  const double* centered_squares = nullptr;
  const HeadRow* row_state = nullptr;
  HeadBackwardRow* numbers = nullptr;  // (rows,)
  // head_chunk_directions
  const int32_t* runs = nullptr;  // (C,), as in HeadChunk
  const double* mean = nullptr;   // (rows, D): q (2^e W - center)
  void* direction = nullptr;      // (rows, D), compute type
  void* top_row = nullptr;        // (rows, D), compute type: what row `top` of W's gradient gains; neuronwise only
  double* top_bias = nullptr;     // (rows,)
  int64_t* top = nullptr;         // (rows,)
  // head_chunk_cotangent
  void* g = nullptr;           // (rows, C), contiguous: in, direction (2^e W - center)^T (trace: not read); out, dL/dz
  void* d_features = nullptr;  // (rows, D), contiguous: the part that does not pass through the logits; or null
  void* d_weight = nullptr;    // (C, D), contiguous: gains the explicit rows' part; or null
  double* d_bias = nullptr;    // (C,)
  double* scratch = nullptr;   // 2 C + D + 1 doubles
};
Launched head_chunk_directions(const HeadBackwardChunk& call);
Launched head_chunk_cotangent(const HeadBackwardChunk& call);

}  // namespace flatcore::cuda
