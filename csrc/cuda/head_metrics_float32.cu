// head_metrics, small heads, of float32 features: csrc/cuda/head_metrics_rows.h.
#include "cuda/head_metrics_rows.h"

namespace flatcore::cuda {

Launched head_metrics_float32(const HeadMetrics& call) { return run<float>(call); }

}  // namespace flatcore::cuda
