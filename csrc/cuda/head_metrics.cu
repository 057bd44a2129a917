// head_metrics, small heads: which file's kernels run, and how W is packed for them (csrc/cuda/head_metrics_rows.h).
#include "cuda/elements.h"
#include "cuda/head_metrics.h"
#include "cuda/head_pieces.h"
#include "cuda/launch.h"
#include "cuda/team.h"

namespace flatcore::cuda {
namespace {

constexpr int kBlocks[] = {10, 8, 4, 2};
int64_t lane_elements(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? Pack<double>::kCount : dtype == Dtype::kFloat32 ? Pack<float>::kCount : 8;
}

}  // namespace

int head_class_block(int64_t C, bool double_compute) {
  if (double_compute) return 4;
  int best = kBlocks[0];
  int64_t least = 1 << 20;
  for (const int block : kBlocks) {
    const int64_t passes = (C + block - 1) / block, work = passes * (block + 3);  // a pass reads the rows again
    if (work < least) best = block, least = work;
  }
  return best;
}

HeadPacking head_packing(const HeadProblem& problem) {
  const bool whole = is_narrow(problem.features.dtype) && !problem.double_compute && !takes_pieces(problem);
  const int64_t block = whole ? kWholeBlock : head_class_block(problem.C, problem.double_compute);
  const int64_t step = kWarp * lane_elements(problem.features.dtype);
  HeadPacking packing{(problem.C + block - 1) / block * block, (problem.D + step - 1) / step * step};
  if (takes_pieces(problem) && problem.D > 0) {
    // which of the two stand there is the device's to say: pieces, or what code for 7.5 takes, blocks of 8 or 10
    const int groups = piece_groups(problem), count = piece_count(problem);
    const int64_t bytes = problem.features.dtype == Dtype::kBFloat16
                              ? Pieces<BHalf>{groups, count}.end(packing.stride) * 2
                              : Pieces<float>{groups, count}.end(packing.stride) * 4;
    const int64_t row = packing.stride * 4, rows = (bytes + groups * kBlockClasses * 4 + row - 1) / row;
    const int64_t blocks = groups * 20;
    packing.rows = rows > blocks ? rows : blocks;
  }
  return packing;
}

Launched head_metrics(const HeadMetrics& call) {
  if (call.N == 0) return {};
  if (call.C > kFusedClasses) return {"too many classes for the fused kernel", "head_metrics"};
  const DeviceGuard guard(call.device);
  if (guard.status() != cudaSuccess) return launched(guard.status(), "head_metrics: the device");
  switch (call.features.dtype) {
    case Dtype::kFloat16:
      return head_metrics_float16(call);
    case Dtype::kBFloat16:
      return head_metrics_bfloat16(call);
    case Dtype::kFloat32:
      return head_metrics_float32(call);
    case Dtype::kFloat64:
      return head_metrics_float64(call);
  }
  return {"unknown dtype", "head_metrics"};
}

}  // namespace flatcore::cuda
