// A row's logits of a tile of a large head: its top two, and the sums over the shares that they become.
//
// The arithmetic of a tile's logits: L is float for float32 products, whose logits are floats and, with a bias of
// floats, take one rounding more; double for float64 ones, and where bias or temperature leave float's range.
#pragma once

#include <cstring>
#include <type_traits>

#include "cpu/head_rows.h"
#include "cpu/simd.h"
#include "math/cancellation.h"

namespace flatcore::cpu::FLATCORE_TARGET {

// A row's logits of a tile, in the compute type C, with the bias where it is still to be added.
template <class C, class L>
struct LogitRow {
  using V = VectorOfL<L>;
  static constexpr int kLanes = VectorOf<L>::kLanes;
  const C* z;
  const L* bias;
  bool given;
  int64_t count;

  L at(int64_t k) const { return bias ? static_cast<L>(z[k]) + bias[k] : static_cast<L>(z[k]); }
  // Positions k, k+1, ...: absent classes behind the last. `bad` becomes NaN where the product is not finite.
  V vector_at(int64_t k, V& bad) const {
    const int64_t left = count - k;
    V v = left >= kLanes ? Load<L>::from(z + k) : load_some<L>(z + k, left);
    if (!given) bad += v * L{0};
    if (bias != nullptr) v += left >= kLanes ? load_unaligned<V>(bias + k) : load_some<L>(bias + k, left);
    if (left < kLanes) v = lanes() < static_cast<LaneIndex>(left) ? v : V{} - static_cast<L>(math::kInfinity);
    return v;
  }
  using LaneIndex = std::conditional_t<sizeof(L) == 4, int32_t, int64_t>;
  static typename VectorOf<L>::Index lanes() {
    typename VectorOf<L>::Index index;
    for (int lane = 0; lane < kLanes; ++lane) index[lane] = lane;
    return index;
  }
};

// The top two of a tile, by position in it; `poison` becomes NaN if the row is not to be trusted.
template <class C, class L>
math::SoftmaxTail tops_of_tile(const LogitRow<C, L>& row, double& poison) {
  using V = VectorOfL<L>;
  using Index = typename VectorOf<L>::Index;
  constexpr int lanes = VectorOf<L>::kLanes;
  constexpr L infinity = static_cast<L>(math::kInfinity);
  V t = V{} - infinity, r = t, bad = {};
  Index m = Index{} - 1, index = row.lanes();
  for (int64_t k = 0; k < row.count; k += lanes) {
    const V z = row.vector_at(k, bad);
    bad = z < infinity ? bad : V{} + static_cast<L>(kNan);
    const auto higher = z > t;
    const V second = z > r ? z : r;
    r = higher ? t : second;
    m = higher ? index : m;
    t = higher ? z : t;
    index += lanes;
  }
  math::SoftmaxTail tail = math::empty_tail();
  L below = -infinity;  // best of what is not a lane's top
  for (int lane = 0; lane < lanes; ++lane) {
    poison += static_cast<double>(bad[lane]);
    if (m[lane] < 0) continue;
    if (r[lane] > below) below = r[lane];
    tail = math::combine_tops(tail, math::leaf_tail(static_cast<int64_t>(m[lane]), static_cast<double>(t[lane])));
  }
  if (static_cast<double>(below) > tail.r) tail.r = static_cast<double>(below);
  return tail;
}

// Sums over the shares of a tile as they are stored.
struct ShareSums {
  double one = 0.0, square = 0.0, bias = 0.0;  // of u_j, u_j ||2^e w_j - center||^2, u_j (2^e b_j - center_b)
};

// What belongs to a tile's classes, from its first position on; null for none.
struct TileColumns {
  const double* squares;
  const double* bias;
  double bias_scale, bias_center;

