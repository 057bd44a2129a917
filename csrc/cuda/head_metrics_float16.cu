// head_metrics, small heads, of float16 features: csrc/cuda/head_metrics_rows.h.
#include "cuda/head_metrics_rows.h"

namespace flatcore::cuda {

Launched head_metrics_float16(const HeadMetrics& call) { return run<Half>(call); }

}  // namespace flatcore::cuda
