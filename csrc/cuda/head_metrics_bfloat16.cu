// head_metrics, small heads, of bfloat16 features: csrc/cuda/head_metrics_rows.h.
#include "cuda/head_metrics_rows.h"

namespace flatcore::cuda {

Launched head_metrics_bfloat16(const HeadMetrics& call) { return run<BHalf>(call); }

}  // namespace flatcore::cuda
