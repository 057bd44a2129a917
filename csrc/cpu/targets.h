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
  RepeatCounts (*head_repeats)(const HeadRepeats&);
  void (*head_distances)(const HeadDistances&);
  Outcome (*head_chunk_statistics)(const HeadChunk&);
  void (*head_chunk_weights)(const HeadChunk&);
  void (*head_metrics_backward)(const HeadMetricsBackward&);
  void (*head_chunk_directions)(const HeadBackwardChunk&);
  void (*head_chunk_cotangent)(const HeadBackwardChunk&);
  void (*head_reduction)(const HeadReduction&);
  void (*row_norms)(const RowNorms&);
  Outcome (*unmasked_cross_entropy)(const UnmaskedCrossEntropy&);
};

// Compiled and supported here, the narrowest first.
const std::vector<const Target*>& usable_targets();

// The target of that name, or for an empty name the widest usable one; null if there is no such usable target.
const Target* find_target(const std::string& name);

}  // namespace flatcore::cpu
