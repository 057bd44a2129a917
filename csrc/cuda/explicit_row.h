// Rows from float64 logits and explicit differences between rows of W, for the rare rows where a shared table or center
// is not accurate enough: what the kernels of the values and of the gradient share; included by .cu files only.
//
// A row's classes are cut into slices, and a block of threads does a slice of one row: tiles of 32 classes, for each
// the products of W's rows, then a thread per column. Slices keep their sums relative to their own best class and
// merge in order, so that a row is one read of W, whatever stands in it.
#pragma once

#include "cuda/head_metrics.h"
#include "cuda/head_rows.h"
#include "math/explicit_rows.h"

namespace flatcore::cuda {

constexpr int kExplicitThreads = 256;
constexpr int kExplicitWarps = kExplicitThreads / kWarp;
using ExplicitBlock = Team<kExplicitThreads>;
constexpr int kClassGroup = 4;  // classes whose products a warp forms together
constexpr int kExplicitTile = kExplicitWarps * kClassGroup;
static_assert(kExplicitTile == kWarp, "a lane per class");

// The marked rows in ascending order, from a look at all marks: a thread counts a run of them. Every block makes the
// list for itself, which takes no launch; where nothing is marked it is all that the block does.
class MarkedRows {
 public:
  // By all threads of the block; `before` is shared memory, kExplicitThreads + 1 numbers.
  __device__ __forceinline__ MarkedRows(const uint8_t* marks, int64_t rows, SpecialField field, int* before)
      : marks_(marks), before_(before), rows_(rows), field_(field), run_(1) {
    if (rows > kExplicitThreads) run_ = (rows + 16 * kExplicitThreads - 1) / (16 * kExplicitThreads) * 16;
    const int me = static_cast<int>(threadIdx.x);
    const int64_t first = me * run_, end = first + run_ < rows ? first + run_ : rows;
    const unsigned bits = field == kSpecialNeuronwise ? 0x01010101U : 0x02020202U;
    struct alignas(16) Words {
      unsigned at[4];
    };
    int own = 0;
    int64_t i = first;
    for (; run_ > 1 && i + 16 <= end; i += 16) {  // runs begin at 16 bytes
      const Words words = *reinterpret_cast<const Words*>(marks + i);
      FLATCORE_UNROLL
      for (int w = 0; w < 4; ++w) own += __popc(words.at[w] & bits);
    }
    for (; i < end; ++i) own += (marks[i] & field) != 0 ? 1 : 0;
    if (__syncthreads_or(own) == 0) return;
    before[me + 1] = own;
    if (me == 0) before[0] = 0;
    __syncthreads();
    for (int offset = 1; offset < kExplicitThreads; offset *= 2) {
      const int other = me >= offset ? before[me + 1 - offset] : 0;
      __syncthreads();
      before[me + 1] += other;
      __syncthreads();
    }
    count_ = before[kExplicitThreads];
  }
  __device__ __forceinline__ int64_t count() const { return count_; }
  __device__ __forceinline__ int64_t row(int64_t k) const {
    int low = 0, high = kExplicitThreads;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (before_[middle] <= k ? low : high) = middle;
    }
    int64_t i = low * run_;
    for (int64_t left = k - before_[low]; i < rows_; ++i) {
      if ((marks_[i] & field_) != 0 && left-- == 0) break;
    }
    return i;
  }

 private:
  const uint8_t* marks_;
  const int* before_;
  int64_t rows_;
  SpecialField field_;
  int64_t run_;
  int64_t count_ = 0;
};

// How a row's classes are cut where `rows` of them are done: never into more tasks than there are slots, unless each
// row is one.
struct Slices {
  int64_t count, length;
};
__device__ __forceinline__ Slices slices_of(int64_t C, int64_t slots, int64_t rows) {
  constexpr int64_t most = 128;  // beyond, a block would take longer to merge them than to make them
  int64_t count = slots / rows;
  count = count < 1 ? 1 : count > most ? most : count;
  const int64_t length = ((C + count - 1) / count + kExplicitTile - 1) / kExplicitTile * kExplicitTile;
  return {(C + length - 1) / length, length};
}

// Which marks a block looks at: all, or, where it does its rows alone, a few at a time.
struct RowsOfBlock {
  int64_t first, step, length;

