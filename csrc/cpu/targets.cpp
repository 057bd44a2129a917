#include "cpu/targets.h"

namespace flatcore::cpu {
namespace {

#define FLATCORE_KERNELS(target)                                                                                      \
  target::head_metrics, target::head_summary, target::head_own_logits, target::head_own_sums, target::head_repeats,   \
      target::head_loop_statistics, target::head_loop_values, target::head_metrics_backward,                          \
      target::head_backward_rows, target::head_backward_tile, target::head_backward_explicit, target::head_reduction, \
      target::row_norms, target::unmasked_cross_entropy

const Target kTargets[] = {
    {"baseline", [] { return true; }, FLATCORE_KERNELS(baseline)},
#if defined(FLATCORE_X86)
    {"avx2",
     [] {
       return __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0 &&
              __builtin_cpu_supports("f16c") != 0;
     },
     FLATCORE_KERNELS(avx2)},
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512dq") != 0 &&
              __builtin_cpu_supports("avx512bw") != 0 && __builtin_cpu_supports("avx512vl") != 0;
     },
     FLATCORE_KERNELS(avx512)},
#endif
};

std::vector<const Target*> probe() {
  std::vector<const Target*> usable;
  for (const Target& target : kTargets) {
    if (target.supported()) usable.push_back(&target);
  }
  return usable;
}

}  // namespace

const std::vector<const Target*>& usable_targets() {
  static const std::vector<const Target*> usable = probe();
  return usable;
}

const Target* find_target(const std::string& name) {
  const auto& usable = usable_targets();
  if (name.empty()) return usable.back();
  for (const Target* target : usable) {
    if (name == target->name) return target;
  }
  return nullptr;
}

}  // namespace flatcore::cpu
