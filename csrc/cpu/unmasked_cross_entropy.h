// Cross-entropy with a cotangent that confidence does not mask: the plain interface of the kernel.
#pragma once

#include "element.h"
#include "status.h"

namespace flatcore::cpu {

// N rows of C logits with their labels. Outputs are overwritten; the caller allocates them, apart from the inputs.
struct UnmaskedCrossEntropy {
  Matrix logits;                    // (N, C), column stride 1; -inf masks a class
  const int64_t* target = nullptr;  // (N,): 0..C-1 or ignore_index
  int64_t N = 0;
  int64_t C = 0;
  int64_t ignore_index = -100;
  int threads = 1;
  // outputs: (N,) each, float64 where the logits are, otherwise float32
  void* loss = nullptr;       // -log p_y; 0 in ignored rows
  void* log_scale = nullptr;  // log(1 - p_y); -inf in ignored rows
  void* cotangent = nullptr;  // (N, C), contiguous, of the logits' dtype: q - e_y; 0 in ignored rows; or null
};

#define FLATCORE_DECLARE(target)                                    \
  namespace target {                                                \
  Outcome unmasked_cross_entropy(const UnmaskedCrossEntropy& call); \
  }
FLATCORE_DECLARE(baseline)
FLATCORE_DECLARE(avx2)
FLATCORE_DECLARE(avx512)
#undef FLATCORE_DECLARE

}  // namespace flatcore::cpu
