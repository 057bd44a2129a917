// What the fused kernels share: tiles of rows, their products with the packed weight, and their softmax.
#pragma once

#include <cmath>
#include <cstring>

#include "cpu/head_distances.h"
#include "cpu/head_metrics.h"
#include "cpu/head_rows.h"
#include "cpu/parallel.h"

namespace flatcore::cpu {

// Rows handled together: two AVX-512 vectors of doubles. The statistics run with rows across lanes.
constexpr int kTile = 16;

inline int64_t align(int64_t bytes) { return (bytes + 63) & ~int64_t{63}; }

}  // namespace flatcore::cpu

namespace flatcore::cpu::FLATCORE_TARGET {

#if defined(FLATCORE_TARGET_avx512)
constexpr int kRowBlock = 4;  // 4 x 5 accumulators, 4 + 5 loads for 20 multiply-adds: fits 32 registers
#else
constexpr int kRowBlock = 2;  // 2 x 5 accumulators of 16 registers
#endif
constexpr int kAhead = 8;  // rows fetched ahead, into the second-level cache: the first holds W
constexpr int kClassBlock = 5;
constexpr int64_t kVectorsPerBlock = 64;

// Adds neighbouring accumulators pairwise until one vector holds all their sums, in order; `spread` lanes still hold
// parts of one sum.
template <class C, int count, int spread>
FLATCORE_INLINE void fold(typename VectorOf<C>::Type* acc, C* sums) {
  using V = typename VectorOf<C>::Type;
  using Index = typename VectorOf<C>::Index;
  constexpr int lanes = VectorOf<C>::kLanes;
  if constexpr (spread == 1) {
#pragma GCC unroll 32
    for (int i = 0; i < count; ++i) store_unaligned(sums + i * lanes, acc[i]);
  } else {
    Index even = {}, odd = {};
    for (int lane = 0; lane < lanes; ++lane) {
      even[lane] = 2 * lane;
      odd[lane] = 2 * lane + 1;
    }
    constexpr int half = (count + 1) / 2;
#pragma GCC unroll 32
    for (int i = 0; i < half; ++i) {
      const V a = acc[2 * i];
      const V b = acc[2 * i + 1 < count ? 2 * i + 1 : 2 * i];
      acc[i] = __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
    }
    fold<C, half, spread / 2>(acc, sums);
  }
}

// Dot products of RB rows of features with CB rows of packed W over `vectors` whole vectors and perhaps a zero-padded
// tail; `norms` adds the rows' sums of squares. sums: [class][row], squares: [row]. Meanwhile `fetched` of the rows
// `next` are fetched, one after the other, as many vectors a step.
template <class C, class T, int RB, int CB, bool norms, int fetched>
FLATCORE_INLINE void dot_block(const T* const* rows, const T* const* tails, const T* const* next, int64_t vectors,
                               const C* w, int64_t w_stride, C* sums, C* squares) {
  using V = typename VectorOf<C>::Type;
  constexpr int lanes = VectorOf<C>::kLanes;
  V acc[CB > 0 ? CB * RB : 1] = {};
  V square[RB] = {};
  const auto step = [&](const T* const* from, int64_t at, int64_t w_at) __attribute__((always_inline)) {
    V x[RB];
#pragma GCC unroll 8
    for (int r = 0; r < RB; ++r) x[r] = Load<C>::from(from[r] + at);
    if constexpr (norms) {
#pragma GCC unroll 8
      for (int r = 0; r < RB; ++r) square[r] += x[r] * x[r];
    }
#pragma GCC unroll 8
    for (int c = 0; c < CB; ++c) {
      const V wc = load_unaligned<V>(w + c * w_stride + w_at);
#pragma GCC unroll 8
      for (int r = 0; r < RB; ++r) acc[c * RB + r] += x[r] * wc;
    }
  };
  if constexpr (fetched > 0) {
    // Rows are short streams (2 KiB at D = 512) that the hardware prefetcher meets too late: W1's products take 300 ns
    // a row without, 155 with rows fetched side by side, and 143 in order, where it joins in.
    // Into the second level: fetched into the first, they push W out of it (195 and 215 ns).
    const int64_t share = (vectors + fetched - 1) / fetched;
    int64_t i = 0;
    for (int row = 0; row < fetched; ++row) {
      const T* at = next[row];
      const int64_t end = (row + 1) * share < vectors ? (row + 1) * share : vectors;
      for (; i < end; ++i, at += fetched * lanes) {
#pragma GCC unroll 8
        for (int k = 0; k < fetched; ++k) __builtin_prefetch(at + k * lanes, 0, 2);
        step(rows, i * lanes, i * lanes);
      }
    }
  } else {
    for (int64_t i = 0; i < vectors; ++i) step(rows, i * lanes, i * lanes);
  }
  if (tails != nullptr) step(tails, 0, vectors * lanes);
  if constexpr (CB > 0) fold<C, CB * RB, lanes>(acc, sums);
  if constexpr (norms) fold<C, RB, lanes>(square, squares);
}

template <class C, class T, bool norms, int fetched>
FLATCORE_INLINE void dot_classes(int classes, const T* const* rows, const T* const* tails, const T* const* next,
                                 int64_t vectors, const C* w, int64_t w_stride, C* sums, C* squares) {
  const auto block = [&](auto count) __attribute__((always_inline)) {
    dot_block<C, T, kRowBlock, decltype(count)::value, norms, fetched>(rows, tails, next, vectors, w, w_stride, sums,
                                                                       squares);
  };
  switch (classes) {
    case 5:
      return block(std::integral_constant<int, 5>{});
    case 4:
      return block(std::integral_constant<int, 4>{});
    case 3:
      return block(std::integral_constant<int, 3>{});
    case 2:
      return block(std::integral_constant<int, 2>{});
    case 1:
      return block(std::integral_constant<int, 1>{});
    default:
      return block(std::integral_constant<int, 0>{});
  }
}

// A thread's buffers for a tile.
struct TileBuffers {
  double* z;     // (C, kTile) logits before the division by T
  double* u;     // (C, kTile) exp((z_j - r)/T), 0 for the top class
  void* packed;  // (kTile, D) rows whose elements are not adjacent
  void* tails;   // (kTile, lanes) zero-padded ends of rows
};

struct TileRows {
  int64_t first;
  int count;
  bool bad[kTile];
  double log_n[kTile];  // log ||phi||^2
};

// Logits (unless given) and log ||phi||^2 of a tile; with `narrow`, (C, kTile), the logits go there in float.
template <class C, class T>
void tile_products(const HeadProblem& call, const C* packed_w, int64_t packed_stride, const TileBuffers& buffers,
                   TileRows& tile, float* narrow = nullptr) {
  constexpr int lanes = VectorOf<C>::kLanes;
  const T* x = static_cast<const T*>(call.features.data);
  const T* rows[kTile];
  const T* tails[kTile];
  const int64_t whole = call.D / lanes;
  const int64_t rest = call.D - whole * lanes;
  T* packed = static_cast<T*>(buffers.packed);
  T* ends = static_cast<T*>(buffers.tails);
  for (int i = 0; i < kTile; ++i) {
    // lanes past the end repeat the last row; their results are not written
    const int64_t n = tile.first + (i < tile.count ? i : tile.count - 1);
    rows[i] = x + n * call.features.row_stride;
    if (call.features.column_stride != 1) {
      T* to = packed + i * call.D;
      for (int64_t d = 0; d < call.D; ++d) to[d] = rows[i][d * call.features.column_stride];
      rows[i] = to;
    }
    if (rest > 0) {
      T* to = ends + i * lanes;
      std::memset(static_cast<void*>(to), 0, lanes * sizeof(T));
      std::memcpy(static_cast<void*>(to), rows[i] + whole * lanes, static_cast<size_t>(rest) * sizeof(T));
      tails[i] = to;
    }
  }
  const bool products = call.logits.data == nullptr;
  double squares[kTile] = {};
  const bool straight = narrow != nullptr && whole <= kVectorsPerBlock;
  if (products && !straight) std::memset(buffers.z, 0, static_cast<size_t>(call.C) * kTile * sizeof(double));
  for (int64_t start = 0; start < whole || start == 0; start += kVectorsPerBlock) {
    const int64_t vectors = whole - start < kVectorsPerBlock ? whole - start : kVectorsPerBlock;
    const bool last = start + vectors == whole;
    for (int i = 0; i < kTile; i += kRowBlock) {
      const T* from[kRowBlock];
      const T* next[kRowBlock];  // what is read after this block; behind the last row a harmless hint
      for (int r = 0; r < kRowBlock; ++r) {
        from[r] = rows[i + r] + start * lanes;
        const int64_t n = tile.first + i + r + kAhead < call.N ? tile.first + i + r + kAhead : call.N - 1;
        next[r] = x + n * call.features.row_stride + start * lanes;
      }
      const T* const* ends_of_block = last && rest > 0 ? tails + i : nullptr;
      C sums[kClassBlock * kRowBlock + 2 * lanes] = {};
      C row_squares[kRowBlock + lanes] = {};
      int64_t c = 0;
      do {
        const int64_t left = products ? call.C - c : 0;
        const int classes = static_cast<int>(left < kClassBlock ? left : kClassBlock);
        const C* w = packed_w + c * packed_stride + start * lanes;
        // fetched in the first two blocks of classes, if there are two
        constexpr int half = kRowBlock / 2;
        if (c == 0) {
          if (left > kClassBlock) {
            dot_block<C, T, kRowBlock, kClassBlock, true, half>(from, ends_of_block, next, vectors, w, packed_stride,
                                                                sums, row_squares);
          } else {
            dot_classes<C, T, true, kRowBlock>(classes, from, ends_of_block, next, vectors, w, packed_stride, sums,
                                               row_squares);
          }
          for (int r = 0; r < kRowBlock; ++r) squares[i + r] += static_cast<double>(row_squares[r]);
        } else {
          if (c == kClassBlock) {
            dot_classes<C, T, false, half>(classes, from, ends_of_block, next + half, vectors, w, packed_stride, sums,
                                           row_squares);
          } else {
            dot_classes<C, T, false, 0>(classes, from, ends_of_block, next, vectors, w, packed_stride, sums,
                                        row_squares);
          }
        }
        for (int j = 0; j < classes && straight; ++j) {
          float* to = narrow + (c + j) * kTile + i;
#pragma GCC unroll 4
          for (int r = 0; r < kRowBlock; ++r) to[r] = static_cast<float>(sums[j * kRowBlock + r]);
        }
        for (int j = 0; j < classes && !straight; ++j) {
          double* to = buffers.z + (c + j) * kTile + i;
          for (int r = 0; r < kRowBlock; ++r) to[r] += static_cast<double>(sums[j * kRowBlock + r]);
        }
        c += kClassBlock;
      } while (products && c < call.C);
    }
  }
  if (products && narrow != nullptr && !straight) {
    for (int64_t j = 0; j < call.C * kTile; ++j) narrow[j] = static_cast<float>(buffers.z[j]);
  }
  for (int i = 0; i < tile.count; ++i) {
    tile.log_n[i] = math::squares_in_range<C>(squares[i]) ? 0.0 : log_sum_squares(rows[i], 1, call.D);
  }
  for (int i = 0; i < kTile; i += kDoubles) {
    const DoubleV logs = math::log_nonnegative(load_unaligned<DoubleV>(squares + i));
    for (int lane = 0; lane < kDoubles; ++lane) {
      if (math::squares_in_range<C>(squares[i + lane])) tile.log_n[i + lane] = logs[lane];
    }
  }
  for (int i = 0; i < kTile; ++i) tile.bad[i] = tile.log_n[i] != tile.log_n[i];
}

template <class Z>
void tile_given_logits(const HeadProblem& call, Z* z, const TileRows& tile) {
  with_element(call.logits.dtype, [&](auto* type) {
    using T = ElementOf<decltype(type)>;
    const T* logits = static_cast<const T*>(call.logits.data);
    for (int i = 0; i < kTile; ++i) {
      const int64_t n = tile.first + (i < tile.count ? i : tile.count - 1);
      const T* from = logits + n * call.logits.row_stride;
      for (int64_t j = 0; j < call.C; ++j) {
        z[j * kTile + i] = static_cast<Z>(widen(from[j * call.logits.column_stride]));
      }
    }
  });
}

// The softmax of a tile, rows across lanes: u_j = exp((z_j - r)/T), 0 for the top class, and what is made of its sums.
struct TileSoftmax {
  alignas(64) double t[kTile], m[kTile], r[kTile], u1[kTile], u2[kTile];
  alignas(64) double margin[kTile], confidence[kTile], eps[kTile], log_eps[kTile], log1p_tau[kTile],
      log_one_minus_sum_p2[kTile];
};
inline void tile_softmax(const HeadProblem& call, const TileBuffers& buffers, TileRows& tile, TileSoftmax& s) {
  const int64_t C = call.C;
  const bool given = call.logits.data != nullptr;
  const double inverse_temperature = 1.0 / call.temperature;
  for (int v = 0; v < kTile; v += kDoubles) {
    DoubleV top = DoubleV{} - math::kInfinity, rest = top, index = DoubleV{} - 1.0, poison = {};
    for (int64_t j = 0; j < C; ++j) {
      DoubleV z = load_unaligned<DoubleV>(buffers.z + j * kTile + v);
      if (!given) {
        poison += z * 0.0;  // NaN if the product is not finite: an overflow is not a masked class
        if (call.bias != nullptr) {
          z += call.bias[j];
          store_unaligned(buffers.z + j * kTile + v, z);
        }
      }
      poison = z < math::kInfinity ? poison : DoubleV{} + kNan;
      const auto higher = z > top;
      const DoubleV second = z > rest ? z : rest;
      rest = higher ? top : second;
      index = higher ? DoubleV{} + static_cast<double>(j) : index;
      top = higher ? z : top;
    }
    poison = top == -math::kInfinity ? DoubleV{} + kNan : poison;
    const DoubleV base = rest == -math::kInfinity ? DoubleV{} : rest;
    DoubleV sum = {}, squares = {};
    for (int64_t j = 0; j < C; ++j) {
      const DoubleV z = load_unaligned<DoubleV>(buffers.z + j * kTile + v);
      const DoubleV e = math::exp_nonpositive((z - base) * inverse_temperature);
      const DoubleV uj = index == static_cast<double>(j) ? DoubleV{} : e;
      store_unaligned(buffers.u + j * kTile + v, uj);
      sum += uj;
      squares += uj * uj;
    }
    const auto split = math::epsilon_split<DoubleV>(top, rest, sum, squares, inverse_temperature);
    store_unaligned(s.t + v, top);
    store_unaligned(s.r + v, rest);
    store_unaligned(s.m + v, index);
    store_unaligned(s.u1 + v, sum);
    store_unaligned(s.u2 + v, squares);
    store_unaligned(s.margin + v, split.margin);
    store_unaligned(s.confidence + v, split.confidence);
    store_unaligned(s.eps + v, split.eps);
    store_unaligned(s.log_eps + v, split.log_eps);
    store_unaligned(s.log1p_tau + v, split.log1p_tau);
    store_unaligned(s.log_one_minus_sum_p2 + v, split.log_one_minus_sum_p2);
    for (int lane = 0; lane < kDoubles; ++lane) tile.bad[v + lane] |= poison[lane] != poison[lane];
  }
}

// s_j = sum_k D_jk u_k for all classes j and the rows of a tile, every term >= 0.
inline void tile_mean_distances(const double* distances, int64_t C, const double* u, double* s) {
  constexpr int kJ = 4;
  constexpr int kV = kTile / kDoubles < 2 ? 1 : 2;
  for (int v = 0; v < kTile; v += kV * kDoubles) {
    int64_t j = 0;
    for (; j + kJ <= C; j += kJ) {
      DoubleV acc[kJ][kV] = {};
      for (int64_t k = 0; k < C; ++k) {
        DoubleV uk[kV];
#pragma GCC unroll 2
        for (int i = 0; i < kV; ++i) uk[i] = load_unaligned<DoubleV>(u + k * kTile + v + i * kDoubles);
#pragma GCC unroll 4
        for (int a = 0; a < kJ; ++a) {
          const double d = distances[(j + a) * C + k];
#pragma GCC unroll 2
          for (int i = 0; i < kV; ++i) acc[a][i] += uk[i] * d;
        }
      }
      for (int a = 0; a < kJ; ++a) {
        for (int i = 0; i < kV; ++i) store_unaligned(s + (j + a) * kTile + v + i * kDoubles, acc[a][i]);
      }
    }
    for (; j < C; ++j) {
      DoubleV acc[kV] = {};
      for (int64_t k = 0; k < C; ++k) {
        for (int i = 0; i < kV; ++i) {
          acc[i] += load_unaligned<DoubleV>(u + k * kTile + v + i * kDoubles) * distances[j * C + k];
        }
      }
      for (int i = 0; i < kV; ++i) store_unaligned(s + j * kTile + v + i * kDoubles, acc[i]);
    }
  }
}

template <class C, class T>
void pack_rows(const HeadProblem& call, int64_t packed_stride, C* packed, double* largest_of_row) {
  const T* w = static_cast<const T*>(call.weight.data);
  parallel_for(call.C * call.D < (1 << 16) ? 1 : call.threads, call.C, [&](int64_t j, int) {
    const T* from = w + j * call.weight.row_stride;
    C* to = packed + j * packed_stride;
    double largest = 0.0;
    int64_t d = 0;
    if (call.weight.column_stride == 1) {
      // W is packed once a call: with the maximum taken one element after the other that alone is 10 us at 10 x 512
      constexpr int lanes = VectorOf<C>::kLanes;
      typename VectorOf<C>::Type most = {};
      for (; d + lanes <= call.D; d += lanes) {
        const auto x = Load<C>::from(from + d);
        store_unaligned(to + d, x);
        most = magnitude(x) > most ? magnitude(x) : most;  // a NaN is not larger
      }
      for (int lane = 0; lane < lanes; ++lane) {
        const double a = static_cast<double>(most[lane]);
        largest = a > largest ? a : largest;
      }
    }
    for (; d < call.D; ++d) {
      to[d] = static_cast<C>(widen(from[d * call.weight.column_stride]));
      const double a = std::fabs(static_cast<double>(to[d]));
      largest = a > largest ? a : largest;
    }
    for (; d < packed_stride; ++d) to[d] = C{};
    largest_of_row[j] = largest;
  });
}

// The tables of squared distances between the rows of packed W, times scale^2: without the bias as a column, and with
// it (null: not wanted).
template <class C>
void distance_tables(const HeadProblem& call, const C* packed, int64_t packed_stride, double scale, double* table,
                     double* with_bias) {
  constexpr int64_t rows = 8;
  const int threads = call.C * call.C * call.D < (1 << 18) ? 1 : call.threads;
  parallel_for(threads, (call.C + rows - 1) / rows, [&](int64_t task, int) {
    const int64_t last = (task + 1) * rows < call.C ? (task + 1) * rows : call.C;
    distance_rows<double, C>(packed, packed_stride, call.C, packed_stride, scale, task * rows, last, table);
  });
  if (with_bias == nullptr) return;
  for (int64_t j = 0; j < call.C; ++j) {
    for (int64_t k = 0; k < call.C; ++k) {
      const double difference = (call.bias[j] - call.bias[k]) * scale;
      with_bias[j * call.C + k] = table[j * call.C + k] + difference * difference;
    }
  }
}

// W in the compute type, rows padded with zeros to whole cache lines; returns e of scaling_exponent.
template <class C>
int pack_weight(const HeadProblem& call, int64_t packed_stride, C* packed, double* largest_of_row) {
  with_element(call.weight.dtype, [&](auto* type) {
    using T = ElementOf<decltype(type)>;
    if constexpr (sizeof(T) <= sizeof(C)) pack_rows<C, T>(call, packed_stride, packed, largest_of_row);
  });
  double largest = 0.0;
  for (int64_t j = 0; j < call.C; ++j) largest = largest_of_row[j] > largest ? largest_of_row[j] : largest;
  if (call.include_bias) {
    for (int64_t j = 0; j < call.C; ++j) {
      const double a = std::fabs(call.bias[j]);
      if (a > largest && a < math::kInfinity) largest = a;
    }
  }
  return scaling_exponent(largest, true);
}

// ||scale W||_F^2, with the bias as a column if it counts as one.
template <class C>
double sum_of_squares(const HeadProblem& call, const C* packed, int64_t packed_stride, double scale) {
  double total = 0.0;
  for (int64_t j = 0; j < call.C; ++j) {
    const C* w = packed + j * packed_stride;
    DoubleV sum = {};
    for (int64_t d = 0; d < packed_stride; d += kDoubles) {
      const DoubleV x = Load<double>::from(w + d) * scale;
      sum += x * x;
    }
    total += sum_lanes(sum);
    if (call.include_bias) total += call.bias[j] * scale * (call.bias[j] * scale);
  }
  return total;
}

}  // namespace flatcore::cpu::FLATCORE_TARGET
