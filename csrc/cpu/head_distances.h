// Squared distances between rows, from differences: exact to rounding also for nearly equal rows, where the Gram form
// ||a||^2 + ||b||^2 - 2ab returns noise. Costs a subtraction more per multiply-add than a Gram product.
#pragma once

#include "cpu/simd.h"

namespace flatcore::cpu::FLATCORE_TARGET {

// out[a][b] = scale^2 ||x_a - y_b||^2 for A x B rows; T is the stored type, S the type of the sums.
template <class S, class T, int A, int B, bool scaled>
FLATCORE_INLINE void distance_tile(const T* x, int64_t x_stride, const T* y, int64_t y_stride, int64_t D, S scale,
                                   S (&out)[A][B]) {
  using V = typename VectorOf<S>::Type;
  constexpr int lanes = VectorOf<S>::kLanes;
  // In float, sums of at most 64 terms per lane are carried into double, so rounding stays below 64 * 2^-24 / 2 of it.
  constexpr int64_t block = 64 * lanes;
  DoubleV total[A][B] = {};
  double tail[A][B] = {};
  for (int64_t start = 0; start < D; start += block) {
    const int64_t end = D - start < block ? D : start + block;
    V sum[A][B] = {};
    int64_t d = start;
    for (; d + lanes <= end; d += lanes) {
      V ys[B];
      for (int b = 0; b < B; ++b) ys[b] = Load<S>::from(y + b * y_stride + d);
      for (int a = 0; a < A; ++a) {
        const V xa = Load<S>::from(x + a * x_stride + d);
        for (int b = 0; b < B; ++b) {
          V difference = xa - ys[b];
          if constexpr (scaled) difference *= scale;
          sum[a][b] += difference * difference;
        }
      }
    }
    for (int a = 0; a < A; ++a) {
      for (int b = 0; b < B; ++b) {
        total[a][b] += widened_sum(sum[a][b]);
        for (int64_t rest = d; rest < end; ++rest) {
          const S difference =
              (static_cast<S>(widen(x[a * x_stride + rest])) - static_cast<S>(widen(y[b * y_stride + rest]))) * scale;
          tail[a][b] += static_cast<double>(difference) * static_cast<double>(difference);
        }
      }
    }
  }
  for (int a = 0; a < A; ++a) {
    for (int b = 0; b < B; ++b) out[a][b] = static_cast<S>(sum_lanes(total[a][b]) + tail[a][b]);
  }
}

// Rows first..last of the symmetric table (C, C), the part above the diagonal and its mirror image.
template <class S, class T, bool scaled>
void distance_rows_of(const T* w, int64_t w_stride, int64_t C, int64_t D, double scale, int64_t first, int64_t last,
                      S* table) {
#if defined(FLATCORE_TARGET_avx512)
  constexpr int A = 4, B = 4;  // 16 accumulators of 32 registers
#else
  constexpr int A = 2, B = 4;
#endif
  const S s = static_cast<S>(scale);
  // The rows first..last stay in the second-level cache while the rest of W passes by once (about 2x at 8 MB of W).
  for (int64_t k = first - first % B; k < C; k += B) {
    for (int64_t j = first; j < last && j < k + B; j += A) {
      if (j + A <= last && k + B <= C) {
        S tile[A][B];
        distance_tile<S, T, A, B, scaled>(w + j * w_stride, w_stride, w + k * w_stride, w_stride, D, s, tile);
        for (int a = 0; a < A; ++a) {
          for (int b = 0; b < B; ++b) {
            if (k + b < j + a) continue;  // below the diagonal: another task writes it
            table[(j + a) * C + k + b] = table[(k + b) * C + j + a] = tile[a][b];
          }
        }
        continue;
      }
      for (int64_t a = j; a < (j + A < last ? j + A : last); ++a) {
        for (int64_t b = k; b < (k + B < C ? k + B : C); ++b) {
          if (b < a) continue;
          S one[1][1];
          distance_tile<S, T, 1, 1, scaled>(w + a * w_stride, w_stride, w + b * w_stride, w_stride, D, s, one);
          table[a * C + b] = table[b * C + a] = one[0][0];
        }
      }
    }
  }
}

template <class S, class T>
void distance_rows(const T* w, int64_t w_stride, int64_t C, int64_t D, double scale, int64_t first, int64_t last,
                   S* table) {
  if (scale == 1.0) {
    distance_rows_of<S, T, false>(w, w_stride, C, D, scale, first, last, table);
  } else {
    distance_rows_of<S, T, true>(w, w_stride, C, D, scale, first, last, table);
  }
}

}  // namespace flatcore::cpu::FLATCORE_TARGET
