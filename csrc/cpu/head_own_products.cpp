// The two products of a tile of a large head, of our own: logits W_tile phi, and the rows' sums u (scale W_tile -
// center).
//
// For what the library is slow at: it takes as long for a row as for 16, and a call of it costs as much as the product
// of a head of a few hundred classes. A row's bits depend neither on the other rows nor on the number of threads: every
// sum has one order.
//
// Who allocates: the caller; outputs are overwritten, or added to from the second tile on. Numerics: sums of at most 64
// terms a lane (logits) or in all (sums over classes) in the compute type, carried in float64. Cost: W is read once for
// 64 rows (logits) and 16 rows (sums), as it stands in memory, whatever its type; 16 multiply-adds for 8 loads.
#include <cstring>
#include <utility>

#include "cpu/head_metrics.h"
#include "cpu/head_rows.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace flatcore::cpu::FLATCORE_TARGET {
namespace {

#if defined(FLATCORE_TARGET_avx512)
constexpr int kSums = 16;  // accumulators, of 32 registers
#else
constexpr int kSums = 8;  // of 16
#endif
constexpr int64_t kCarried = 64;

// Lane i: two neighbours (i, i ^ S) of `a` added where i has no bit S, of `b` where it has.
template <int S, class V, class Index, size_t... I>
FLATCORE_INLINE V add_neighbours(V a, V b, std::index_sequence<I...>) {
  constexpr size_t lanes = sizeof...(I);
#if defined(__clang__)
  return __builtin_shufflevector(a, b, static_cast<int>((I & S) == 0 ? I : lanes + (I ^ S))...) +
         __builtin_shufflevector(a, b, static_cast<int>((I & S) == 0 ? I | S : lanes + I)...);
#else
  using Lane = std::remove_reference_t<decltype(Index{}[0])>;
  const Index low = {static_cast<Lane>((I & S) == 0 ? I : lanes + (I ^ S))...};
  const Index high = {static_cast<Lane>((I & S) == 0 ? I | S : lanes + I)...};
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
#endif
}

// Lane i of the result: the sum of the lanes of vector i, every vector's in the same order.
template <class L, int S = 1>
FLATCORE_INLINE VectorOfL<L> sums_of_lanes(VectorOfL<L>* v) {
  constexpr int lanes = VectorOf<L>::kLanes;
  if constexpr (S == lanes) {
    return v[0];
  } else {
    for (int i = 0; i < lanes / S / 2; ++i) {
      v[i] = add_neighbours<S, VectorOfL<L>, typename VectorOf<L>::Index>(v[2 * i], v[2 * i + 1],
                                                                          std::make_index_sequence<lanes>());
    }
    return sums_of_lanes<L, 2 * S>(v);
  }
}

// out[r][k]: the dot products of R rows and K classes.
template <class C, class W, int R, int K>
FLATCORE_INLINE void dot_products(const C* const (&x)[R], const W* const (&w)[K], int64_t D, C (&out)[R * K]) {
  using V = VectorOfL<C>;
  constexpr int lanes = VectorOf<C>::kLanes;
  double total[R * K] = {};
  for (int64_t start = 0; start < D; start += kCarried * lanes) {
    const int64_t end = D - start < kCarried * lanes ? D : start + kCarried * lanes;
    V sum[R * K] = {};
    int64_t d = start;
    for (; d + lanes <= end; d += lanes) {
      V row[R];
      for (int r = 0; r < R; ++r) row[r] = load_unaligned<V>(x[r] + d);
      for (int k = 0; k < K; ++k) {
        const V weight = Load<C>::from(w[k] + d);
        for (int r = 0; r < R; ++r) sum[r * K + k] += row[r] * weight;
      }
    }
    if (d < end) {
      V row[R];
      for (int r = 0; r < R; ++r) row[r] = load_some<C>(x[r] + d, end - d);
      for (int k = 0; k < K; ++k) {
        const V weight = load_some<C>(w[k] + d, end - d);
        for (int r = 0; r < R; ++r) sum[r * K + k] += row[r] * weight;
      }
    }
    for (int i = 0; i < R * K; i += lanes) {
      const V sums = sums_of_lanes<C>(sum + i);
      for (int lane = 0; lane < lanes; ++lane) total[i + lane] += static_cast<double>(sums[lane]);
    }
  }
  for (int i = 0; i < R * K; ++i) out[i] = static_cast<C>(total[i]);
}

template <class C, class W>
struct LogitTask {
  const HeadProblem& call;
  const OwnProduct& product;

