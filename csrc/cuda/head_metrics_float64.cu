// head_metrics, small heads, of float64 features: csrc/cuda/head_metrics_rows.h.
#include "cuda/head_metrics_rows.h"

namespace flatcore::cuda {

Launched head_metrics_float64(const HeadMetrics& call) { return run<double>(call); }

}  // namespace flatcore::cuda
