// row_norms: L1, L2 and L-infinity of every row from one read.
//
// Numerics: float32, float16 and bfloat16 are widened to float64 before anything is added, so squares of 1e20 or 1e-25
// neither overflow nor vanish and sums of any length are right to float32's last digit. float64 rows whose sum of
// squares leaves [1e-280, 1e300] are read again, scaled by a power of two.
// Cost: N*K elements read once. Long rows are cut into blocks of 64 Ki elements, so that one row feeds all threads; the
// blocks' partial results are added in order: two runs agree bit for bit, whatever the number of threads.
#include "cpu/row_norms.h"

#include <cmath>

#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "math/norms.h"

namespace flatcore::cpu {

constexpr int64_t kBlock = int64_t{1} << 16;

namespace FLATCORE_TARGET {
namespace {

struct Partial {
  double sum = 0.0, squares = 0.0, largest = 0.0;
};

// Norms of count elements `stride` apart, squares scaled first. Narrow types are widened after |x| and the maximum are
// taken, which halves those steps; two accumulators a kind hide the latency of an addition (3-4 cycles).
template <class T, bool scaled>
Partial block_norms(const T* x, int64_t stride, int64_t count, double scale) {
  using Narrow = std::conditional_t<std::is_same_v<T, double>, double, float>;
  using V = typename VectorOf<Narrow>::Type;
  constexpr int lanes = VectorOf<Narrow>::kLanes;
  constexpr int halves = sizeof(double) / sizeof(Narrow);
  Partial partial;
  int64_t k = 0;
  if (stride == 1) {
    constexpr int unroll = 2;
    DoubleV sum[unroll * halves] = {}, squares[unroll * halves] = {};
    V largest[unroll] = {};
    for (; k + unroll * lanes <= count; k += unroll * lanes) {
#pragma GCC unroll 2
      for (int i = 0; i < unroll; ++i) {
        const V a = magnitude(Load<Narrow>::from(x + k + i * lanes));
        largest[i] = a > largest[i] ? a : largest[i];
        DoubleV wide[halves];
        split(a, wide);
#pragma GCC unroll 2
        for (int h = 0; h < halves; ++h) {
          sum[i * halves + h] += wide[h];
          const DoubleV v = scaled ? wide[h] * scale : wide[h];
          squares[i * halves + h] += v * v;
        }
      }
    }
    for (int i = 0; i < unroll * halves; ++i) {
      partial.sum += sum_lanes(sum[i]);
      partial.squares += sum_lanes(squares[i]);
    }
    for (int lane = 0; lane < lanes; ++lane) {
      for (int i = 0; i < unroll; ++i) {
        const double a = static_cast<double>(largest[i][lane]);
        partial.largest = a > partial.largest ? a : partial.largest;
      }
    }
  }
  for (; k < count; ++k) {
    const double a = std::fabs(static_cast<double>(widen(x[k * stride])));
    const double v = scaled ? a * scale : a;
    partial.sum += a;
    partial.squares += v * v;
    partial.largest = a > partial.largest ? a : partial.largest;
  }
  return partial;
}

template <class T>
double scaled_l2(const T* x, int64_t stride, int64_t count, double largest) {
  const int exponent = std::ilogb(largest);
  // 2^-exponent itself may leave the range for subnormal rows: in two steps
  const double half = std::scalbn(1.0, -exponent / 2);
  const double scale = half * std::scalbn(1.0, -exponent - (-exponent / 2));
  if (!(scale < math::kInfinity)) {
    double squares = 0.0;
    for (int64_t k = 0; k < count; ++k) {
      const double a = std::scalbn(static_cast<double>(widen(x[k * stride])), -exponent);
      squares += a * a;
    }
    return std::scalbn(std::sqrt(squares), exponent);
  }
  return std::scalbn(std::sqrt(block_norms<T, true>(x, stride, count, scale).squares), exponent);
}

template <class T, class Out>
void finish_row(const RowNorms& call, int64_t n, const T* row, Partial total) {
  const double nan = __builtin_nan("");
  const bool poisoned = total.sum != total.sum;  // absolute values: only a NaN entry makes a NaN sum
  if (call.l1) static_cast<Out*>(call.l1)[n] = static_cast<Out>(total.sum);
  if (call.linf) static_cast<Out*>(call.linf)[n] = static_cast<Out>(poisoned ? nan : total.largest);
  if (!call.l2) return;
  double l2 = std::sqrt(total.squares);
  if (poisoned) {
    l2 = nan;
  } else if (total.largest == math::kInfinity) {
    l2 = math::kInfinity;
  } else if (!math::squares_in_range<double>(total.squares) && total.largest > 0.0) {
    l2 = scaled_l2(row, call.x.column_stride, call.K, total.largest);
  }
  static_cast<Out*>(call.l2)[n] = static_cast<Out>(l2);
}

template <class T, class Out>
void all_rows(const RowNorms& call) {
  const T* x = static_cast<const T*>(call.x.data);
  const int64_t blocks = (call.K + kBlock - 1) / kBlock;
  if (blocks <= 1) {
    const int64_t rows_per_task = 1 + (int64_t{1} << 15) / (call.K + 1);
    const int64_t tasks = (call.N + rows_per_task - 1) / rows_per_task;
    parallel_for(call.threads, tasks, [&](int64_t task, int) {
      const int64_t last = (task + 1) * rows_per_task < call.N ? (task + 1) * rows_per_task : call.N;
      for (int64_t n = task * rows_per_task; n < last; ++n) {
        const T* row = x + n * call.x.row_stride;
        finish_row<T, Out>(call, n, row, block_norms<T, false>(row, call.x.column_stride, call.K, 1.0));
      }
    });
    return;
  }
  Partial* partials = reinterpret_cast<Partial*>(call.workspace);
  parallel_for(call.threads, call.N * blocks, [&](int64_t task, int) {
    const int64_t n = task / blocks, start = (task % blocks) * kBlock;
    const int64_t count = call.K - start < kBlock ? call.K - start : kBlock;
    const T* from = x + n * call.x.row_stride + start * call.x.column_stride;
    partials[task] = block_norms<T, false>(from, call.x.column_stride, count, 1.0);
  });
  for (int64_t n = 0; n < call.N; ++n) {
    Partial total;
    for (int64_t block = 0; block < blocks; ++block) {
      const Partial& part = partials[n * blocks + block];
      total.sum += part.sum;
      total.squares += part.squares;
      if (part.largest > total.largest) total.largest = part.largest;
    }
    finish_row<T, Out>(call, n, x + n * call.x.row_stride, total);
  }
}

}  // namespace

void row_norms(const RowNorms& call) {
  with_element(call.x.dtype, [&](auto* element) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(element)>>;
    if constexpr (std::is_same_v<T, double>) {
      all_rows<T, double>(call);
    } else {
      all_rows<T, float>(call);
    }
  });
}

}  // namespace FLATCORE_TARGET

#if defined(FLATCORE_TARGET_baseline)
int64_t row_norms_workspace(int64_t N, int64_t K) {
  const int64_t blocks = (K + kBlock - 1) / kBlock;
  return blocks > 1 ? 3 * N * blocks : 0;
}
#endif

}  // namespace flatcore::cpu
