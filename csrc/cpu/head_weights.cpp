// What the kernels of large heads need of W alone, in one read of it, or two where the rows have a center that is not
// 0: norms, center and projections of its rows.
//
// Who allocates: the caller; outputs are overwritten. The center's sums over blocks of rows are the sweep's own.
//
// Numerics: sums in float64, over values brought into range by a power of two, so that no square over- or underflows.
#include <cmath>
#include <vector>

#include "cpu/head_metrics.h"
#include "cpu/head_rows.h"
#include "cpu/parallel.h"

namespace flatcore::cpu::FLATCORE_TARGET {
namespace {

// Sum of squares of scale * x - center over a row.
template <class T>
double centered_square(const T* x, int64_t step, int64_t D, const double* center, double scale) {
  DoubleV sums[2] = {};
  int64_t d = 0;
  for (; step == 1 && d + 2 * kDoubles <= D; d += 2 * kDoubles) {
    for (int k = 0; k < 2; ++k) {
      const DoubleV v =
          Load<double>::from(x + d + k * kDoubles) * scale - load_unaligned<DoubleV>(center + d + k * kDoubles);
      sums[k] += v * v;
    }
  }
  double sum = sum_lanes(sums[0] + sums[1]);
  for (; d < D; ++d) {
    const double v = static_cast<double>(widen(x[d * step])) * scale - center[d];
    sum += v * v;
  }
  return sum;
}

// A fixed pseudo-random number in [-1, 1): the finalizer of splitmix64.
double projection(uint64_t d) {
  uint64_t x = (d + 1) * 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  x ^= x >> 31;
  return static_cast<double>(static_cast<int64_t>(x) >> 11) * 0x1p-52;
}

// One sweep over W: the rows' squares and largest entries and, if there is to be a center, their projections and the
// sums of their differences to the first row. Blocks of rows, whose number comes from C and D, are tasks with sums of
// their own, so that no bit depends on the number of threads. Squares and projections are sums in float64; the
// differences' sums, which only say where the center lies, are of 64 in the lanes' type L, and of equal rows they are
// 0. L is the compute type, which has the scale: beside float64 features a float32 W may be below float's normal
// numbers.
template <class T, class L>
class Sweep {
  using V = typename VectorOf<L>::Type;
  static constexpr int kLanes = VectorOf<L>::kLanes, kHalves = kLanes / kDoubles;
  static constexpr int64_t kCarried = 64;

 public:
  Sweep(const HeadSummary& call, int threads)
      : call_(call), threads_(threads), w_(static_cast<const T*>(call.weight.data)) {
    const int64_t C = call.C, D = call.D;
    if (call.center == nullptr) return;
    for (int64_t d = 0; d <= D; ++d) call.keys[C + d] = projection(static_cast<uint64_t>(d));
    // at most 4 MB of sums, but for eight blocks
    int64_t most = (int64_t{1} << 19) / (D + 1);
    most = most < 8 ? 8 : most > 64 ? 64 : most;
    rows_ = (C + most - 1) / most;
    if (rows_ < kCarried) rows_ = kCarried;
    sums_.resize(static_cast<size_t>((C + rows_ - 1) / rows_ * D));
    lanes_.resize(static_cast<size_t>((threads + 1) * D));
  }

  void run(double scale) {
    const int64_t C = call_.C, D = call_.D;
    if (call_.center == nullptr) {
      constexpr int64_t together = 16;
      parallel_for(threads_, (C + together - 1) / together, [&](int64_t task, int) {
        const int64_t last = (task + 1) * together < C ? (task + 1) * together : C;
        for (int64_t j = task * together; j < last; ++j) row(j, scale, nullptr);
      });
      return;
    }
    L* base = lanes_.data() + threads_ * D;
    const int64_t step = call_.weight.column_stride;
    for (int64_t d = 0; d < D; ++d) base[d] = static_cast<L>(widen(w_[d * step])) * static_cast<L>(scale);
    parallel_for(threads_, (C + rows_ - 1) / rows_, [&](int64_t task, int thread) {
      double* total = sums_.data() + task * D;
      L* differences = lanes_.data() + thread * D;
      for (int64_t d = 0; d < D; ++d) total[d] = 0.0;
      const int64_t end = (task + 1) * rows_ < C ? (task + 1) * rows_ : C;
      for (int64_t first = task * rows_; first < end; first += kCarried) {
        const int64_t last = end - first < kCarried ? end : first + kCarried;
        for (int64_t d = 0; d < D; ++d) differences[d] = L{};
        for (int64_t j = first; j < last; ++j) row(j, scale, differences);
        for (int64_t d = 0; d < D; ++d) total[d] += static_cast<double>(differences[d]);
      }
    });
  }

  // The mean as the first row plus the mean difference to it: equal rows give exactly that row.
  double mean(int64_t d) const {
    double sum = 0.0;
    for (int64_t block = 0; block * rows_ < call_.C; ++block) sum += sums_[static_cast<size_t>(block * call_.D + d)];
    return static_cast<double>(lanes_[static_cast<size_t>(threads_ * call_.D + d)]) +
           sum / static_cast<double>(call_.C);
  }

