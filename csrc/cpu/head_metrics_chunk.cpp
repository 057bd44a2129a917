// head_metrics, large heads: what lies between the library's matrix products, for tiles of classes outside and blocks
// of rows inside.
//
// Order of calls: head_summary and head_repeats (head_weights.cpp, head_repeats.cpp) once; then for each block of rows
// and each tile of classes the library forms z = W_tile phi, head_loop_statistics merges the tile into the rows'
// running statistics and turns z into shares u, and the library adds u (W_tile - center) to the rows' sums; after the
// last tile head_loop_values finishes. flatcore/_engine/chunked_cpu.py is the loop.
//
// Who allocates: the caller; outputs are overwritten.
//
// Numerics: logits as the product left them, in floats for float32 products: exp of differences whose error is added
// after the reduction, the shares' sums in float64 from the first term on and those of their squares from the fourth;
// everything else in float64. Tiles merge by the monoid
// (math/softmax_tail.h): shares are u_j = exp((z_j - r)/T), r the best logit but one so far, so that a logit costs one
// exponential; where r rises, all sums of the row, those of the product too, are multiplied by one common factor. Where
// the sum over u (W - center) leaves less than 1/20 of what it was taken from (nearly equal top rows), the row is done
// again from float64 logits and explicit differences, so large heads are as right as small ones.
//
// Cost: a tile's logits are read once from the last-level cache, once from the first level and written once; about 40
// vector operations for 16 of them.
#include <cstring>

#include "cpu/head_logits.h"
#include "cpu/head_metrics.h"
#include "cpu/head_rows.h"
#include "cpu/parallel.h"
#include "math/cancellation.h"
#include "math/centered_rows.h"

