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

// Whether logits are used as the product left them: float32's exponentials are right for those.
inline bool used_as_they_stand(const HeadProblem& problem) {
  return problem.temperature == 1.0 && (problem.bias == nullptr || problem.logits.data != nullptr);
}

// Properties of W alone, for small and large heads.
struct HeadWeights : HeadCall {
  double* workspace = nullptr;         // head_weights_workspace doubles
  double* summary = nullptr;           // (2,): log ||W||_F^2, and e: 2^e brings extreme entries into range; usually 0
  double* center = nullptr;            // (D + 1,): near the mean of 2^e W's rows, last entry for the bias; or null
  double* centered_squares = nullptr;  // (C,): ||2^e w_j - center||^2; null if center is
  // packed_rows x packed_stride of the compute type: W in it, or in pieces (head_pieces.h), zeros behind; or null
  void* packed = nullptr;
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
// Of heads of at most so many classes a block does a row by itself; of others the classes are spread over the slots.
constexpr int64_t kExplicitAlone = 256;
constexpr int64_t kExplicitSliceWords = 10, kExplicitRowWords = 9;
struct HeadExplicit : HeadCall {
  int64_t first = 0;  // row of the problem that special[0] is for
  int64_t rows = 0;
  const uint8_t* special = nullptr;    // (rows,)
  const HeadRow* row_state = nullptr;  // (rows,), or null: the top class is `prediction`
  const double* summary = nullptr;
  double* scratch = nullptr;  // slots x head_explicit_slot doubles
  int64_t slots = 0;
  double* found = nullptr;  // for a gradient: rows x head_explicit_row doubles, and no values are written; or null
};
// Doubles of a slot, and of what is kept of a row.
FLATCORE_INLINE int64_t head_explicit_slot(int64_t D) { return D + 1 + kExplicitSliceWords; }
FLATCORE_INLINE int64_t head_explicit_row(int64_t D) { return D + 1 + kExplicitRowWords; }
Launched head_explicit(const HeadExplicit& call);

// Which classes of a tile share a row of W, for all tiles at once: the library sorts each tile's keys into `order`.
// A position is one of tiles * tile_classes places; those behind the last class join nothing.
constexpr int kSameRows = 0, kRepeated = 1;  // of `found`
struct HeadRepeats : HeadCall {
  int64_t tile_classes = 0;
  int64_t positions = 0;
  double* keys = nullptr;          // (positions,): equal for equal rows
  const int64_t* order = nullptr;  // (positions,): a tile's classes by their keys, counted from its first
  uint8_t* joins = nullptr;        // (positions,): by bits, kJoins and kSameAsFirst
  int32_t* runs = nullptr;         // (positions,): classes of the group that begins there, 0 within one
  int32_t* found = nullptr;        // (2,): whether all rows of W are one, and whether a tile has equal rows at all
};
Launched head_repeat_keys(const HeadRepeats& call);
Launched head_repeat_runs(const HeadRepeats& call);

// Large heads, between the library's products: tiles of classes outside, blocks of rows inside. What does not change
// from tile to tile:
struct HeadLoop : HeadCall {
  const double* summary = nullptr;
  const double* center = nullptr;            // (D + 1,)
  const double* centered_squares = nullptr;  // (C,); null: no field needs rows of W
  // equal rows, as in HeadRepeats; with centered_squares
  const int64_t* order = nullptr;
  const int32_t* runs = nullptr;
  const int32_t* found = nullptr;
  int pieces = 0;  // 16-bit numbers of W's dtype that a share is stored in; 0: one number of the compute type
  // or, of heads of at most kTableClasses classes, in one tile, for neuronwise and the L2 norm: the table of distances,
  // (C, C) as in HeadWeights, in place of all four above; shares are numbers of the compute type then
  const double* distances = nullptr;
  HeadTail* tails = nullptr;  // (rows of a block,), or (N,) if all_tails: kept for the gradient
  bool all_tails = false;
  HeadRow* row_state = nullptr;  // (rows of a block,)
  void* mean = nullptr;          // (rows of a block, D), compute type: the shares' product with 2^e W - center by the
                                 // library, or the pieces' with W
  uint8_t* special = nullptr;    // (rows of a block,)
};
// A tile has at most so many bytes of logits in a row: a block of threads holds them in its registers.
constexpr int64_t kHeadTileBytes = 8192;
// The classes of a head up to which their table of distances replaces the rows of W behind the shares: a warp's row.
constexpr int64_t kTableClasses = 128;
// Pieces come in slices of so many classes: in a longer product tensor cores, which cut off instead of rounding, would
// lose more than a float's product does.
constexpr int64_t kPieceClasses = 512;
// Classes of a tile as they lie in memory: every row begins at 16 bytes.
FLATCORE_INLINE int64_t padded_classes(int64_t classes) { return (classes + 7) / 8 * 8; }
struct HeadTile {
  int64_t first = 0;  // row of the problem that is row 0 of the block
  int64_t rows = 0;
  int64_t first_class = 0;
  int64_t classes = 0;
  const void* z = nullptr;  // (rows, classes): logits in the compute type; null: those that were given, whatever type
  int64_t z_stride = 0;
  // u_j = exp((z_j - r)/T), r the row's best logit but one so far; may be z. (rows, padded_classes) of the compute
  // type, or in pieces (rows, slices, pieces from the smallest to the largest, classes of the slice), zeros behind the
  // last.
  void* shares = nullptr;
};
Launched head_loop_start(const HeadLoop& call, int64_t first, int64_t rows);
Launched head_loop_statistics(const HeadLoop& call, const HeadTile& tile);
Launched head_loop_values(const HeadLoop& call, int64_t first, int64_t rows);
// What the library's products with the table come to, in place of the rows of W.
struct HeadTable {
  int64_t first = 0;
  int64_t rows = 0;
  const void* shares = nullptr;     // (rows, padded_classes), as head_loop_statistics wrote them
  const void* sums = nullptr;       // (rows, C), compute type: shares times the table
  const void* bias_sums = nullptr;  // the same with the bias as a column of W; null unless include_bias and neuronwise
};
Launched head_loop_table(const HeadLoop& call, const HeadTable& table);

// Its gradient; of HeadProblem, `fields` holds the one bit of the measure.
struct HeadBackwardLoop : HeadCall {
  const double* upstream = nullptr;         // (N,): dL/dlog v_n is upstream exp(log_coefficient)
  const double* log_coefficient = nullptr;  // (N,), or null: 0
  const double* summary = nullptr;
  const double* center = nullptr;
  const double* centered_squares = nullptr;
  const int32_t* found = nullptr;
  const HeadTail* tails = nullptr;
  bool all_tails = false;
  const HeadRow* row_state = nullptr;  // (rows of a block, ...) from here on
  HeadBackwardRow* numbers = nullptr;
  const void* mean = nullptr;  // as in HeadLoop, not of pieces
  void* direction = nullptr;   // (., D), compute type: the mean row of p, or the dual direction of the gradient
  void* top_row = nullptr;     // (., D), compute type: what row `top` of W's gradient gains; neuronwise only
  double* top_bias = nullptr;  // (.,)
  int64_t* top = nullptr;      // (.,): the top class, or kNoClass where it gains nothing of its own
  void* d_features = nullptr;  // (N, D), contiguous; or null
  void* d_weight = nullptr;    // (C, D), contiguous; or null
  double* d_bias = nullptr;    // (C,)
  void* d_logits = nullptr;    // (N, C), contiguous: given logits only
  double* exact = nullptr;     // (rows of a block, D): components of an unsure direction; L1 and L-infinity only
  uint8_t* special = nullptr;  // (rows of a block,): the rows that are done from explicit differences
  double* scratch = nullptr;   // for those: head_explicit_row doubles a row of a block, then the slots
  int64_t slots = 0;
};
struct HeadBackwardTile {
  int64_t first = 0;  // row of the problem that is row 0 of the block
  int64_t rows = 0;
  int64_t first_class = 0;
  int64_t classes = 0;
  void* z = nullptr;  // (rows, padded_classes), compute type: in, logits; out, factors of the directions
  void* g = nullptr;  // the same: in, direction (2^e W - center)^T; out, dL/dz; z itself for the trace; unsure: unused
};
// A row's c, its direction, and the part of its features' gradient that does not pass through the logits.
Launched head_backward_rows(const HeadBackwardLoop& call, int64_t first, int64_t rows);
// Directions of L1 and L-infinity that it leaves unsure: their components over the tiles, z again, then the directions.
Launched head_backward_unsure_tile(const HeadBackwardLoop& call, const HeadBackwardTile& tile);
Launched head_backward_unsure(const HeadBackwardLoop& call, int64_t first, int64_t rows);
Launched head_backward_tile(const HeadBackwardLoop& call, const HeadBackwardTile& tile);
// After the last tile: what the top classes gain by themselves.
Launched head_backward_tops(const HeadBackwardLoop& call, int64_t first, int64_t rows);
// Then the rows that need explicit differences: everything they add.
Launched head_backward_explicit(const HeadBackwardLoop& call, int64_t first, int64_t rows);

}  // namespace flatcore::cuda
