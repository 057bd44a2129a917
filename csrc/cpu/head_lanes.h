// A small head's statistics in float lanes, for problems in float32 at ordinary rows; what is not ordinary is marked,
// for float64.
//
// Numerics, in roundings of 2^-24 = 6e-8, of which a log may have 67 (flatcore/_check/tolerance.py). In float: the
// shares u_j = exp((z_j - r)/T), 2 each, whatever the difference, as its own rounding is put back; sums of
// non-negative terms, at most 16 of them before they are carried (into float64 where there is one sum a row, by a
// second float sum in s_j), 8 where the terms are equal; the logs of sums that are near 1, at most 4. So 20 to 30 for a
// log. In float64: what cancels or is large: the gap g, tau = exp(-g) U1, log ||phi||^2, log ||W||^2 and every sum of
// logs. ||sum_j p_j (w_j - w_y)||^2 is a difference: where less than 2/5 is left of it, a row is not ordinary.
#pragma once

#include "cpu/head_tile.h"

namespace flatcore::cpu {

constexpr int kTermsCarried = 16;
constexpr int64_t kMostLaneClasses = 256;  // 16 sums of 16 terms
// exp(-43) = 2^-62: a share's square is a normal float still. Smaller shares count as 0: 256 of them are 3e-8 of what
// a row has to keep of the largest squared distance, which is scaled to [1, 2).
constexpr float kLeastExponent = -43.0F;
constexpr float kLeastOfDistances = 0x1p-29F;
constexpr double kLeastDistance = 0x1p-64;  // smaller ones count as 0, so that no product is a denormal number
constexpr float kLeastOfDifference = 0.4F;

// Fields whose values the lanes give; with another one, or a number of classes whose sums were not argued, all is
// float64's.
FLATCORE_INLINE bool lanes_apply(const HeadProblem& call) {
  constexpr uint32_t others = 1U << kLogGradientNorm1 | 1U << kLogGradientNormInf;
  return !call.double_compute && !call.double_values && call.C > 1 && call.C <= kMostLaneClasses &&
         (call.fields & others) == 0 && call.temperature > 0x1p-20 && call.temperature < 0x1p20;
}

}  // namespace flatcore::cpu

