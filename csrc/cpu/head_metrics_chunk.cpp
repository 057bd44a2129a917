// head_metrics, large heads: what lies between the library's two matrix products, for a chunk of rows at a time.
//
// Order of calls: head_summary and perhaps head_distances (head_weights.cpp) once; then for each chunk the library
// forms z = W phi, head_chunk_statistics turns it into row statistics and q, the library forms q (W - center) or q *
// distances, and head_chunk_weights finishes the fields that need it. flatcore/_engine/chunked_cpu.py is the loop.
//
// Who allocates: the caller; outputs are overwritten; q may be z itself.
//
// Numerics: logits as the product left them, everything else in float64. Classes are read in blocks of 1024 that stay
// in the first-level cache and are merged by the monoid (math/softmax_tail.h). Where the sum over q (W - center) leaves
// less than 1/20 of what it was taken from (nearly equal top rows), the row is done again from float64 logits and
// explicit differences, so large heads are as right as small ones.
//
// Cost: z is read once for the statistics and once more for q; about 50 operations in float64 per logit.
#include <cstring>

#include "cpu/head_metrics.h"
#include "cpu/head_rows.h"
#include "cpu/parallel.h"
#include "math/cancellation.h"
#include "math/centered_rows.h"
#include "math/table_rows.h"

namespace flatcore::cpu::FLATCORE_TARGET {
namespace {

constexpr int64_t kClassesPerBlock = 1024;

// A row of logits in the compute type, with the bias where it is still to be added.
template <class C>
struct LogitRow {
  const C* z;
  const double* bias;
  bool given;