  // R rows from `i` on with the classes first..last of the tile.
  template <int R>
  FLATCORE_METHOD void rows(int64_t i, int64_t first, int64_t last) const {
    constexpr int K = kSums / R;
    const C* x[R];
    for (int r = 0; r < R; ++r) x[r] = static_cast<const C*>(product.x) + (i + r) * product.x_stride;
    for (int64_t k = first; k < last; k += K) {
      const W* w[K];
      const int64_t here = last - k < K ? last - k : K;
      for (int64_t j = 0; j < K; ++j) {  // the last one again where there are no more
        const int64_t at = product.first_class + k + (j < here ? j : here - 1);
        const int64_t c = product.classes_of != nullptr ? product.classes_of[at] : at;
        w[j] = static_cast<const W*>(call.weight.data) + c * call.weight.row_stride;
      }
      C out[R * K];
      dot_products<C, W, R, K>(x, w, call.D, out);
      for (int r = 0; r < R; ++r) {
        C* z = static_cast<C*>(product.z) + (i + r) * product.z_stride + k;
        if (here == K) {
          std::memcpy(z, out + r * K, sizeof(C) * K);
        } else {
          for (int64_t j = 0; j < here; ++j) z[j] = out[r * K + j];
        }
      }
    }
  }
};

template <class C, class W>
void logits(const HeadProblem& call, const OwnProduct& product) {
  constexpr int64_t together = 64, width = 32;  // rows and classes of a task
  const int64_t across = (product.classes + width - 1) / width;
  const int64_t down = (product.rows + together - 1) / together;
  const LogitTask<C, W> task_of{call, product};
  const int threads = product.rows * product.classes * call.D < (1 << 17) ? 1 : call.threads;
  parallel_for(threads, across * down, [&](int64_t task, int) {
    const int64_t first = task % across * width,
                  last = product.classes - first < width ? product.classes : first + width;
    const int64_t top = task / across * together;
    const int64_t bottom = product.rows - top < together ? product.rows : top + together;
    int64_t i = top;
    for (; i + 4 <= bottom; i += 4) task_of.template rows<4>(i, first, last);
    if (i + 2 <= bottom) {
      task_of.template rows<2>(i, first, last);
      i += 2;
    }
    if (i < bottom) task_of.template rows<1>(i, first, last);
  });
}

constexpr int kVectors = kSums / 4;    // of columns, beside four rows
constexpr int64_t kRowsTogether = 16;  // of a task of the sums

// Adds R rows' sums over the classes first..last of the tile, in the columns from `d` on, to total[r][column].
template <class C, class W, int R, bool whole, bool centered>
FLATCORE_INLINE void sum_classes(const HeadLoop& call, const OwnProduct& product, int64_t i, int64_t first,
                                 int64_t last, int64_t d, C scale, const C* center, double* total, int64_t stride) {
  using V = VectorOfL<C>;
  constexpr int lanes = VectorOf<C>::kLanes;
  V sum[R][kVectors] = {};
  const C* u[R];
  for (int r = 0; r < R; ++r) u[r] = static_cast<const C*>(product.z) + (i + r) * product.z_stride;
  for (int64_t k = first; k < last; ++k) {
    const int64_t at = product.first_class + k;
    const int64_t c = product.classes_of != nullptr ? product.classes_of[at] : at;
    const W* w = static_cast<const W*>(call.weight.data) + c * call.weight.row_stride + d;
    V row[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const int64_t left = call.D - d - v * lanes;
      row[v] = whole || left >= lanes ? Load<C>::from(w + v * lanes) : V{};
      if (!whole && left > 0 && left < lanes) row[v] = load_some<C>(w + v * lanes, left);
      if constexpr (centered) row[v] = row[v] * scale - load_unaligned<V>(center + v * lanes);
    }
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < kVectors; ++v) sum[r][v] += row[v] * u[r][k];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      for (int lane = 0; lane < lanes; ++lane)
        total[r * stride + v * lanes + lane] += static_cast<double>(sum[r][v][lane]);
    }
  }
}