 private:
  void row(int64_t j, double scale, L* differences) const {
    const int64_t C = call_.C, D = call_.D, step = call_.weight.column_stride;
    const T* x = w_ + j * call_.weight.row_stride;
    const L* base = lanes_.data() + threads_ * D;
    const double* vector = call_.keys + C;
    const L factor = static_cast<L>(scale);
    const bool keyed = call_.center != nullptr;  // not by `differences`, which of no features lie nowhere
    DoubleV squares[kHalves] = {}, keys[kHalves] = {};
    V tops = {};
    int64_t d = 0;
    for (; step == 1 && d + kLanes <= D; d += kLanes) {
      V v = Load<L>::from(x + d);
      const V a = magnitude(v);
      tops = a > tops ? a : tops;
      if (factor != L{1}) v *= factor;
      DoubleV wide[kHalves];
      split(v, wide);
      for (int k = 0; k < kHalves; ++k) {
        squares[k] += wide[k] * wide[k];
        if (keyed) keys[k] += wide[k] * load_unaligned<DoubleV>(vector + d + k * kDoubles);
      }
      if (keyed) {
        store_unaligned(differences + d, load_unaligned<V>(differences + d) + (v - load_unaligned<V>(base + d)));
      }
    }
    double sum = 0.0, key = 0.0, top = 0.0;
    for (int k = 0; k < kHalves; ++k) {
      sum += sum_lanes(squares[k]);
      key += sum_lanes(keys[k]);
    }
    for (int lane = 0; lane < kLanes; ++lane)
      top = static_cast<double>(tops[lane]) > top ? static_cast<double>(tops[lane]) : top;
    for (; d < D; ++d) {
      const double value = static_cast<double>(widen(x[d * step])), scaled = value * scale;
      top = std::fabs(value) > top ? std::fabs(value) : top;
      sum += scaled * scaled;
      if (!keyed) continue;
      key += scaled * vector[d];
      differences[d] += static_cast<L>(scaled) - base[d];
    }
    if (keyed) call_.keys[j] = call_.bias != nullptr ? key + call_.bias[j] * scale * vector[D] : key;
    call_.row_squares[j] = sum;
    call_.row_largest[j] = top;
  }

  const HeadSummary& call_;
  int threads_;
  const T* w_;
  int64_t rows_ = 1;
  std::vector<double> sums_;  // (blocks, D)
  std::vector<L> lanes_;      // (threads + 1, D): each thread's differences, and the first row
};

template <class T, class L>
void summarise(const HeadSummary& call) {
  const T* w = static_cast<const T*>(call.weight.data);
  const int64_t rows = call.weight.row_stride, step = call.weight.column_stride;
  const int64_t C = call.C, D = call.D;
  const int threads = C * D < (1 << 16) ? 1 : call.threads;
  const auto total_with = [&](double scale) {
    double total = 0.0;
    for (int64_t j = 0; j < C; ++j) total += call.row_squares[j];
    if (call.bias != nullptr) {
      for (int64_t j = 0; j < C; ++j) total += call.bias[j] * scale * (call.bias[j] * scale);
    }
    return total;
  };

  Sweep<T, L> sweep(call, threads);
  sweep.run(1.0);
  double largest = 0.0;
  for (int64_t j = 0; j < C; ++j) {
    largest = call.row_largest[j] > largest ? call.row_largest[j] : largest;
    const double b = call.bias != nullptr ? std::fabs(call.bias[j]) : 0.0;
    if (b > largest && b < math::kInfinity) largest = b;
  }
  const int exponent = scaling_exponent(largest, call.double_compute);
  const double scale = std::scalbn(1.0, exponent);
  if (exponent != 0) sweep.run(scale);
  call.summary[0] = std::log(total_with(scale)) - 2.0 * exponent * kLn2;
  call.summary[1] = exponent;
  call.summary[2] = 0.0;
  if (call.center == nullptr) return;

  for (int64_t d = 0; d < D; ++d) {
    const double mean = sweep.mean(d);
    call.center[d] = call.double_compute ? mean : static_cast<double>(static_cast<float>(mean));
  }
  // A center is there to keep a common row's digits out of the product. Where that row is no longer than the rest of a
  // row it costs less than a digit, and without a center the library multiplies W as it stands.
  double center2 = 0.0, mean2 = 0.0;
  for (int64_t d = 0; d < D; ++d) center2 += call.center[d] * call.center[d];
  for (int64_t j = 0; j < C; ++j) mean2 += call.row_squares[j] / static_cast<double>(C);
  const bool none = math::common_row_is_small(center2, mean2);
  for (int64_t d = 0; d < D && none; ++d) call.center[d] = 0.0;
  call.summary[2] = none || center2 == 0.0 ? 0.0 : 1.0;
  call.center[D] = 0.0;
  if (call.bias != nullptr) {
    double sum = 0.0;
    for (int64_t j = 1; j < C; ++j) sum += (call.bias[j] - call.bias[0]) * scale;
    call.center[D] = call.bias[0] * scale + sum / static_cast<double>(C);
  }
  constexpr int64_t together = 16;
  parallel_for(none ? 1 : threads, (C + together - 1) / together, [&](int64_t task, int) {
    const int64_t last = (task + 1) * together < C ? (task + 1) * together : C;
    for (int64_t j = task * together; j < last; ++j) {
      const double b = call.bias != nullptr ? call.bias[j] * scale - call.center[D] : 0.0;
      const double square = none ? call.row_squares[j] : centered_square(w + j * rows, step, D, call.center, scale);
      call.centered_squares[j] = square + b * b;
    }
  });
}

}  // namespace

void head_summary(const HeadSummary& call) {
  with_element(call.weight.dtype, [&](auto* type) {
    using T = ElementOf<decltype(type)>;
    if (call.double_compute) return summarise<T, double>(call);
    if constexpr (sizeof(T) <= sizeof(float)) summarise<T, float>(call);
  });
}

}  // namespace flatcore::cpu::FLATCORE_TARGET
