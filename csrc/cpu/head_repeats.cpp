// head_repeats: which classes share a row of W, found by a random projection of each row.
//
// Why: in q (W - center) a float sum adds a term per class. Terms that differ round at random, and 40,000 of them cost
// no more digits than a few; equal ones (600 zero rows, say) round with one sign, and the sum is off by up to their
// number in units of the last place: 2.5e-4 of log Var_p(w) at C = 600, 63 times what is allowed. Brought together in
// one class first, they are added once.
//
// Who allocates: the caller; the sort works on C numbers of its own. Numerics: equal rows have bit-equal projections,
// and are compared element by element, so that none is merged that differs. Nearly equal ones (1/1024 of their distance
// to the mean row) are found where no other row's projection lies between; one that is missed only keeps its own
// rounding. Cost: a sort of C numbers, a few elements of each neighbour in that order and, of those that
// are equal, all.
#include "cpu/head_repeats.h"

#include <cmath>
#include <vector>

#include "cpu/simd.h"

namespace flatcore::cpu::FLATCORE_TARGET {
namespace {

constexpr double kNear = 0x1p-10;  // of the row's distance to the mean row

struct Keyed {
  double key;
  int64_t j;
};

// By key, equal ones in the order they come in: byte by byte from the lowest, whose counts are taken together. A
// comparison sort of 4,096 random keys took 0.2 ms, as long as a read of 8 MB of W.
void sort_by_key(std::vector<Keyed>& order) {
  const auto bits = [](double key) {
    const auto raw = math::bit_cast<uint64_t>(key);
    return (raw >> 63) != 0 ? ~raw : raw | (uint64_t{1} << 63);
  };
  std::vector<size_t> counts(size_t{8} * 256);
  for (const Keyed& item : order) {
    const uint64_t value = bits(item.key);
    for (size_t byte = 0; byte < 8; ++byte) ++counts[byte * 256 + (value >> (8 * byte) & 255U)];
  }
  std::vector<Keyed> other(order.size());
  for (size_t byte = 0; byte < 8; ++byte) {
    size_t* at = counts.data() + byte * 256;
    size_t before = 0, most = 0;
    for (size_t digit = 0; digit < 256; ++digit) {
      const size_t here = at[digit];
      most = here > most ? here : most;
      at[digit] = before;
      before += here;
    }
    if (most == order.size()) continue;  // one digit for all
    for (const Keyed& item : order) other[at[bits(item.key) >> (8 * byte) & 255U]++] = item;
    order.swap(other);
  }
}

template <class T>
RepeatCounts repeats(const HeadRepeats& call) {
  const T* w = static_cast<const T*>(call.weight.data);
  const int64_t rows = call.weight.row_stride, step = call.weight.column_stride;
  const int64_t C = call.C, D = call.D;
  const double scale = std::scalbn(1.0, call.exponent);
  const double* key = call.keys;

  std::vector<Keyed> order;
  order.reserve(static_cast<size_t>(C));
  for (int64_t j = 0; j < C; ++j) {                               // a row that is not finite equals none
    if (key[j] * 0.0 == 0.0) order.push_back({key[j] + 0.0, j});  // -0 is 0
  }
  sort_by_key(order);

  RepeatCounts counts{0, 0, 0};
  const auto is_near = [&](int64_t j, int64_t k, double limit) {
    // the lengths of near rows differ by less than the rows: tells most others without a look at W, whose rows lie
    // apart
    const double lengths = std::sqrt(call.centered_squares[j]) - std::sqrt(call.centered_squares[k]);
    if (lengths * lengths > 1.01 * limit + 1e-12 * call.centered_squares[j]) return false;
    const T *x = w + j * rows, *y = w + k * rows;
    double sum = call.bias != nullptr ? (call.bias[j] - call.bias[k]) * scale : 0.0;
    sum *= sum;
    for (int64_t d = 0; d < D && sum <= limit; ++d) {
      const double difference =
          (static_cast<double>(widen(x[d * step])) - static_cast<double>(widen(y[d * step]))) * scale;
      sum += difference * difference;
    }
    return sum <= limit;
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
      if (other.key - head.key > reach) break;
      const bool same = other.key == head.key && equal(head.j, other.j);
      if (!same && !is_near(head.j, other.j, kNear * kNear * square)) break;
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