template <class C, class W, bool centered>
void sums(const HeadLoop& call, const OwnProduct& product) {
  constexpr int64_t columns = kVectors * VectorOf<C>::kLanes;
  const int64_t across = (call.D + columns - 1) / columns;
  const int64_t down = (product.rows + kRowsTogether - 1) / kRowsTogether;
  const int threads = product.rows * product.classes * call.D < (1 << 17) ? 1 : call.threads;
  const C scale = static_cast<C>(std::scalbn(1.0, static_cast<int>(call.summary[1])));
  parallel_for(threads, across * down, [&](int64_t task, int) {
    const int64_t d = task % across * columns, count = call.D - d < columns ? call.D - d : columns;
    const int64_t top = task / across * kRowsTogether;
    const int64_t bottom = product.rows - top < kRowsTogether ? product.rows : top + kRowsTogether;
    alignas(64) double total[kRowsTogether * columns] = {};
    alignas(64) C center[columns] = {};
    for (int64_t k = 0; centered && k < count; ++k) center[k] = static_cast<C>(call.center[d + k]);
    for (int64_t first = 0; first < product.classes; first += kCarried) {
      const int64_t last = product.classes - first < kCarried ? product.classes : first + kCarried;
      const auto add = [&](auto whole) {
        constexpr bool all = decltype(whole)::value;
        int64_t i = top;
        for (; i + 4 <= bottom; i += 4) {
          sum_classes<C, W, 4, all, centered>(call, product, i, first, last, d, scale, center,
                                              total + (i - top) * columns, columns);
        }
        for (; i < bottom; ++i) {
          sum_classes<C, W, 1, all, centered>(call, product, i, first, last, d, scale, center,
                                              total + (i - top) * columns, columns);
        }
      };
      if (count == columns) {
        add(std::true_type{});
      } else {
        add(std::false_type{});
      }
    }
    for (int64_t i = top; i < bottom; ++i) {
      C* mean = static_cast<C*>(call.mean) + i * call.D + d;
      const double* from = total + (i - top) * columns;
      for (int64_t k = 0; k < count; ++k) {
        mean[k] = static_cast<C>(product.first_class == 0 ? from[k] : static_cast<double>(mean[k]) + from[k]);
      }
    }
  });
}

// Calls f with null pointers of the compute type and of the weight's.
template <class F>
void with_types(const HeadProblem& call, const F& f) {
  with_element(call.weight.dtype, [&](auto* type) {
    if (call.double_compute) return f(static_cast<double*>(nullptr), type);
    if constexpr (sizeof(*type) <= sizeof(float)) f(static_cast<float*>(nullptr), type);
  });
}

}  // namespace

void head_own_logits(const HeadProblem& call, const OwnProduct& product) {
  with_types(call, [&](auto* compute, auto* type) {
    logits<ElementOf<decltype(compute)>, ElementOf<decltype(type)>>(call, product);
  });
}

void head_own_sums(const HeadLoop& call, const OwnProduct& product) {
  const bool centered = call.summary[1] != 0.0 || call.summary[2] != 0.0;
  with_types(call, [&](auto* compute, auto* type) {
    using C = ElementOf<decltype(compute)>;
    using W = ElementOf<decltype(type)>;
    if (centered) {
      sums<C, W, true>(call, product);
    } else {
      sums<C, W, false>(call, product);
    }
  });
}

}  // namespace flatcore::cpu::FLATCORE_TARGET
