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
  bool double_compute = false;    // center is rounded to float64, otherwise to float32
  double* row_squares = nullptr;  // (C,): workspace
  double* row_largest = nullptr;  // (C,): workspace
  // (3,): log ||W||_F^2; e: 2^e brings extreme entries into range, usually 0; whether the center is not 0
  double* summary = nullptr;
  double* center = nullptr;            // (D + 1,): near the mean of 2^e W's rows, last entry for the bias; or null
  double* centered_squares = nullptr;  // (C,): ||2^e w_j - center||^2; null if center is
  double* keys = nullptr;              // (C + D + 1,): the rows' projections (head_repeats.h), workspace behind them
};

// Then tiles of classes outside, blocks of rows inside. What does not change from tile to tile. Where rows of W repeat,
// classes stand in another order, group by group: "position" is the place in that order.
struct HeadLoop : HeadProblem {
  const double* summary = nullptr;           // (3,)
  const double* center = nullptr;            // (D + 1,)
  const double* centered_squares = nullptr;  // (C,), by position; null: no field needs rows of W
  const int64_t* classes = nullptr;          // (C,): the class of each position; null: the position itself
  const int64_t* positions = nullptr;        // (C,): the position of each class
  const double* bias_by_position = nullptr;  // (C,) if there is a bias and an order
  const float* float_bias = nullptr;         // (C,), by position: the bias, if all of it are floats
  HeadTail* tails = nullptr;                 // (rows of a block,), or (N,) if all_tails: kept for the gradient
  bool all_tails = false;
  HeadRow* row_state = nullptr;  // (rows of a block,)
  void* mean = nullptr;          // (rows of a block, D), the compute type: shares times 2^e W - center, by the library
  double* scratch = nullptr;     // threads * head_chunk_scratch doubles
  bool equal_rows = false;       // all rows of W are one: every variance is 0, and none has to be summed to see it
};

// Groups of equal or nearly equal rows within a tile, all numbers positions. Their shares are brought together in the
// first of each piece.
struct TileRepeats {
  int64_t first = 0;                // of the tile
  const int64_t* starts = nullptr;  // (pieces,)
  int64_t pieces = 0;
  int64_t end = 0;                   // behind the last piece
  const int64_t* near = nullptr;     // (near_count,): members whose row differs from the first one's
  const int64_t* near_of = nullptr;  // (near_count,): that first one
  int64_t near_count = 0;
};
struct HeadTile {
  int64_t first = 0;  // row of the problem that is row 0 of the block
  int64_t rows = 0;
  int64_t first_class = 0;  // position
  int64_t classes = 0;
  void* z = nullptr;  // (rows, classes): in, logits in the compute type; out, the shares u if rows of W are needed
  int64_t z_stride = 0;
  TileRepeats repeats;
  void* near = nullptr;  // (rows, near_count): the shares of repeats.near
};

// A product of our own (head_own_products.cpp), for rows of a block and a tile.
struct OwnProduct {
  int64_t rows = 0;
  int64_t first_class = 0;              // position, or class where classes_of is null
  int64_t classes = 0;                  // of the tile
  const int64_t* classes_of = nullptr;  // (C,): the class of each position
  const void* x = nullptr;              // (rows, D), the compute type: of the logits
  int64_t x_stride = 0;
  void* z = nullptr;  // (rows, classes): the logits, out; of the sums the shares, in
  int64_t z_stride = 0;
};

// Doubles of scratch a thread needs for rows that are summed explicitly.
inline int64_t head_chunk_scratch(int64_t C, int64_t D) { return 2 * C + D + 8; }

#define FLATCORE_DECLARE(target)                                            \
  namespace target {                                                        \
  Outcome head_metrics(const HeadMetrics& call);                            \
  void head_summary(const HeadSummary& call);                               \
  void head_own_logits(const HeadProblem& call, const OwnProduct& product); \
  void head_own_sums(const HeadLoop& call, const OwnProduct& product);      \
  Outcome head_loop_statistics(const HeadLoop& call, const HeadTile& tile); \
  void head_loop_values(const HeadLoop& call, int64_t first, int64_t rows); \
  }
FLATCORE_DECLARE(baseline)
FLATCORE_DECLARE(avx2)
FLATCORE_DECLARE(avx512)
#undef FLATCORE_DECLARE

}  // namespace flatcore::cpu