  __device__ __forceinline__ RowsOfBlock(const HeadExplicit& call, bool alone)
      : first(alone ? static_cast<int64_t>(blockIdx.x) * kExplicitThreads : 0),
        step(alone ? static_cast<int64_t>(gridDim.x) * kExplicitThreads : call.rows),
        length(alone ? kExplicitThreads : call.rows) {}
};

// A matrix's rows 16 bytes at a time, zeros behind the last column.
template <class T>
struct PackedRows {
  static constexpr int kPack = Pack<T>::kCount;
  const T* data;
  int64_t row_stride, column_stride, columns;
  bool whole;

  __device__ __forceinline__ PackedRows(const Matrix& a, int64_t D)
      : data(static_cast<const T*>(a.data)),
        row_stride(a.row_stride),
        column_stride(a.column_stride),
        columns(D),
        whole(a.column_stride == 1 && reinterpret_cast<uintptr_t>(a.data) % 16 == 0 && a.row_stride % kPack == 0) {}
  __device__ __forceinline__ Pack<T> load(int64_t row, int64_t d) const {
    const T* from = data + row * row_stride;
    if (whole && d + kPack <= columns) return *reinterpret_cast<const Pack<T>*>(from + d);
    Pack<T> pack;
    FLATCORE_UNROLL
    for (int e = 0; e < kPack; ++e) pack.items[e] = d + e < columns ? from[(d + e) * column_stride] : T{};
    return pack;
  }
};

// What W's dtype is to the features, which may have another.
template <class T>
struct FeaturePacks {
  const HeadProblem& call;
  PackedRows<T> rows;
  bool same;

  __device__ __forceinline__ explicit FeaturePacks(const HeadProblem& problem)
      : call(problem), rows(problem.features, problem.D), same(problem.features.dtype == problem.weight.dtype) {}
  __device__ __forceinline__ void load(int64_t n, int64_t d, double* x) const {
    constexpr int count = PackedRows<T>::kPack;
    if (same) {
      const Pack<T> pack = rows.load(n, d);
      FLATCORE_UNROLL
      for (int e = 0; e < count; ++e) x[e] = static_cast<double>(widened(pack.items[e]));
      return;
    }
    FLATCORE_UNROLL
    for (int e = 0; e < count; ++e) x[e] = d + e < call.D ? element(call.features, n, d + e) : 0.0;
  }
};

// Of a row and `classes` classes, by a warp: logits, whether their rows of W differ from the anchor's, and, if `dots`,
// the differences' squares and their products with a direction, times 2^e each. Known to every lane.
template <int classes>
struct ClassProducts {
  double z[classes], square[classes], dot[classes];
  bool differs[classes];
};
template <class T, int classes, bool dots>
__device__ __forceinline__ ClassProducts<classes> class_products(const HeadProblem& call, int64_t n, int64_t anchor,
                                                                 bool with_bias, double scale, int64_t first,
                                                                 const double* direction) {
  using Warp = Team<kWarp>;
  constexpr int kPack = PackedRows<T>::kPack, kSums = dots ? 3 : 1;
  const PackedRows<T> weight(call.weight, call.D);
  const FeaturePacks<T> features(call);
  const bool given = call.logits.data != nullptr;
  Sums<kSums * classes> sums{};
  unsigned differs = 0;
  for (int64_t d = Warp::lane() * kPack; d < call.D; d += kWarp * kPack) {
    double x[kPack], along[kPack];
    if (!given) features.load(n, d, x);
    FLATCORE_UNROLL
    for (int e = 0; e < kPack; ++e) along[e] = dots && d + e < call.D ? direction[d + e] : 0.0;
    const Pack<T> own = weight.load(anchor, d);
    FLATCORE_UNROLL
    for (int c = 0; c < classes; ++c) {
      const Pack<T> row = weight.load(first + c < call.C ? first + c : call.C - 1, d);
      FLATCORE_UNROLL
      for (int e = 0; e < kPack; ++e) {
        const double w = static_cast<double>(widened(row.items[e])), a = static_cast<double>(widened(own.items[e]));
        if (!given) sums.at[kSums * c] += x[e] * w;
        differs |= w != a ? 1U << c : 0U;
        if constexpr (dots) {
          const double apart = (w - a) * scale;
          sums.at[kSums * c + 1] += apart * apart;
          sums.at[kSums * c + 2] += apart * along[e];
        }
      }
    }
  }
  sums = Warp::merged(sums, AddSums{});
  ClassProducts<classes> found;
  FLATCORE_UNROLL
  for (int c = 0; c < classes; ++c) {
    const int64_t j = first + c < call.C ? first + c : call.C - 1;
    const bool is_bias = with_bias && call.bias[j] != call.bias[anchor];
    found.differs[c] = (__any_sync(kAllLanes, static_cast<int>(differs >> c & 1U)) != 0) || is_bias;
    found.z[c] = given ? element(call.logits, n, j) : sums.at[kSums * c] + (call.bias != nullptr ? call.bias[j] : 0.0);
    found.square[c] = found.dot[c] = 0.0;
    if constexpr (dots) {
      const double apart = with_bias ? (call.bias[j] - call.bias[anchor]) * scale : 0.0;
      found.square[c] = sums.at[kSums * c + 1] + apart * apart;
      found.dot[c] = sums.at[kSums * c + 2] + (with_bias ? apart * direction[call.D] : 0.0);
    }
  }
  return found;
}