  void add(ShareSums& sums, int64_t k, double u) const {
    sums.one += u;
    if (squares) sums.square += u * squares[k];
    if (bias) sums.bias += u * (bias[k] * bias_scale - bias_center);
  }
};

// exp((z - base)/T), 0 where a float's share is not kept.
template <class L>
struct Shares;
template <>
struct Shares<double> {
  double base, inverse_temperature;
  Shares(double from, double temperature) : base(from), inverse_temperature(1.0 / temperature) {}
  DoubleV of(DoubleV z) const { return math::exp_nonpositive((z - base) * inverse_temperature); }
};
template <>
struct Shares<float> {
  float base;
  math::FloatTemperature temperature;
  Shares(double from, double t) : base(static_cast<float>(from)), temperature(t) {}
  FloatV of(FloatV z) const { return math::exp_difference_float(z, FloatV{} + base, temperature); }
};

// What is stored of a share in the compute type, and the same as doubles.
FLATCORE_INLINE void keep(double* to, DoubleV u, DoubleV (&wide)[1]) {
  if (to != nullptr) store_unaligned(to, u);
  wide[0] = u;
}
FLATCORE_INLINE void keep(float* to, FloatV u, DoubleV (&wide)[2]) {
  if (to != nullptr) store_unaligned(to, u);
  split(u, wide);
}
FLATCORE_INLINE void keep(float* to, DoubleV u, DoubleV (&wide)[1]) {
  wide[0] = u;
  if (to == nullptr) return;
  const HalfFloatV stored = to_float(math::share_is_kept(u) ? u : DoubleV{});
  store_unaligned(to, stored);
  wide[0] = to_double(stored);
}

// Adds exp((z_j - base)/T) of a tile and their squares to u1 and u2, `top` (a position, or -1) left out; stores them in
// `shares` unless null, and sums what is stored. Floats are added in float64, their squares from 4 terms on.
template <class C, class L>
ShareSums sum_tile(const LogitRow<C, L>& row, int64_t top, double base, double temperature, const TileColumns& columns,
                   C* shares, double& u1, double& u2) {
  using V = VectorOfL<L>;
  constexpr int lanes = VectorOf<L>::kLanes, halves = lanes / kDoubles;
  const Shares<L> exponential(base, temperature);
  DoubleV sum1[halves] = {}, sum2[halves] = {}, one[halves] = {}, square[halves] = {}, bias[halves] = {};
  V ignored = {};
  const auto add = [&](int64_t k, C* to, const double* squares, const double* biases) {
    V u = exponential.of(row.vector_at(k, ignored));
    if (top >= k && top < k + lanes) u[top - k] = L{0};
    DoubleV wide[halves];
    if constexpr (sizeof(L) > sizeof(C)) sum1[0] += u;  // what is stored is rounded
    keep(to, u, wide);
    for (int i = 0; i < halves; ++i) {
      one[i] += wide[i];
      if (squares) square[i] += wide[i] * load_unaligned<DoubleV>(squares + i * kDoubles);
      if (biases) {
        bias[i] +=
            wide[i] * (load_unaligned<DoubleV>(biases + i * kDoubles) * columns.bias_scale - columns.bias_center);
      }
    }
    return u;
  };
  const auto whole = [&](int64_t k) {
    return add(k, shares == nullptr ? nullptr : shares + k, columns.squares ? columns.squares + k : nullptr,
               columns.bias ? columns.bias + k : nullptr);
  };
  const auto square_of = [&](V u) {
    DoubleV wide[halves];
    split(u, wide);
    for (int i = 0; i < halves; ++i) sum2[i] += wide[i];
  };
  int64_t k = 0;
  for (; k + 4 * lanes <= row.count; k += 4 * lanes) {
    const V a = whole(k), b = whole(k + lanes), c = whole(k + 2 * lanes), d = whole(k + 3 * lanes);
    square_of((a * a + b * b) + (c * c + d * d));
  }
  for (; k + lanes <= row.count; k += lanes) {
    const V a = whole(k);
    square_of(a * a);
  }
  if (k < row.count) {
    const int64_t left = row.count - k;
    alignas(64) C some[lanes];
    alignas(64) double squares[lanes] = {}, biases[lanes] = {};
    const auto bytes = static_cast<size_t>(left) * sizeof(double);
    if (columns.squares) std::memcpy(squares, columns.squares + k, bytes);
    if (columns.bias) std::memcpy(biases, columns.bias + k, bytes);
    const V a = add(k, shares == nullptr ? nullptr : some, columns.squares ? squares : nullptr,
                    columns.bias ? biases : nullptr);
    square_of(a * a);
    if (shares != nullptr) std::memcpy(shares + k, some, static_cast<size_t>(left) * sizeof(C));
  }
  ShareSums sums;
  for (int i = 0; i < halves; ++i) {
    u1 += sum_lanes(sizeof(L) > sizeof(C) ? sum1[i] : one[i]);
    u2 += sum_lanes(sum2[i]);
    sums.one += sum_lanes(one[i]);
    sums.square += sum_lanes(square[i]);
    sums.bias += sum_lanes(bias[i]);
  }
  return sums;
}

}  // namespace flatcore::cpu::FLATCORE_TARGET