  double at(int64_t j) const { return static_cast<double>(z[j]) + (bias ? bias[j] : 0.0); }
  DoubleV vector_at(int64_t j) const {
    const DoubleV v = Load<double>::from(z + j);
    return bias ? v + load_unaligned<DoubleV>(bias + j) : v;
  }
};

// Statistics of classes first..last; `poison` becomes NaN if the row is not to be trusted.
template <class C>
math::SoftmaxTail block_tail(const LogitRow<C>& row, int64_t first, int64_t last, double inverse_temperature,
                             double& poison) {
  DoubleV t = DoubleV{} - math::kInfinity, r = t, m = DoubleV{} - 1.0, bad = {};
  DoubleV index = {};
  for (int lane = 0; lane < kDoubles; ++lane) index[lane] = static_cast<double>(first + lane);
  int64_t j = first;
  for (; j + kDoubles <= last; j += kDoubles) {
    const DoubleV z = row.vector_at(j);
    if (!row.given) bad += Load<double>::from(row.z + j) * 0.0;
    bad = z < math::kInfinity ? bad : DoubleV{} + kNan;
    const auto higher = z > t;
    const DoubleV second = z > r ? z : r;
    r = higher ? t : second;
    m = higher ? index : m;
    t = higher ? z : t;
    index += static_cast<double>(kDoubles);
  }
  math::SoftmaxTail tail = math::empty_tail();
  double below = -math::kInfinity;  // best of what is not a lane's top
  for (int lane = 0; lane < kDoubles; ++lane) {
    poison += bad[lane];
    if (m[lane] < 0) continue;
    if (r[lane] > below) below = r[lane];
    tail = math::combine_tops(tail, math::leaf_tail(static_cast<int64_t>(m[lane]), t[lane]));
  }
  const int64_t vectors_end = j;
  for (; j < last; ++j) {
    const double z = row.at(j);
    if (!row.given) poison += static_cast<double>(row.z[j]) * 0.0;
    if (!(z < math::kInfinity)) poison = kNan;
    if (z > -math::kInfinity) tail = math::combine_tops(tail, math::leaf_tail(j, z));
  }
  if (below > tail.r) tail.r = below;
  // second pass over the block: the sums, relative to its own r
  tail.u1 = tail.u2 = 0.0;
  if (tail.r == -math::kInfinity) return tail;
  DoubleV u1 = {}, u2 = {};
  for (int lane = 0; lane < kDoubles; ++lane) index[lane] = static_cast<double>(first + lane);
  const double top = static_cast<double>(tail.m);
  for (j = first; j < vectors_end; j += kDoubles) {
    const DoubleV e = math::exp_nonpositive((row.vector_at(j) - tail.r) * inverse_temperature);
    const DoubleV u = index == top ? DoubleV{} : e;
    u1 += u;
    u2 += u * u;
    index += static_cast<double>(kDoubles);
  }
  tail.u1 = sum_lanes(u1);
  tail.u2 = sum_lanes(u2);
  for (; j < last; ++j) {
    if (j == tail.m) continue;
    const double u = math::tail_scale(row.at(j), tail.r, inverse_temperature);
    tail.u1 += u;
    tail.u2 += u * u;
  }
  return tail;
}

// Sums over the shares q_j as they are stored.
struct QSums {
  double one = 0.0, square = 0.0, bias = 0.0;  // of q_j, q_j ||2^e w_j - center||^2, q_j (2^e b_j - center_b)
};

// q_j for all classes. squares and bias: null for none.
template <class C>
QSums write_q(const LogitRow<C>& row, int64_t classes, const math::SoftmaxTail& tail, double inverse_temperature,
              const double* squares, const double* bias, double bias_scale, double bias_center, C* q) {
  const double inverse = tail.u1 > 0.0 ? 1.0 / tail.u1 : 0.0;
  const double base = tail.r == -math::kInfinity ? 0.0 : tail.r;
  DoubleV sum = {}, square_sum = {}, bias_sum = {};
  int64_t j = 0;
  for (; j + kDoubles <= classes; j += kDoubles) {
    DoubleV value = math::exp_nonpositive((row.vector_at(j) - base) * inverse_temperature) * inverse;
    if (tail.m >= j && tail.m < j + kDoubles) value[tail.m - j] = 0.0;
    if constexpr (sizeof(C) == 8) {
      store_unaligned(q + j, value);
    } else {
      const HalfFloatV stored = to_float(value);
      store_unaligned(q + j, stored);
      value = to_double(stored);
    }
    sum += value;
    if (squares) square_sum += value * load_unaligned<DoubleV>(squares + j);
    if (bias) bias_sum += value * (load_unaligned<DoubleV>(bias + j) * bias_scale - bias_center);
  }
  QSums sums{sum_lanes(sum), sum_lanes(square_sum), sum_lanes(bias_sum)};
  for (; j < classes; ++j) {
    const double z = row.at(j);
    q[j] = static_cast<C>(
        j == tail.m || z == -math::kInfinity ? 0.0 : math::exp_nonpositive((z - base) * inverse_temperature) * inverse);
    const double value = static_cast<double>(q[j]);
    sums.one += value;
    if (squares) sums.square += value * squares[j];
    if (bias) sums.bias += value * (bias[j] * bias_scale - bias_center);
  }
  return sums;
}

// The shares of each group in its first class, and the sums over them. A group's own sum is compensated: 40,000 equal
// terms would lose 2e-12 of it.
template <class C>
QSums merge_repeats(const Repeats& repeats, int64_t classes, const double* squares, const double* bias,
                    double bias_scale, double bias_center, const C* q, C* merged, C* near_q) {
  for (int64_t k = 0; k < repeats.near_count; ++k) near_q[k] = q[repeats.near[k]];
  if (merged != q) std::memcpy(merged, q, static_cast<size_t>(classes) * sizeof(C));
  for (int64_t group = 0; group < repeats.groups; ++group) {
    double total = 0.0, lost = 0.0;
    for (int64_t k = repeats.starts[group]; k < repeats.starts[group + 1]; ++k) {
      const double value = static_cast<double>(merged[repeats.members[k]]) - lost;
      const double sum = total + value;
      lost = (sum - total) - value;
      total = sum;
      merged[repeats.members[k]] = C{};
    }
    merged[repeats.members[repeats.starts[group]]] = static_cast<C>(total);
  }
  QSums sums;
  for (int64_t j = 0; j < classes; ++j) {
    const double value = static_cast<double>(merged[j]);
    if (value == 0.0) continue;
    sums.one += value;
    if (squares) sums.square += value * squares[j];
    if (bias) sums.bias += value * (bias[j] * bias_scale - bias_center);
  }
  for (int64_t k = 0; k < repeats.near_count; ++k) {
    const double value = static_cast<double>(near_q[k]);
    if (value == 0.0) continue;
    const int64_t j = repeats.near[k], first = repeats.near_of[k];
    if (squares) sums.square += value * (squares[j] - squares[first]);
    if (bias) sums.bias += value * ((bias[j] - bias[first]) * bias_scale);
  }
  return sums;
}

template <class C>
void statistics_of_row(const HeadChunk& call, const Values& values, int64_t i, FirstBadRow& bad_label) {
  const int64_t n = call.first + i;
  const bool given = call.logits.data != nullptr;
  const double inverse_temperature = 1.0 / call.temperature;
  const LogitRow<C> row{static_cast<const C*>(call.z) + i * call.z_stride, given ? nullptr : call.bias, given};
  HeadRow& state = call.row_state[i];

  double log_n = 0.0;
  with_element(call.features.dtype, [&](auto* type) {
    using T = ElementOf<decltype(type)>;
    const T* x = static_cast<const T*>(call.features.data) + n * call.features.row_stride;
    // float32 and narrower squares sum safely in float64; float64 may need scaling
    double sum = 0.0;
    if (sizeof(T) < 8 && call.features.column_stride == 1) {
      DoubleV sums[4] = {};
      int64_t d = 0;
      for (; d + 4 * kDoubles <= call.D; d += 4 * kDoubles) {
        for (int k = 0; k < 4; ++k) {
          const DoubleV v = Load<double>::from(x + d + k * kDoubles);
          sums[k] += v * v;
        }
      }
      sum = sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
      for (; d < call.D; ++d) sum += static_cast<double>(widen(x[d])) * static_cast<double>(widen(x[d]));
      log_n = sum < math::kInfinity ? std::log(sum) : kNan;
    } else {
      log_n = log_sum_squares(x, call.features.column_stride, call.D);
    }
  });

  double poison = log_n * 0.0;
  if (log_n == -math::kInfinity) poison = 0.0;
  math::SoftmaxTail tail = math::empty_tail();
  for (int64_t first = 0; first < call.C; first += kClassesPerBlock) {
    const int64_t last = call.C - first < kClassesPerBlock ? call.C : first + kClassesPerBlock;
    tail = math::combine(tail, block_tail(row, first, last, inverse_temperature, poison), inverse_temperature);
  }
  const bool bad = poison != poison || tail.m == math::kNoClass;
  const auto split = math::epsilon_split<double>(tail.t, tail.r, tail.u1, tail.u2, inverse_temperature);
  state = {tail.t, tail.r, split.log1p_tau,   split.eps, split.log_eps, split.confidence, log_n,
           0.0,    0.0,    bad ? -1 : tail.m, 1.0};

  const Label label = label_of(call, n);
  if (label == Label::kBad) bad_label.report(n);
  const double loss_of_target =
      label == Label::kValid ? (tail.t - row.at(call.target[n])) * inverse_temperature + split.log1p_tau : kNan;
  const double log_trace =
      log_head_square(log_n, call.include_bias) + split.log_one_minus_sum_p2 - 2.0 * std::log(call.temperature);
  const auto put = [&](Field field, double value) { values.put(field, n, bad ? kNan : value); };
  put(kConfidence, split.confidence);
  put(kMargin, split.margin);
  put(kLogOneMinusConfidence, split.log_eps);
  put(kLogFeatureNorm, 0.5 * log_n);
  put(kLogHessianTrace, log_trace);
  put(kLogLayerwise, log_trace + 0.5 * call.norm_power * call.summary[0]);
  put(kLoss, loss_of_target);
  if (label == Label::kIgnored) values.put(kLoss, n, 0.0);
  if (call.prediction != nullptr) call.prediction[n] = bad ? -1 : tail.m;

  if (call.q != nullptr) {
    C* q = static_cast<C*>(call.q) + i * call.q_stride;
    if (bad) {
      // its values are NaN already; zeros keep the product's other rows free of it on every library
      for (int64_t j = 0; j < call.C; ++j) q[j] = C{};
      if (call.merged != nullptr) {
        merge_repeats(call.repeats, call.C, static_cast<double*>(nullptr), static_cast<double*>(nullptr), 1.0, 0.0, q,
                      static_cast<C*>(call.merged) + i * call.merged_stride,
                      static_cast<C*>(call.near_q) + i * call.repeats.near_count);
      }
      return;
    }
    const double* bias = call.include_bias ? call.bias : nullptr;
    const double bias_scale = std::scalbn(1.0, static_cast<int>(call.summary[1]));
    const double bias_center = bias != nullptr && call.center != nullptr ? call.center[call.D] : 0.0;
    QSums sums =
        write_q(row, call.C, tail, inverse_temperature, call.centered_squares, bias, bias_scale, bias_center, q);
    if (call.merged != nullptr) {
      sums = merge_repeats(call.repeats, call.C, call.centered_squares, bias, bias_scale, bias_center, q,
                           static_cast<C*>(call.merged) + i * call.merged_stride,
                           static_cast<C*>(call.near_q) + i * call.repeats.near_count);
    }
    if (!(sums.one > 0.0)) sums.one = 1.0;  // one class
    state.square_mean = sums.square / sums.one;
    state.bias_mean = sums.bias / sums.one;
    state.q_sum = sums.one;
  }
}

// What is needed of q (W - center) and of two rows of W about the same center.
struct MeanSums {
  double mean2;                    // ||x||^2, x = q (W - center) over the sum of q
  double top2, label2;             // ||w_m - center||^2, ||w_y - center||^2
  double top_mean2;                // ||w_m - center - x||^2
  double norm1, norm22, norm_inf;  // of the gradient's mix of them, norm22 squared
};
template <class W>
MeanSums mean_sums(const HeadChunk& call, const double* x, double inverse, double scale, int64_t top, int64_t label,
                   const math::GradientMix& mix) {
  const W* w = static_cast<const W*>(call.weight.data);
  const int64_t step = call.weight.column_stride;
  const W* w_top = w + top * call.weight.row_stride;
  const W* w_label = w + label * call.weight.row_stride;
  MeanSums sums{};
  int64_t d = 0;
  if (step == 1) {
    DoubleV mean2 = {}, top2 = {}, label2 = {}, top_mean2 = {}, norm1 = {}, norm22 = {}, largest = {};
    for (; d + kDoubles <= call.D; d += kDoubles) {
      const DoubleV center = load_unaligned<DoubleV>(call.center + d);
      const DoubleV mean = load_unaligned<DoubleV>(x + d) * inverse;
      const DoubleV a = Load<double>::from(w_top + d) * scale - center;
      const DoubleV b = Load<double>::from(w_label + d) * scale - center;
      const DoubleV gradient = magnitude(mix.top * a + mix.rest * mean - b);
      mean2 += mean * mean;
      top2 += a * a;
      label2 += b * b;
      top_mean2 += (a - mean) * (a - mean);
      norm1 += gradient;
      norm22 += gradient * gradient;
      largest = gradient > largest ? gradient : largest;
    }
    sums = {sum_lanes(mean2),
            sum_lanes(top2),
            sum_lanes(label2),
            sum_lanes(top_mean2),
            sum_lanes(norm1),
            sum_lanes(norm22),
            0.0};
    for (int lane = 0; lane < kDoubles; ++lane) {
      if (largest[lane] > sums.norm_inf) sums.norm_inf = largest[lane];
    }
  }
  for (; d < call.D; ++d) {
    const double mean = x[d] * inverse;
    const double a = static_cast<double>(widen(w_top[d * step])) * scale - call.center[d];
    const double b = static_cast<double>(widen(w_label[d * step])) * scale - call.center[d];
    const double gradient = std::fabs(mix.top * a + mix.rest * mean - b);
    sums.mean2 += mean * mean;
    sums.top2 += a * a;
    sums.label2 += b * b;
    sums.top_mean2 += (a - mean) * (a - mean);
    sums.norm1 += gradient;
    sums.norm22 += gradient * gradient;
    if (gradient > sums.norm_inf) sums.norm_inf = gradient;
  }
  return sums;
}

template <class C>
void weights_of_row(const HeadChunk& call, const Values& values, int64_t i, int thread) {
  const int64_t n = call.first + i;
  const HeadRow& state = call.row_state[i];
  const Label label = label_of(call, n);
  const bool gradients = (call.fields & kGradientFields) != 0;
  if (state.m == math::kNoClass) {
    values.put(kLogNeuronwise, n, kNan);
    put_gradient_norms(values, n, label == Label::kIgnored ? -math::kInfinity : kNan);
    return;
  }
  const int exponent = static_cast<int>(call.summary[1]);
  const double log_t = std::log(call.temperature);
  const double log_n = log_head_square(state.log_n, call.include_bias);
  double* z = call.scratch + thread * head_chunk_scratch(call.C, call.D);
  bool z_known = false;
  const auto explicit_row = [&](int64_t anchor, bool with_bias, bool with_spread) {
    if (!z_known) explicit_logits(call, n, z);
    z_known = true;
    return explicit_sum(call, with_bias, anchor, exponent, z, z[state.m], state.log1p_tau, with_spread, z + 2 * call.C,
                        z + call.C);
  };
  const auto put_neuronwise = [&](double log_var_p) {
    const bool zero = log_n == -math::kInfinity;
    values.put(kLogNeuronwise, n, zero ? log_n : log_n + log_var_p - 2.0 * log_t);
  };

  if (call.distance != nullptr) {
    // sum_j q_j D_mj and the pairs, all terms >= 0
    const C* s = static_cast<const C*>(call.distance) + i * call.distance_stride;
    const C* q = static_cast<const C*>(call.q) + i * call.q_stride;
    DoubleV sums = {};
    int64_t j = 0;
    for (; j + kDoubles <= call.C; j += kDoubles) sums += Load<double>::from(s + j) * Load<double>::from(q + j);
    double pairs = sum_lanes(sums);
    for (; j < call.C; ++j) pairs += static_cast<double>(s[j]) * static_cast<double>(q[j]);
    const double inner =
        math::table_variance(state.confidence, static_cast<double>(s[state.m]), state.eps, 0.5 * pairs);
    // below this, terms may have underflowed in the compute type
    const bool safe = math::table_variance_is_in_range(inner, sizeof(C) == 4) || inner != inner;
    if (state.log_eps == -math::kInfinity) {
      put_neuronwise(-math::kInfinity);
    } else if (safe) {
      put_neuronwise(state.log_eps + std::log(inner) - 2.0 * exponent * kLn2);
    } else {
      put_neuronwise(log_variance(explicit_row(state.m, call.include_bias, true), exponent));
    }
    return;
  }

  const bool valid = label == Label::kValid;
  const int64_t y = valid ? call.target[n] : state.m;
  const bool top_label = y == state.m;
  const math::GradientMix mix = math::gradient_mix(top_label, state.confidence, state.eps);
  const double* x = call.mean + i * call.mean_stride;
  const double scale = std::scalbn(1.0, exponent);
  const double log_scale = exponent * kLn2;
  MeanSums sums{};
  with_element(call.weight.dtype, [&](auto* type) {
    using W = ElementOf<decltype(type)>;
    sums = mean_sums<W>(call, x, 1.0 / state.q_sum, scale, state.m, y, mix);
  });

  if (values.wants(kLogNeuronwise)) {
    math::CenteredVariance variance{sums.top_mean2, sums.mean2, sums.top2};
    if (call.include_bias) variance.add_column(call.bias[state.m] * scale - call.center[call.D], state.bias_mean);
    const double inner = variance.inner(state.confidence, state.square_mean);
    const double magnitude = variance.magnitude(state.square_mean);
    if (state.log_eps == -math::kInfinity || call.equal_rows) {
      put_neuronwise(-math::kInfinity);
    } else if (math::variance_is_left(inner, magnitude) || inner != inner) {
      put_neuronwise(state.log_eps + std::log(inner) - 2.0 * log_scale);
    } else {
      put_neuronwise(log_variance(explicit_row(state.m, call.include_bias, true), exponent));
    }
  }
  if (!gradients) return;
  if (label == Label::kIgnored) {
    put_gradient_norms(values, n, -math::kInfinity);
  } else if (!valid) {
    put_gradient_norms(values, n, kNan);
  } else if (top_label && state.log_eps == -math::kInfinity) {
    put_gradient_norms(values, n, -math::kInfinity);
  } else if (math::gradient_is_left(sums.norm22, sums.label2 + sums.mean2, state.square_mean)) {
    const double shift = (top_label ? state.log_eps : 0.0) - log_t - log_scale;
    values.put(kLogGradientNorm, n, shift + 0.5 * std::log(sums.norm22));
    values.put(kLogGradientNorm1, n, shift + std::log(sums.norm1));
    values.put(kLogGradientNormInf, n, shift + std::log(sums.norm_inf));
  } else {
    put_gradient_norms(call, values, n, explicit_row(y, false, false), exponent);
  }
}

}  // namespace

Outcome head_chunk_statistics(const HeadChunk& call) {
  const Values values(call);
  FirstBadRow bad_label;
  parallel_for(call.rows * call.C < (1 << 14) ? 1 : call.threads, call.rows, [&](int64_t i, int) {
    if (call.double_compute) {
      statistics_of_row<double>(call, values, i, bad_label);
    } else {
      statistics_of_row<float>(call, values, i, bad_label);
    }
  });
  return bad_label.outcome();
}

void head_chunk_weights(const HeadChunk& call) {
  const Values values(call);
  parallel_for(call.rows * (call.C + call.D) < (1 << 14) ? 1 : call.threads, call.rows, [&](int64_t i, int thread) {
    if (call.double_compute) {
      weights_of_row<double>(call, values, i, thread);
    } else {
      weights_of_row<float>(call, values, i, thread);
    }
  });
}

}  // namespace flatcore::cpu::FLATCORE_TARGET