namespace flatcore::cpu::FLATCORE_TARGET {

// The lanes of two or one vectors of doubles as floats, and back.
constexpr int kWide = kFloats / kDoubles;
struct WideV {
  DoubleV at[kWide];
};
FLATCORE_INLINE WideV widened(FloatV v) {
  WideV wide;
  split(v, wide.at);
  return wide;
}
FLATCORE_INLINE WideV load_wide(const double* from) {
  WideV wide;
  for (int i = 0; i < kWide; ++i) wide.at[i] = load_unaligned<DoubleV>(from + i * kDoubles);
  return wide;
}
FLATCORE_INLINE FloatV narrowed(const WideV& wide) {
  HalfFloatV halves[kWide];
  for (int i = 0; i < kWide; ++i) halves[i] = to_float(wide.at[i]);
  FloatV v;
  __builtin_memcpy(&v, halves, sizeof(v));
  return v;
}
template <class F>
FLATCORE_INLINE WideV each(const F& f) {
  WideV wide;
#pragma GCC unroll 2
  for (int i = 0; i < kWide; ++i) wide.at[i] = f(i);
  return wide;
}

// What the lanes need of W and the call, once a call.
struct Lanes {
  bool on = false;
  bool given = false;
  float* bias = nullptr;  // (C,); null: none
  // (C, C) squared distances over the power of two that brings the largest to [1, 2), without and with the bias as a
  // column; null: not wanted
  float* distances = nullptr;
  float* bias_distances = nullptr;
  double log_distance = 0.0, log_bias_distance = 0.0;  // of that power
  double inverse_temperature = 1.0, two_log_t = 0.0;
  math::FloatTemperature temperature{1.0};
};

// False where the distances have no range to scale to.
inline bool narrow_distances(const double* from, int64_t C, float* to, double& log_scale) {
  double largest = 0.0;
  for (int64_t i = 0; i < C * C; ++i) largest = from[i] > largest ? from[i] : largest;
  if (!(largest > 1e-280 && largest < 1e280)) return false;
  const int exponent = std::ilogb(largest);
  const double scale = std::scalbn(1.0, -exponent);
  for (int64_t i = 0; i < C * C; ++i) {
    const double d = from[i] * scale;
    to[i] = d > kLeastDistance ? static_cast<float>(d) : d == d ? 0.0F : static_cast<float>(d);
  }
  log_scale = exponent * kLn2;
  return true;
}

// False where a bias is no float.
inline bool narrow_bias(const double* from, int64_t C, float* to) {
  for (int64_t j = 0; j < C; ++j) {
    to[j] = static_cast<float>(from[j]);
    if (static_cast<double>(to[j]) != from[j]) return false;
  }
  return true;
}

// A thread's buffers for the lanes of a tile.
struct LaneBuffers {
  float* z;       // (C, kTile) logits before the bias and the division by T
  float* u;       // (C, kTile)
  float* s;       // (C, kTile) sum_k D_jk u_k
  float* s_bias;  // the same for the bias's distances
};

// Of a tile in lanes.
struct LaneSoftmax {
  alignas(64) float top[kTile], u1[kTile], confidence[kTile], eps[kTile];
  alignas(64) double margin[kTile], log_eps[kTile], log1p_tau[kTile], log_one_minus_sum_p2[kTile];
  alignas(64) int32_t m[kTile];
  alignas(64) int32_t ordinary[kTile];  // all bits or none
};

template <bool unit_temperature>
inline void lane_softmax(const Lanes& lanes, int64_t C, const LaneBuffers& buffers, LaneSoftmax& out) {
  for (int v = 0; v < kTile; v += kFloats) {
    constexpr float infinity = __builtin_inff();
    FloatV top = FloatV{} - infinity, rest = top, poison = {};
    Int32V index = Int32V{} - 1;
    const auto logit = [&](int64_t j) __attribute__((always_inline)) {
      const FloatV z = load_unaligned<FloatV>(buffers.z + j * kTile + v);
      return lanes.bias != nullptr ? z + lanes.bias[j] : z;
    };
    for (int64_t j = 0; j < C; ++j) {
      // NaN if a product is not finite: an overflow is not a masked class
      if (!lanes.given) poison += load_unaligned<FloatV>(buffers.z + j * kTile + v) * 0.0F;
      const FloatV z = logit(j);
      const auto higher = z > top;
      const FloatV lower = z < top ? z : top;
      rest = lower > rest ? lower : rest;
      index = higher ? Int32V{} + static_cast<int32_t>(j) : index;
      top = z > top ? z : top;
    }
    WideV sum{}, squares{};
    for (int64_t first = 0; first < C; first += kTermsCarried) {
      const int64_t last = first + kTermsCarried < C ? first + kTermsCarried : C;
      FloatV some = {}, some_squares = {};
      for (int64_t j = first; j < last; ++j) {
        const FloatV z = logit(j);
        FloatV e;
        if constexpr (unit_temperature) {
          e = math::exp_difference_float(z, rest, kLeastExponent);
        } else {
          e = math::exp_difference_float(z, rest, lanes.temperature);
        }
        e = index == static_cast<int32_t>(j) ? FloatV{} : e;
        store_unaligned(buffers.u + j * kTile + v, e);
        some += e;
        some_squares += e * e;
      }
      const WideV a = widened(some), b = widened(some_squares);
      for (int i = 0; i < kWide; ++i) {
        sum.at[i] += a.at[i];
        squares.at[i] += b.at[i];
      }
    }
    const WideV t = widened(top), r = widened(rest);
    const WideV margin = each([&](int i) { return (t.at[i] - r.at[i]) * lanes.inverse_temperature; });
    const WideV tau_wide = each([&](int i) { return math::exp_nonpositive(-margin.at[i]) * sum.at[i]; });
    const FloatV tau = narrowed(tau_wide), u1 = narrowed(sum), u2 = narrowed(squares);
    const FloatV confidence = 1.0F / (1.0F + tau);
    const FloatV eps = tau * confidence;
    const WideV log1p_tau = widened(math::log1p_nonnegative_float(tau));
    const WideV log_u1 = widened(math::log_normal_float(u1));
    const WideV log_rest = widened(math::log_normal_float(2.0F - eps * (1.0F + u2 / (u1 * u1))));
    for (int i = 0; i < kWide; ++i) {
      const DoubleV log_eps = log_u1.at[i] - margin.at[i] - log1p_tau.at[i];
      store_unaligned(out.margin + v + i * kDoubles, margin.at[i]);
      store_unaligned(out.log_eps + v + i * kDoubles, log_eps);
      store_unaligned(out.log1p_tau + v + i * kDoubles, log1p_tau.at[i]);
      store_unaligned(out.log_one_minus_sum_p2 + v + i * kDoubles, log_eps + log_rest.at[i]);
    }
    store_unaligned(out.top + v, top);
    store_unaligned(out.u1 + v, u1);
    store_unaligned(out.confidence + v, confidence);
    store_unaligned(out.eps + v, eps);
    store_unaligned(out.m + v, index);
    // NaN logits leave NaN in the sum
    const Int32V ordinary = (top < infinity) & (rest > -infinity) & (poison == 0.0F) & (u1 >= 1.0F);
    store_unaligned(out.ordinary + v, ordinary);
  }
}

// s_j = sum_k D_jk u_k for all classes j of a tile, and half of sum_j u_j s_j.
inline void lane_mean_distances(const float* distances, int64_t C, const float* u, float* s, float* pairs) {
  constexpr int kJ = 5;
  for (int v = 0; v < kTile; v += kFloats) {
    WideV total{};
    FloatV some = {};
    int terms = 0;
    const auto pair = [&](int64_t j, FloatV sum) __attribute__((always_inline)) {
      store_unaligned(s + j * kTile + v, sum);
      some += load_unaligned<FloatV>(u + j * kTile + v) * sum;
      if (++terms < kTermsCarried) return;
      const WideV wide = widened(some);
      for (int i = 0; i < kWide; ++i) total.at[i] += wide.at[i];
      some = FloatV{};
      terms = 0;
    };
    int64_t j = 0;
    for (; j + kJ <= C; j += kJ) {
      FloatV sums[kJ] = {};
      for (int64_t first = 0; first < C; first += kTermsCarried) {
        const int64_t last = first + kTermsCarried < C ? first + kTermsCarried : C;
        FloatV acc[kJ] = {};
        for (int64_t k = first; k < last; ++k) {
          const FloatV uk = load_unaligned<FloatV>(u + k * kTile + v);
#pragma GCC unroll 5
          for (int a = 0; a < kJ; ++a) acc[a] += uk * distances[(j + a) * C + k];
        }
#pragma GCC unroll 5
        for (int a = 0; a < kJ; ++a) sums[a] += acc[a];
      }
#pragma GCC unroll 5
      for (int a = 0; a < kJ; ++a) pair(j + a, sums[a]);
    }
    for (; j < C; ++j) {
      FloatV sum = {};
      for (int64_t first = 0; first < C; first += kTermsCarried) {
        const int64_t last = first + kTermsCarried < C ? first + kTermsCarried : C;
        FloatV acc = {};
        for (int64_t k = first; k < last; ++k) {
          acc += load_unaligned<FloatV>(u + k * kTile + v) * distances[j * C + k];
        }
        sum += acc;
      }
      pair(j, sum);
    }
    const WideV wide = widened(some);
    store_unaligned(pairs + v, narrowed(each([&](int i) { return 0.5 * (total.at[i] + wide.at[i]); })));
  }
}

// A tile's values, a row of kTile per field; `ordinary` says of which rows they are.
struct LaneValues {
  alignas(64) float at[kFieldCount][kTile];
};

// The labels' side of a tile: what is read by the label, one row after the other.
struct LaneLabels {
  Label kind[kTile];
  alignas(64) int32_t y[kTile];
};

inline void lane_values(const HeadProblem& call, const Lanes& lanes, double log_layer, int exponent,
                        const LaneBuffers& buffers, const TileRows& tile, const LaneLabels& labels,
                        LaneSoftmax& softmax, LaneValues& out) {
  const int64_t C = call.C;
  const double two_log_t = lanes.two_log_t;
  const auto wants = [&](Field field) { return (call.fields >> field & 1U) != 0; };
  if (call.temperature == 1.0) {
    lane_softmax<true>(lanes, C, buffers, softmax);
  } else {
    lane_softmax<false>(lanes, C, buffers, softmax);
  }
  alignas(64) double log_n_head[kTile];
  for (int i = 0; i < kTile; ++i) log_n_head[i] = tile.log_n[i];
  if (call.include_bias) {
    for (int i = 0; i < kTile; ++i) log_n_head[i] = log_head_square(tile.log_n[i], true);
  }
  const auto put = [&](Field field, const auto& value) __attribute__((always_inline)) {
    if (!wants(field)) return;
    for (int v = 0; v < kTile; v += kFloats) {
      store_unaligned(out.at[field] + v,
                      narrowed(each([&](int i) __attribute__((always_inline)) { return value(v + i * kDoubles); })));
    }
  };
  const auto at = [](const double* from, int i)
                      __attribute__((always_inline)) { return load_unaligned<DoubleV>(from + i); };
  if (wants(kConfidence)) std::memcpy(out.at[kConfidence], softmax.confidence, sizeof(softmax.confidence));
  put(kMargin, [&](int i) { return at(softmax.margin, i); });
  put(kLogOneMinusConfidence, [&](int i) { return at(softmax.log_eps, i); });
  put(kLogFeatureNorm, [&](int i) { return 0.5 * at(tile.log_n, i); });
  const double shift = log_layer - two_log_t;
  put(kLogHessianTrace, [&](int i) { return at(log_n_head, i) + at(softmax.log_one_minus_sum_p2, i) - two_log_t; });
  put(kLogLayerwise, [&](int i) { return at(log_n_head, i) + at(softmax.log_one_minus_sum_p2, i) + shift; });
  if (wants(kLoss)) {
    alignas(64) double own[kTile];
    for (int i = 0; i < kTile; ++i) {
      const float z = buffers.z[labels.y[i] * kTile + i];
      own[i] = static_cast<double>(lanes.bias != nullptr ? z + lanes.bias[labels.y[i]] : z);
    }
    put(kLoss, [&](int i) {
      DoubleV top;
      for (int lane = 0; lane < kDoubles; ++lane) top[lane] = static_cast<double>(softmax.top[i + lane]);
      return (top - at(own, i)) * lanes.inverse_temperature + at(softmax.log1p_tau, i);
    });
    for (int i = 0; i < kTile; ++i) {
      if (labels.kind[i] == Label::kIgnored) out.at[kLoss][i] = 0.0F;
    }
  }
  if (lanes.distances == nullptr) return;

  alignas(64) float pairs[kTile], pairs_bias[kTile], from_top[kTile];
  const bool gradients = wants(kLogGradientNorm) && call.target != nullptr;
  const auto norm_by_top = [&](const float* s) {
    for (int i = 0; i < kTile; ++i) from_top[i] = softmax.m[i] >= 0 ? s[softmax.m[i] * kTile + i] : 0.0F;
  };
  const auto unordinary_unless = [&](int v, const auto& mask) __attribute__((always_inline)) {
    Int32V ordinary = load_unaligned<Int32V>(softmax.ordinary + v);
    store_unaligned(softmax.ordinary + v, ordinary & mask);
  };
  if (gradients || !call.include_bias) lane_mean_distances(lanes.distances, C, buffers.u, buffers.s, pairs);
  if (wants(kLogNeuronwise)) {
    const bool with_bias = call.include_bias;
    const float* halves = with_bias ? pairs_bias : pairs;
    if (with_bias) lane_mean_distances(lanes.bias_distances, C, buffers.u, buffers.s_bias, pairs_bias);
    norm_by_top(with_bias ? buffers.s_bias : buffers.s);
    const double unit = (with_bias ? lanes.log_bias_distance : lanes.log_distance) - two_log_t - 2.0 * exponent * kLn2;
    for (int v = 0; v < kTile; v += kFloats) {
      const FloatV inverse = 1.0F / load_unaligned<FloatV>(softmax.u1 + v);
      const FloatV mean = load_unaligned<FloatV>(from_top + v) * inverse;
      const FloatV half = load_unaligned<FloatV>(halves + v) * inverse * inverse;
      const FloatV inner =
          load_unaligned<FloatV>(softmax.confidence + v) * mean + load_unaligned<FloatV>(softmax.eps + v) * half;
      unordinary_unless(v, inner > kLeastOfDistances);
      const WideV logs = widened(math::log_normal_float(inner));
      store_unaligned(out.at[kLogNeuronwise] + v, narrowed(each([&](int i) {
                        const int lane = v + i * kDoubles;
                        return at(log_n_head, lane) + at(softmax.log_eps, lane) + logs.at[i] + unit;
                      })));
    }
  }
  if (!wants(kLogGradientNorm)) return;
  const float nan = __builtin_nanf("");
  if (!gradients) {
    for (int i = 0; i < kTile; ++i) out.at[kLogGradientNorm][i] = nan;
    return;
  }
  norm_by_top(buffers.s);
  alignas(64) float from_label[kTile], top_to_label[kTile];
  alignas(64) int32_t unlabelled[kTile];
  for (int i = 0; i < kTile; ++i) {
    const int64_t m = softmax.m[i] >= 0 ? softmax.m[i] : 0;
    from_label[i] = buffers.s[labels.y[i] * kTile + i];
    top_to_label[i] = lanes.distances[m * C + labels.y[i]];
    unlabelled[i] = labels.kind[i] == Label::kValid ? 0 : -1;
  }
  const double unit = 0.5 * lanes.log_distance - 0.5 * two_log_t - exponent * kLn2;
  for (int v = 0; v < kTile; v += kFloats) {
    const FloatV inverse = 1.0F / load_unaligned<FloatV>(softmax.u1 + v);
    const FloatV confidence = load_unaligned<FloatV>(softmax.confidence + v);
    const FloatV eps = load_unaligned<FloatV>(softmax.eps + v);
    const FloatV mean = load_unaligned<FloatV>(from_top + v) * inverse;
    const FloatV half = load_unaligned<FloatV>(pairs + v) * inverse * inverse;
    // math::table_gradient by lanes
    const Int32V top_label = load_unaligned<Int32V>(softmax.m + v) == load_unaligned<Int32V>(labels.y + v);
    const FloatV other = confidence * load_unaligned<FloatV>(top_to_label + v) +
                         eps * (load_unaligned<FloatV>(from_label + v) * inverse);
    const FloatV total = top_label ? mean : other;
    const FloatV square = total - (top_label ? half : eps * (confidence * mean + eps * half));
    const Int32V left = (square > kLeastOfDifference * total) & (square > kLeastOfDistances);
    unordinary_unless(v, left | load_unaligned<Int32V>(unlabelled + v));
    // log eps where the label is the top class
    const WideV logs = widened(math::log_normal_float(square));
    alignas(64) double own[kFloats];
    for (int lane = 0; lane < kFloats; ++lane) own[lane] = top_label[lane] ? softmax.log_eps[v + lane] : 0.0;
    store_unaligned(out.at[kLogGradientNorm] + v,
                    narrowed(each([&](int i) { return 0.5 * logs.at[i] + at(own, i * kDoubles) + unit; })));
  }
  for (int i = 0; i < kTile; ++i) {
    if (labels.kind[i] == Label::kValid) continue;
    out.at[kLogGradientNorm][i] = labels.kind[i] == Label::kIgnored ? -__builtin_inff() : nan;
  }
}

}  // namespace flatcore::cpu::FLATCORE_TARGET
