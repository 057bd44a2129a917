// A small head's W as tensor cores take it beside 16-bit features: in pieces that add up to it, bit by bit.
//
// A piece has the bits that a factor of the product has: 8 of bfloat16 beside bfloat16 features, 11 of tf32 (a float
// whose last 13 bits are 0) beside float16. It is cut off, not rounded: no piece is larger than what it was cut from,
// so that a product whose partial sums are exact with W itself is exact with W's pieces. Three hold the 24 bits of a
// float.
#pragma once

#include "cuda/elements.h"
#include "head_problem.h"

namespace flatcore::cuda {

template <class T>
struct PieceOf {
  using type = BHalf;
};
template <>
struct PieceOf<Half> {
  using type = float;
};

template <class Piece>
FLATCORE_INLINE Piece cut(float x) {
  const uint32_t bits = math::bit_cast<uint32_t>(x);
  if constexpr (sizeof(Piece) == sizeof(BHalf)) {
    return {static_cast<uint16_t>(bits >> 16)};
  } else {
    return math::bit_cast<float>(bits & 0xffffe000U);
  }
}

constexpr int kBlockClasses = 16, kBlockColumns = 32, kBlockSize = kBlockClasses * kBlockColumns;

// Where they stand: by blocks of 32 columns, then groups of 16 classes, then pieces, the largest first. Within a block
// as a warp's lanes read it, 16 bytes at a time: lane 4 i + k has columns 8 k to 8 k + 7 of classes i and i + 8, and
// first word 0 of both, then word 1 of both, ... (two bfloat16 a word, or one float).
template <class Piece>
struct Pieces {
  int groups, count;

  FLATCORE_METHOD int64_t place(int64_t j, int64_t d, int piece) const {
    constexpr int each = 4 / static_cast<int>(sizeof(Piece));
    const int column = static_cast<int>(d % kBlockColumns), row = static_cast<int>(j % kBlockClasses);
    const int lane = row % 8 * 4 + column / 8, word = column % 8 / each;
    const int within = ((word / 2 * 32 + lane) * 4 + word % 2 * 2 + row / 8) * each + column % each;
    return ((d / kBlockColumns * groups + j / kBlockClasses) * count + piece) * kBlockSize + within;
  }
  // behind the last of `stride` columns: a float for each class, by which its logit is multiplied
  FLATCORE_METHOD int64_t end(int64_t stride) const { return stride * groups * kBlockClasses * count; }
};
FLATCORE_INLINE bool is_narrow(Dtype dtype) { return dtype == Dtype::kFloat16 || dtype == Dtype::kBFloat16; }
// Not for the L1 and L-infinity norms, which want differences of W's rows.
FLATCORE_INLINE bool takes_pieces(const HeadProblem& call) {
  return is_narrow(call.features.dtype) && !call.double_compute && (call.fields & kOtherNorms) == 0;
}
constexpr int kWholeBlock = 8;  // classes at a time beside 16-bit features otherwise
FLATCORE_INLINE int piece_groups(const HeadProblem& call) {
  return static_cast<int>((call.C + kBlockClasses - 1) / kBlockClasses);
}
FLATCORE_INLINE int piece_count(const HeadProblem& call) {
  const bool one =
      is_narrow(call.weight.dtype) && (call.features.dtype == Dtype::kFloat16 || call.weight.dtype == Dtype::kBFloat16);
  return one ? 1 : 3;
}

// By what a row of W is multiplied before it is cut: the pieces of numbers below 2^-110 would leave the range. The
// products with a row that is brought up stay below 2^-16 of the features.
FLATCORE_INLINE float piece_scale_of(double largest) { return largest < 0x1p-64 ? 0x1p48F : 1.0F; }

}  // namespace flatcore::cuda