namespace flatcore::cpu::FLATCORE_TARGET {
namespace {

// The shares of each piece of a group in its first class, and the sums over them. A piece's own sum is compensated:
// 4,000 equal terms would lose 4e-13 of it.
template <class C>
ShareSums merge_repeats(const TileRepeats& repeats, int64_t count, const TileColumns& columns, C* shares, C* near) {
  for (int64_t k = 0; k < repeats.near_count; ++k) near[k] = shares[repeats.near[k] - repeats.first];
  for (int64_t piece = 0; piece < repeats.pieces; ++piece) {
    const int64_t first = repeats.starts[piece] - repeats.first;
    const int64_t last = (piece + 1 < repeats.pieces ? repeats.starts[piece + 1] : repeats.end) - repeats.first;
    double total = 0.0, lost = 0.0;
    for (int64_t k = first; k < last; ++k) {
      const double value = static_cast<double>(shares[k]) - lost;
      const double sum = total + value;
      lost = (sum - total) - value;
      total = sum;
      shares[k] = C{};
    }
    shares[first] = static_cast<C>(total);
  }
  ShareSums sums;
  for (int64_t k = 0; k < count; ++k) {
    if (shares[k] != C{}) columns.add(sums, k, static_cast<double>(shares[k]));
  }
  for (int64_t k = 0; k < repeats.near_count; ++k) {
    const double value = static_cast<double>(near[k]);
    if (value == 0.0) continue;
    const int64_t at = repeats.near[k] - repeats.first, head = repeats.near_of[k] - repeats.first;
    if (columns.squares) sums.square += value * (columns.squares[at] - columns.squares[head]);
    if (columns.bias) sums.bias += value * ((columns.bias[at] - columns.bias[head]) * columns.bias_scale);
  }
  return sums;
}

// log ||phi||^2 of a row, NaN if an element is not finite.
double log_feature_square(const HeadProblem& call, int64_t n) {
  double log_n = 0.0;
  with_element(call.features.dtype, [&](auto* type) {
    using T = ElementOf<decltype(type)>;
    const T* x = static_cast<const T*>(call.features.data) + n * call.features.row_stride;
    if (sizeof(T) == 8 || call.features.column_stride != 1) {
      log_n = log_sum_squares(x, call.features.column_stride, call.D);
      return;
    }
    // squares of float32 and narrower sum safely in float64
    DoubleV sums[4] = {};
    int64_t d = 0;
    for (; d + 4 * kDoubles <= call.D; d += 4 * kDoubles) {
      for (int k = 0; k < 4; ++k) {
        const DoubleV v = Load<double>::from(x + d + k * kDoubles);
        sums[k] += v * v;
      }
    }
    double sum = sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; d < call.D; ++d) sum += static_cast<double>(widen(x[d])) * static_cast<double>(widen(x[d]));
    log_n = sum < math::kInfinity ? std::log(sum) : kNan;
  });
  return log_n;
}

// The sums of a row that the product has, times `factor`, and `share` of a class's row added: its own top class joins
// the rest.
template <class C, class W>
void rescale_mean(const HeadLoop& call, int64_t i, C factor, C share, int64_t joined) {
  C* mean = static_cast<C*>(call.mean) + i * call.D;
  if (share == C{}) {
    for (int64_t d = 0; d < call.D; ++d) mean[d] *= factor;
    return;
  }
  const double scale = std::scalbn(1.0, static_cast<int>(call.summary[1]));
  const W* w = static_cast<const W*>(call.weight.data) + joined * call.weight.row_stride;
  for (int64_t d = 0; d < call.D; ++d) {
    const double row = static_cast<double>(widen(w[d * call.weight.column_stride])) * scale - call.center[d];
    mean[d] = mean[d] * factor + share * static_cast<C>(row);
  }
}

template <class C, class L>
void statistics_of_row(const HeadLoop& call, const HeadTile& tile, int64_t i, FirstBadRow& bad_label) {
  const int64_t n = tile.first + i;
  const double inverse_temperature = 1.0 / call.temperature;
  HeadTail& state = call.tails[(call.all_tails ? tile.first : 0) + i];
  const Label label = label_of(call, n);
  if (tile.first_class == 0) {
    state = {math::empty_tail(), kNan, 0.0, 0.0, 0.0, log_feature_square(call, n)};
    if (state.log_n != state.log_n) state.tail.u1 = kNan;
    if (label == Label::kBad) bad_label.report(n);
  }
  const C* z = static_cast<const C*>(tile.z) + i * tile.z_stride;
  C* shares = call.centered_squares != nullptr ? static_cast<C*>(tile.z) + i * tile.z_stride : nullptr;
  const double* bias = call.bias_by_position != nullptr ? call.bias_by_position : call.bias;
  const bool given = call.logits.data != nullptr;
  const L* added = nullptr;
  if constexpr (sizeof(L) == 8) {
    added = bias;
  } else {
    added = call.float_bias;
  }
  const LogitRow<C, L> row{z, given || added == nullptr ? nullptr : added + tile.first_class, given, tile.classes};
  const auto position = [&](int64_t j) { return call.positions != nullptr ? call.positions[j] : j; };
  if (label == Label::kValid) {
    const int64_t k = position(call.target[n]) - tile.first_class;
    if (k >= 0 && k < tile.classes) state.own = static_cast<double>(row.at(k));
  }
  const auto clear = [&] {  // zeros keep the product's other rows free of it on every library
    if (shares != nullptr) std::memset(static_cast<void*>(shares), 0, static_cast<size_t>(tile.classes) * sizeof(C));
    for (int64_t k = 0; k < tile.repeats.near_count && shares != nullptr; ++k) {
      static_cast<C*>(tile.near)[i * tile.repeats.near_count + k] = C{};
    }
  };

  double poison = state.tail.u1 * 0.0;
  math::SoftmaxTail tops = tops_of_tile(row, poison);
  if (poison != poison) {
    state.tail.u1 = kNan;
    return clear();
  }
  int64_t top = tops.m;
  if (top >= 0 && call.classes != nullptr) {  // of equal logits the lowest class, wherever it stands
    for (int64_t k = top + 1; k < tile.classes && tops.r == tops.t; ++k) {
      if (static_cast<double>(row.at(k)) == tops.t &&
          call.classes[tile.first_class + k] < call.classes[tile.first_class + top])
        top = k;
    }
  }
  if (top >= 0) tops.m = call.classes != nullptr ? call.classes[tile.first_class + top] : tile.first_class + top;
  const math::SoftmaxTail before = state.tail;
  const math::SoftmaxTail both = math::combine_tops(before, tops);
  if (both.m == math::kNoClass) return clear();
  const bool is_new = both.m != before.m;
  const double factor = math::tail_scale(before.r, both.r, inverse_temperature);
  const double joins = is_new ? math::tail_scale(before.t, both.r, inverse_temperature) : 0.0;
  state.tail = {both.t, both.m, both.r, before.u1 * factor + joins,
                before.u2 * factor * factor + joins * joins};  // where a factor is 0 too: a NaN must survive
  const double base = both.r == -math::kInfinity ? 0.0 : both.r;
  const bool weights = call.centered_squares != nullptr;
  const double scale = weights ? std::scalbn(1.0, static_cast<int>(call.summary[1])) : 1.0;
  const TileColumns columns{weights ? call.centered_squares + tile.first_class : nullptr,
                            weights && call.include_bias ? bias + tile.first_class : nullptr, scale,
                            weights ? call.center[call.D] : 0.0};
  ShareSums sums =
      sum_tile(row, is_new ? top : int64_t{-1}, base, call.temperature, columns, shares, state.tail.u1, state.tail.u2);
  if (!weights) return;
  C* near = static_cast<C*>(tile.near) + i * tile.repeats.near_count;
  if (tile.repeats.pieces > 0) sums = merge_repeats(tile.repeats, tile.classes, columns, shares, near);

  // one factor for all that the product's sums are compared with, so that its rounding does not matter
  const C common = static_cast<C>(factor);
  const C share = sizeof(C) == 8 || math::share_is_kept(joins) ? static_cast<C>(joins) : C{};
  ShareSums kept{state.share_sum * static_cast<double>(common), state.square_sum * static_cast<double>(common),
                 state.bias_sum * static_cast<double>(common)};
  if (share != C{}) {
    const int64_t at = position(before.m) - tile.first_class;  // from the tile's first position on, before it too
    columns.add(kept, at, static_cast<double>(share));
  }
  state.share_sum = kept.one + sums.one;
  state.square_sum = kept.square + sums.square;
  state.bias_sum = kept.bias + sums.bias;
  if (tile.first_class == 0 || (common == C{1} && share == C{})) return;
  with_element(call.weight.dtype, [&](auto* type) {
    using W = ElementOf<decltype(type)>;
    if constexpr (sizeof(W) <= sizeof(C)) rescale_mean<C, W>(call, i, common, share, before.m);
  });
}

// What the last tile leaves: everything that needs no rows of W, and the row's numbers for what does.
void finish_row(const HeadLoop& call, const Values& values, int64_t first, int64_t i) {
  const int64_t n = first + i;
  const HeadTail& state = call.tails[(call.all_tails ? first : 0) + i];
  const math::SoftmaxTail& tail = state.tail;
  const double inverse_temperature = 1.0 / call.temperature;
  const bool bad = tail.u1 != tail.u1 || tail.m == math::kNoClass;
  const auto split = math::epsilon_split<double>(tail.t, tail.r, tail.u1, tail.u2, inverse_temperature);
  const double sum = state.share_sum > 0.0 ? state.share_sum : 1.0;  // one class
  if (call.row_state != nullptr) {
    HeadRow& row = call.row_state[i];
    row = {};
    row.log1p_tau = split.log1p_tau;
    row.eps = split.eps;
    row.log_eps = split.log_eps;
    row.confidence = split.confidence;
    row.log_n = state.log_n;
    row.square_mean = state.square_sum / sum;
    row.bias_mean = state.bias_sum / sum;
    row.m = bad ? math::kNoClass : tail.m;
    row.q_sum = sum;
  }
  const Label label = label_of(call, n);
  const double loss = label == Label::kValid ? (tail.t - state.own) * inverse_temperature + split.log1p_tau : kNan;
  const double log_trace =
      log_head_square(state.log_n, call.include_bias) + split.log_one_minus_sum_p2 - 2.0 * std::log(call.temperature);
  const auto put = [&](Field field, double value) { values.put(field, n, bad ? kNan : value); };
  put(kConfidence, split.confidence);
  put(kMargin, split.margin);
  put(kLogOneMinusConfidence, split.log_eps);
  put(kLogFeatureNorm, 0.5 * state.log_n);
  put(kLogHessianTrace, log_trace);
  put(kLogLayerwise, log_trace + 0.5 * call.norm_power * call.summary[0]);
  put(kLoss, loss);
  if (label == Label::kIgnored) values.put(kLoss, n, 0.0);
  if (call.prediction != nullptr) call.prediction[n] = bad ? -1 : tail.m;
}

// What is needed of u (W - center) and of two rows of W about the same center.
struct MeanSums {
  double mean2;                    // ||x||^2, x = u (W - center) over the sum of u
  double top2, label2;             // ||w_m - center||^2, ||w_y - center||^2
  double top_mean2;                // ||w_m - center - x||^2
  double norm1, norm22, norm_inf;  // of the gradient's mix of them, norm22 squared
};
template <class W, class C>
MeanSums mean_sums(const HeadLoop& call, const C* x, double inverse, double scale, int64_t top, int64_t label,
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
      const DoubleV mean = Load<double>::from(x + d) * inverse;
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
    const double mean = static_cast<double>(x[d]) * inverse;
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
void weights_of_row(const HeadLoop& call, const Values& values, int64_t first, int64_t i, int thread) {
  const int64_t n = first + i;
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

  const bool valid = label == Label::kValid;
  const int64_t y = valid ? call.target[n] : state.m;
  const bool top_label = y == state.m;
  const math::GradientMix mix = math::gradient_mix(top_label, state.confidence, state.eps);
  const C* x = static_cast<const C*>(call.mean) + i * call.D;
  const double scale = std::scalbn(1.0, exponent);
  const double log_scale = exponent * kLn2;
  MeanSums sums{};
  with_element(call.weight.dtype, [&](auto* type) {
    using W = ElementOf<decltype(type)>;
    sums = mean_sums<W, C>(call, x, 1.0 / state.q_sum, scale, state.m, y, mix);
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

Outcome head_loop_statistics(const HeadLoop& call, const HeadTile& tile) {
  FirstBadRow bad_label;
  const bool has_bias = call.bias != nullptr && call.logits.data == nullptr;
  const bool in_float = !call.double_compute && (!has_bias || call.float_bias != nullptr) &&
                        math::FloatTemperature::fits(call.temperature);
  const auto statistics = [&](auto of_row) {
    const int64_t together = 1 + (int64_t{1} << 12) / (tile.classes + 1);  // rows of a task
    const int64_t tasks = (tile.rows + together - 1) / together;
    parallel_for(tile.rows * tile.classes < (1 << 14) ? 1 : call.threads, tasks, [&](int64_t task, int) {
      const int64_t end = (task + 1) * together < tile.rows ? (task + 1) * together : tile.rows;
      for (int64_t i = task * together; i < end; ++i) of_row(call, tile, i, bad_label);
    });
  };
  if (call.double_compute) {
    statistics(statistics_of_row<double, double>);
  } else if (in_float) {
    statistics(statistics_of_row<float, float>);
  } else {
    statistics(statistics_of_row<float, double>);
  }
  return bad_label.outcome();
}

void head_loop_values(const HeadLoop& call, int64_t first, int64_t rows) {
  const Values values(call);
  const bool weights = call.centered_squares != nullptr && call.values != nullptr && (call.fields & kWeightFields) != 0;
  parallel_for(rows * (weights ? call.D : 16) < (1 << 14) ? 1 : call.threads, rows, [&](int64_t i, int thread) {
    finish_row(call, values, first, i);
    if (!weights) return;
    if (call.double_compute) {
      weights_of_row<double>(call, values, first, i, thread);
    } else {
      weights_of_row<float>(call, values, first, i, thread);
    }
  });
}

}  // namespace flatcore::cpu::FLATCORE_TARGET
