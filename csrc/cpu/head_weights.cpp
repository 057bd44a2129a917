// What the kernels of large heads need of W alone: norms and center of its rows.
//
// Who allocates: the caller; outputs are overwritten.
//
// Numerics: sums in float64, over values brought into range by a power of two, so that no square over- or underflows.
#include <cmath>

#include "cpu/head_metrics.h"
#include "cpu/head_rows.h"
#include "cpu/parallel.h"

namespace flatcore::cpu::FLATCORE_TARGET {
namespace {

// Sum of squares of scale * x - center over a row (center null: of scale * x), and the largest |x|.
template <class T>
double row_squares(const T* x, int64_t step, int64_t D, const double* center, double scale, double* largest) {
  double sum = 0.0, top = 0.0;
  int64_t d = 0;
  if (step == 1) {
    DoubleV sums[2] = {}, tops[2] = {};
    for (; d + 2 * kDoubles <= D; d += 2 * kDoubles) {
      for (int k = 0; k < 2; ++k) {
        DoubleV v = Load<double>::from(x + d + k * kDoubles);
        const DoubleV a = magnitude(v);
        tops[k] = a > tops[k] ? a : tops[k];
        v *= scale;
        if (center != nullptr) v -= load_unaligned<DoubleV>(center + d + k * kDoubles);
        sums[k] += v * v;
      }
    }
    sum = sum_lanes(sums[0] + sums[1]);
    for (int lane = 0; lane < kDoubles; ++lane) {
      for (int k = 0; k < 2; ++k) top = tops[k][lane] > top ? tops[k][lane] : top;
    }
  }
  for (; d < D; ++d) {
    const double v = static_cast<double>(widen(x[d * step]));
    const double a = std::fabs(v);
    top = a > top ? a : top;
    const double scaled = center != nullptr ? v * scale - center[d] : v * scale;
    sum += scaled * scaled;
  }
  if (largest != nullptr) *largest = top;
  return sum;
}

template <class T>
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

  parallel_for(threads, C, [&](int64_t j, int) {
    call.row_squares[j] = row_squares(w + j * rows, step, D, nullptr, 1.0, call.row_largest + j);
  });
  double largest = 0.0;
  for (int64_t j = 0; j < C; ++j) {
    largest = call.row_largest[j] > largest ? call.row_largest[j] : largest;
    const double b = call.bias != nullptr ? std::fabs(call.bias[j]) : 0.0;
    if (b > largest && b < math::kInfinity) largest = b;
  }
  const int exponent = scaling_exponent(largest, call.double_compute);
  const double scale = std::scalbn(1.0, exponent);
  if (exponent != 0) {
    parallel_for(threads, C, [&](int64_t j, int) {
      call.row_squares[j] = row_squares(w + j * rows, step, D, nullptr, scale, static_cast<double*>(nullptr));
    });
  }
  call.summary[0] = std::log(total_with(scale)) - 2.0 * exponent * kLn2;
  call.summary[1] = exponent;
  if (call.center == nullptr) return;

  // The mean as the first row plus the mean difference to it: equal rows give exactly that row.
  constexpr int64_t width = 512;
  parallel_for(threads, (D + width - 1) / width, [&](int64_t task, int) {
    const int64_t first = task * width, count = D - first < width ? D - first : width;
    alignas(64) double sums[width] = {}, base[width] = {};
    for (int64_t d = 0; d < count; ++d) base[d] = static_cast<double>(widen(w[(first + d) * step])) * scale;
    for (int64_t j = 1; j < C; ++j) {
      const T* x = w + j * rows + first * step;
      int64_t d = 0;
      if (step == 1) {
        for (; d + kDoubles <= count; d += kDoubles) {
          const DoubleV difference = Load<double>::from(x + d) * scale - load_unaligned<DoubleV>(base + d);
          store_unaligned(sums + d, load_unaligned<DoubleV>(sums + d) + difference);
        }
      }
      for (; d < count; ++d) sums[d] += static_cast<double>(widen(x[d * step])) * scale - base[d];
    }
    for (int64_t d = 0; d < count; ++d) {
      const double mean = base[d] + sums[d] / static_cast<double>(C);
      call.center[first + d] = call.double_compute ? mean : static_cast<double>(static_cast<float>(mean));
    }
  });
  // A center is there to keep a common row's digits out of the product. Where that row is no longer than the rest of a
  // row it costs less than a digit, and without a center the library multiplies W as it stands.
  double center2 = 0.0, mean2 = 0.0;
  for (int64_t d = 0; d < D; ++d) center2 += call.center[d] * call.center[d];
  for (int64_t j = 0; j < C; ++j) mean2 += call.row_squares[j] / static_cast<double>(C);
  const bool none = math::common_row_is_small(center2, mean2);
  for (int64_t d = 0; d < D && none; ++d) call.center[d] = 0.0;
  call.center[D] = 0.0;
  if (call.bias != nullptr) {
    double sum = 0.0;
    for (int64_t j = 1; j < C; ++j) sum += (call.bias[j] - call.bias[0]) * scale;
    call.center[D] = call.bias[0] * scale + sum / static_cast<double>(C);
  }
  parallel_for(threads, C, [&](int64_t j, int) {
    const double b = call.bias != nullptr ? call.bias[j] * scale - call.center[D] : 0.0;
    const double square = none ? call.row_squares[j]
                               : row_squares(w + j * rows, step, D, call.center, scale, static_cast<double*>(nullptr));
    call.centered_squares[j] = square + b * b;
  });
}

}  // namespace

void head_summary(const HeadSummary& call) {
  with_element(call.weight.dtype, [&](auto* type) { summarise<ElementOf<decltype(type)>>(call); });
}

}  // namespace flatcore::cpu::FLATCORE_TARGET
