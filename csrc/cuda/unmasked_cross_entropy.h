// Cross-entropy with a cotangent that confidence does not mask, on a CUDA device: the plain interface of the kernels.
#pragma once

#include "cuda/device.h"
#include "element.h"

namespace flatcore::cuda {

// N rows of C logits with their labels, all addresses on `device`. Outputs are overwritten; the caller allocates them,
// apart from the inputs. Work goes to the stream; nothing waits for the device, nothing is allocated.
struct UnmaskedCrossEntropy {
  Matrix logits;                    // (N, C), column stride 1; -inf masks a class
  const int64_t* target = nullptr;  // (N,): 0..C-1 or ignore_index; NaN in the rows of any other
  int64_t N = 0;
  int64_t C = 0;
  int64_t ignore_index = -100;
  int device = 0;
  Stream stream = nullptr;
  // outputs: (N,) each, float64 where the logits are, otherwise float32
  void* loss = nullptr;       // -log p_y; 0 in ignored rows
  void* log_scale = nullptr;  // log(1 - p_y); -inf in ignored rows
  void* cotangent = nullptr;  // (N, C), contiguous, of the logits' dtype: q - e_y; 0 in ignored rows; or null
};

Launched unmasked_cross_entropy(const UnmaskedCrossEntropy& call);

}  // namespace flatcore::cuda
