// Norms of the rows of a matrix: the plain interface of the kernel.
#pragma once

#include "element.h"

namespace flatcore::cpu {

// N rows of K entries. Outputs are overwritten; the caller allocates them.
struct RowNorms {
  Matrix x;  // (N, K)
  int64_t N = 0;
  int64_t K = 0;
  int threads = 1;
  // outputs: (N,) each, float64 where x is, otherwise float32; null where the norm is not asked for
  void* l1 = nullptr;
  void* l2 = nullptr;
  void* linf = nullptr;
  // workspace: 3 doubles for every (row, block) of a long row; see row_norms_workspace
  double* workspace = nullptr;
};

// Doubles of workspace for the given shape.
int64_t row_norms_workspace(int64_t N, int64_t K);

#define FLATCORE_DECLARE(target)        \
  namespace target {                    \
  void row_norms(const RowNorms& call); \
  }
FLATCORE_DECLARE(baseline)
FLATCORE_DECLARE(avx2)
FLATCORE_DECLARE(avx512)
#undef FLATCORE_DECLARE

}  // namespace flatcore::cpu