// One class of each lane, for all warps of the block alike: what class_products found of a tile.
struct ExplicitTile {
  double z[kExplicitTile], square[kExplicitTile], dot[kExplicitTile];
  int differs[kExplicitTile];
  // classes that count, and what by
  int live[kExplicitTile];
  double factor[kExplicitTile], weight[kExplicitTile], inverse[kExplicitTile];
};
template <class T, bool dots>
__device__ __forceinline__ void put_tile(const HeadProblem& call, int64_t n, int64_t anchor, bool with_bias,
                                         double scale, int64_t base, const double* direction, ExplicitTile& tile) {
  const int at = static_cast<int>(threadIdx.x) / kWarp * kClassGroup;
  const auto found = class_products<T, kClassGroup, dots>(call, n, anchor, with_bias, scale, base + at, direction);
  FLATCORE_UNROLL
  for (int c = 0; c < kClassGroup; ++c) {
    if (Team<kWarp>::lane() != c) continue;
    tile.z[at + c] = found.z[c];
    tile.square[at + c] = found.square[c];
    tile.dot[at + c] = found.dot[c];
    tile.differs[at + c] = found.differs[c] ? 1 : 0;
  }
  __syncthreads();
}

// The lanes whose class counts, in order, as the first warp has them; how many, known to all warps alike.
__device__ __forceinline__ int put_live(bool counts, ExplicitTile& tile) {
  const unsigned mask = __ballot_sync(kAllLanes, counts ? 1 : 0);
  const int lane = Team<kWarp>::lane();
  if (counts && threadIdx.x < kWarp) tile.live[__popc(mask & ((1U << lane) - 1U))] = lane;
  return __popc(mask);
}

// A slice of a row, behind the D + 1 sums of its columns: under u_j = exp((z_j - top)/T) of the classes whose row of W
// differs from the anchor's, and exp((z_j - group_top)/T) of the others.
struct SliceState {
  math::SoftmaxTail tail;
  double top, total, group_top, group;
  double spread;  // of 2^e w_j about their mean
};
static_assert(sizeof(SliceState) == 8 * kExplicitSliceWords, "as the workspace is counted");

// What the gradient needs of a row, behind its direction of D + 1 numbers.
struct ExplicitRow {
  double t, log1p_tau, top;
  double log_share;      // log p_j of the best class that differs
  double size;           // the norm, or Var_p(w), over that share; 0: the row adds nothing
  double norm2;          // ||sum_j u_j (w_j - w_a)||^2
  double others, along;  // sums over the classes: of dL/dz apart from the top class, of the direction's factors
  double top_differs;    // 1: the top class's own dL/dz is what the others leave
};
static_assert(sizeof(ExplicitRow) == 8 * kExplicitRowWords, "as the workspace is counted");

__device__ __forceinline__ double* slot_of(const HeadExplicit& call, int64_t index) {
  return call.scratch + index * (call.D + 1 + kExplicitSliceWords);
}
__device__ __forceinline__ double* found_of(const HeadExplicit& call, int64_t i) {
  return call.found + i * (call.D + 1 + kExplicitRowWords);
}

}  // namespace flatcore::cuda
