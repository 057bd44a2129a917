// Norms of the rows of a matrix on a CUDA device: the plain interface of the kernels.
#pragma once

#include "cuda/device.h"
#include "element.h"

namespace flatcore::cuda {

// N rows of K entries, all addresses on `device`. Outputs are overwritten; the caller allocates them and the workspace.
// Work goes to the stream; nothing waits for the device, nothing is allocated, so a graph capture may be under way.
struct RowNorms {
  Matrix x;  // (N, K)
  int64_t N = 0;
  int64_t K = 0;
  int device = 0;
  Stream stream = nullptr;
  // outputs: (N,) each, float64 where x is, otherwise float32; null where the norm is not asked for
  void* l1 = nullptr;
  void* l2 = nullptr;
  void* linf = nullptr;
  // workspace: row_norms_workspace doubles
  double* workspace = nullptr;
};

// Doubles of workspace: 3 for every (row, tile) of rows longer than a tile.
int64_t row_norms_workspace(int64_t N, int64_t K);

Launched row_norms(const RowNorms& call);

}  // namespace flatcore::cuda
