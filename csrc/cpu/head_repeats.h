// Classes whose rows of W are equal or nearly so: padded vocabularies, unused classes, sparse and duplicated heads.
//
// N samples, D features, C classes. Inputs are never written; outputs are overwritten; the caller allocates. Nothing
// here knows Python or torch.
#pragma once

#include <cstdint>

#include "element.h"

namespace flatcore::cpu {

// Groups of at least two classes. The first member's row stands for the others' ("its class").
struct Repeats {
  const int64_t* members = nullptr;  // group after group
  const int64_t* starts = nullptr;   // (groups + 1,): where each group begins in members
  int64_t groups = 0;
  const int64_t* near = nullptr;     // (near_count,): members whose row differs from the first one's
  const int64_t* near_of = nullptr;  // (near_count,): that first one
  int64_t near_count = 0;
};

struct HeadRepeats {
  Matrix weight;  // (C, D)
  int64_t C = 0;
  int64_t D = 0;
  const double* bias = nullptr;              // (C,), null unless it counts as a column of W
  int exponent = 0;                          // 2^e brings W into range
  const double* centered_squares = nullptr;  // (C,): ||2^e w_j - center||^2
  const double* keys = nullptr;              // (C,): a random projection of each row, by head_summary
  // outputs
  int64_t* members = nullptr;  // (C,)
  int64_t* starts = nullptr;   // (C + 1,)
  int64_t* near = nullptr;     // (C,)
  int64_t* near_of = nullptr;  // (C,): the class that stands for each of near
};
struct RepeatCounts {
  int64_t groups, members, near;
};

#define FLATCORE_DECLARE(target)                      \
  namespace target {                                  \
  RepeatCounts head_repeats(const HeadRepeats& call); \
  }
FLATCORE_DECLARE(baseline)
FLATCORE_DECLARE(avx2)
FLATCORE_DECLARE(avx512)
#undef FLATCORE_DECLARE

}  // namespace flatcore::cpu
