// head_repeats: which classes share a row of W, found by two random projections of each row.
//
// Why: in q (W - center) a float sum adds a term per class. Terms that differ round at random, and 40,000 of them cost
// no more digits than a few; equal ones (600 zero rows, say) round with one sign, and the sum is off by up to their
// number in units of the last place: 2.5e-4 of log Var_p(w) at C = 600, 63 times what is allowed. Brought together in
// one class first, they are added once.
//
// Who allocates: the caller; the sort works on C numbers of its own. Numerics: equal rows have bit-equal projections,
// and are compared element by element, so that none is merged that differs. Nearly equal ones (1/1024 of their distance
// to the mean row) are found where both projections are as near; one that is missed only keeps its own rounding.
// Cost: one read of W, C log C comparisons, and D operations per class that has a neighbour.
#include "cpu/head_repeats.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace flatcore::cpu::FLATCORE_TARGET {
namespace {

constexpr double kNear = 0x1p-10;  // of the row's distance to the mean row

// A fixed pseudo-random number in [-1, 1): the finalizer of splitmix64.
double projection(uint64_t d) {
  uint64_t x = (d + 1) * 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  x ^= x >> 31;
  return static_cast<double>(static_cast<int64_t>(x) >> 11) * 0x1p-52;
}

template <class T>
RepeatCounts repeats(const HeadRepeats& call) {
  const T* w = static_cast<const T*>(call.weight.data);
  const int64_t rows = call.weight.row_stride, step = call.weight.column_stride;
  const int64_t C = call.C, D = call.D;
  const double scale = std::scalbn(1.0, call.exponent);
  double* first_key = call.keys;
  double* second_key = first_key + C;
  double* one = second_key + C;
  double* two = one + D + 1;
  for (int64_t d = 0; d <= D; ++d) {  // the last for the bias
    one[d] = projection(static_cast<uint64_t>(d)) * scale;
    two[d] = projection(static_cast<uint64_t>(D + 1 + d)) * scale;
  }
  parallel_for(C * D < (1 << 16) ? 1 : call.threads, C, [&](int64_t j, int) {
    const T* x = w + j * rows;
    DoubleV a[2] = {}, b[2] = {};
    const double bias = call.bias != nullptr ? call.bias[j] : 0.0;
    double tail_a = bias * one[D], tail_b = bias * two[D];
    int64_t d = 0;
    if (step == 1) {
      for (; d + 2 * kDoubles <= D; d += 2 * kDoubles) {
        for (int k = 0; k < 2; ++k) {
          const DoubleV v = Load<double>::from(x + d + k * kDoubles);
          a[k] += v * load_unaligned<DoubleV>(one + d + k * kDoubles);
          b[k] += v * load_unaligned<DoubleV>(two + d + k * kDoubles);
        }
      }
    }
    for (; d < D; ++d) {
      const double v = static_cast<double>(widen(x[d * step]));
      tail_a += v * one[d];
      tail_b += v * two[d];
    }
    first_key[j] = sum_lanes(a[0] + a[1]) + tail_a;
    second_key[j] = sum_lanes(b[0] + b[1]) + tail_b;
  });

  struct Keyed {
    double first, second;
    int64_t j;
  };
  std::vector<Keyed> order;
  order.reserve(static_cast<size_t>(C));
  for (int64_t j = 0; j < C; ++j) {  // a row that is not finite equals none
    if ((first_key[j] + second_key[j]) * 0.0 == 0.0) order.push_back({first_key[j], second_key[j], j});
  }
  std::sort(order.begin(), order.end(), [](const Keyed& a, const Keyed& b) {
    return a.first != b.first ? a.first < b.first : a.second != b.second ? a.second < b.second : a.j < b.j;
  });

  RepeatCounts counts{0, 0, 0};
  const auto squared_distance = [&](int64_t j, int64_t k) {
    const T *x = w + j * rows, *y = w + k * rows;
    double sum = call.bias != nullptr ? (call.bias[j] - call.bias[k]) * scale : 0.0;
    sum *= sum;
    for (int64_t d = 0; d < D; ++d) {
      const double difference =
          (static_cast<double>(widen(x[d * step])) - static_cast<double>(widen(y[d * step]))) * scale;
      sum += difference * difference;
    }
    return sum;
  };
  const auto equal = [&](int64_t j, int64_t k) {
    const T *x = w + j * rows, *y = w + k * rows;
    for (int64_t d = 0; d < D; ++d) {
      if (widen(x[d * step]) != widen(y[d * step])) return false;
    }
    return call.bias == nullptr || call.bias[j] == call.bias[k];
  };
  const size_t count = order.size();
  for (size_t start = 0; start < count;) {
    const Keyed& head = order[start];
    // a projection is the difference's length over the square root of 3, give or take
    const double square = call.centered_squares[head.j], reach = 2.0 * kNear * std::sqrt(square);
    const int64_t group = counts.members;
    size_t next = start + 1;
    for (; next < count; ++next) {
      const Keyed& other = order[next];
      if (other.first - head.first > reach || std::fabs(other.second - head.second) > reach) break;
      const bool same = other.first == head.first && other.second == head.second && equal(head.j, other.j);
      if (!same && !(squared_distance(head.j, other.j) <= kNear * kNear * square)) break;
      if (counts.members == group) call.members[counts.members++] = head.j;
      call.members[counts.members++] = other.j;
      if (same) continue;
      call.near[counts.near] = other.j;
      call.near_of[counts.near++] = head.j;
    }
    if (counts.members > group) call.starts[counts.groups++] = group;
    start = next;
  }
  call.starts[counts.groups] = counts.members;
  return counts;
}

}  // namespace

RepeatCounts head_repeats(const HeadRepeats& call) {
  RepeatCounts counts{};
  with_element(call.weight.dtype,
               [&](auto* type) { counts = repeats<std::remove_const_t<std::remove_pointer_t<decltype(type)>>>(call); });
  return counts;
}

}  // namespace flatcore::cpu::FLATCORE_TARGET
