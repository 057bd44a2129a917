// The CPU targets: which were compiled, which this processor has, and the table of their kernels.
#pragma once

#include <string>
#include <vector>

#include "cpu/head_metrics.h"
#include "cpu/head_metrics_backward.h"
#include "cpu/head_reduction.h"
#include "cpu/head_repeats.h"
#include "cpu/row_norms.h"
#include "cpu/unmasked_cross_entropy.h"

namespace flatcore::cpu {

struct Target {
  const char* name;
  bool (*supported)();
  Outcome (*head_metrics)(const HeadMetrics&);
  void (*head_summary)(const HeadSummary&);
  void (*head_own_logits)(const HeadProblem&, const OwnProduct&);
  void (*head_own_sums)(const HeadLoop&, const OwnProduct&);
  RepeatCounts (*head_repeats)(const HeadRepeats&);
  Outcome (*head_loop_statistics)(const HeadLoop&, const HeadTile&);
  void (*head_loop_values)(const HeadLoop&, int64_t, int64_t);
  void (*head_metrics_backward)(const HeadMetricsBackward&);
  void (*head_backward_rows)(const HeadBackwardLoop&, int64_t, int64_t);
  void (*head_backward_tile)(const HeadBackwardLoop&, const HeadBackwardTile&);
  void (*head_backward_explicit)(const HeadBackwardLoop&, int64_t, const int64_t*, int64_t, void*);
  void (*head_reduction)(const HeadReduction&);
  void (*row_norms)(const RowNorms&);
  Outcome (*unmasked_cross_entropy)(const UnmaskedCrossEntropy&);
};

// Compiled and supported here, the narrowest first.
const std::vector<const Target*>& usable_targets();

// The target of that name, or for an empty name the widest usable one; null if there is no such usable target.
const Target* find_target(const std::string& name);

}  // namespace flatcore::cpu
