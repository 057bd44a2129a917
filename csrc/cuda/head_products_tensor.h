// The same products on tensor cores, of 16-bit features: all 32 rows of a warp at once; included by .cu files only.
//
// What is exact: a product of a feature and a piece of W (8 bits by 8 of bfloat16, 11 by 11 of tf32). What is not: a
// tensor core lines up the terms of a sum by the largest, the sum so far among them, and cuts off what lies below the
// last bits it keeps, at least 24 and in what is known of 8.0 and 9.0 two more. One sum over D in its accumulator would
// lose up to 17 terms of 2^-25 of the sum so far, and 2^-23 of it, in every 16 columns, all of one sign: emulated, 300
// units of 2^-24 of sum |phi w| at D = 4,096, where docs/mathematics.md promises 132 a logit. So an accumulator sees 16
// columns (8 of tf32): its pieces from the smallest to the largest, then the sum goes into a float that is rounded, and
// those of 512 columns into a double. That leaves, in the same units: 17 cut terms of at most 1/2 each in the largest
// piece's step (8.5; the smaller pieces' steps 2^-8 of it), 2 where the result is cut to a float, and in the float at
// most 32 roundings of one sum that grows, 16 (tf32: 64, 32, with 4.5 for 9 cut terms): 27 at most (tf32 39), 4 as a
// rule, where a logit may be off by 2 sqrt(D) + 4, 49 at D = 512. One step alone (D <= 16) has D cut terms and at most
// one rounding more: D/2 + 3 at most against 2 sqrt(D) + 4. Were no bit kept beyond the 24, the 8.5 would be 34.
// ||phi||^2 comes from the same registers, in floats: 128 terms a lane between two doubles.
#pragma once

#include "cuda/head_metrics.h"
#include "cuda/head_pieces.h"
#include "cuda/head_products.h"
#include "cuda/since_80.h"

namespace flatcore::cuda {
namespace {

// Eight features side by side, in words as a tensor core takes them.
template <class T>
struct Words;
template <>
struct Words<BHalf> {
  static constexpr int kCount = 4;
  uint32_t at[kCount];
  __device__ __forceinline__ explicit Words(const Pack<uint32_t>& x)
      : at{x.items[0], x.items[1], x.items[2], x.items[3]} {}
  __device__ __forceinline__ float value(int e) const {
    return math::bit_cast<float>(e % 2 == 0 ? at[e / 2] << 16 : at[e / 2] & 0xffff0000U);
  }
};
template <>
struct Words<Half> {
  static constexpr int kCount = 8;
  uint32_t at[kCount];
  __device__ __forceinline__ explicit Words(const Pack<uint32_t>& x) {
    FLATCORE_UNROLL
    for (int e = 0; e < kCount; ++e) {
      const uint32_t word = x.items[e / 2];
      at[e] = math::bit_cast<uint32_t>(widened(Half{static_cast<uint16_t>(e % 2 == 0 ? word : word >> 16)}));
    }
  }
  __device__ __forceinline__ float value(int e) const { return math::bit_cast<float>(at[e]); }
};

// The next of eight features that are read one by one; in a loop that is not unrolled it costs no registers.
template <class T>
__device__ __forceinline__ void push(Pack<uint32_t>& x, T next) {
  FLATCORE_UNROLL
  for (int i = 0; i < 3; ++i) x.items[i] = x.items[i] >> 16 | x.items[i + 1] << 16;
  x.items[3] = x.items[3] >> 16 | static_cast<uint32_t>(next.bits) << 16;
}

constexpr int64_t kFloatColumns = 512;  // summed in floats

// Rows first..first+31 with all classes: logits (class, row) and the rows' sums of squares.
template <class T, int groups, int count>
__device__ __forceinline__ void tensor_products(const HeadMetrics& call, int64_t first, double (*logits)[kWarp],
                                                double* squares) {
  using Piece = typename PieceOf<T>::type;
  constexpr int words = Words<T>::kCount;
  constexpr Pieces<Piece> pieces{groups, count};
  // blocks of columns read together, 2 KiB a warp each: where the registers do, two
  constexpr int halves = sizeof(Piece) == 4 && count == 3 && groups > 1 ? 1 : 2;
  const int lane = Team<kWarp>::lane(), row = lane / 4, part = lane % 4;
  const T* rows[4];  // row, row + 8, row + 16, row + 24
  bool whole = call.features.column_stride == 1;
  FLATCORE_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int64_t n = first + row + 8 * i < call.N ? first + row + 8 * i : call.N - 1;  // behind the last: not written
    rows[i] = static_cast<const T*>(call.features.data) + n * call.features.row_stride;
    whole = whole && reinterpret_cast<uintptr_t>(rows[i]) % 16 == 0;
  }
  whole = __any_sync(kAllLanes, !whole) == 0;
  const Piece* packed = static_cast<const Piece*>(call.packed);
  const float* factors = reinterpret_cast<const float*>(packed + pieces.end(call.packed_stride));
  for (int64_t start = 0; start == 0 || start < call.D; start += kFloatColumns) {
    const int64_t end = start + kFloatColumns < call.D ? start + kFloatColumns : call.D;
    float sums[4][groups][4] = {}, square[4] = {};
    FLATCORE_ROLLED
    for (int64_t at = start; at < end; at += halves * kBlockColumns) {
      Pack<uint32_t> x[halves][4];
      FLATCORE_UNROLL
      for (int half = 0; half < halves; ++half) {
        const int64_t d = at + half * kBlockColumns + part * 8;
        if (whole && d + 8 <= call.D) {
          FLATCORE_UNROLL
          for (int i = 0; i < 4; ++i) x[half][i] = *reinterpret_cast<const Pack<uint32_t>*>(rows[i] + d);
        } else {
          FLATCORE_UNROLL
          for (int i = 0; i < 4; ++i) x[half][i] = {};
          FLATCORE_ROLLED
          for (int64_t e = d; e < d + 8; ++e) {
            FLATCORE_UNROLL
            for (int i = 0; i < 4; ++i) push(x[half][i], e < call.D ? rows[i][e * call.features.column_stride] : T{0});
          }
        }
      }
      Team<kWarp>::sync();
      FLATCORE_UNROLL
      for (int half = 0; half < halves; ++half) {
        const Words<T> features[4] = {Words<T>(x[half][0]), Words<T>(x[half][1]), Words<T>(x[half][2]),
                                      Words<T>(x[half][3])};
        FLATCORE_UNROLL
        for (int i = 0; i < 4; ++i) {
          FLATCORE_UNROLL
          for (int e = 0; e < 8; ++e) square[i] += features[i].value(e) * features[i].value(e);
        }
        const Piece* block = packed + pieces.place(0, at + half * kBlockColumns, 0);
        FLATCORE_UNROLL
        for (int group = 0; group < groups; ++group) {
          FLATCORE_UNROLL
          for (int k = 0; k < words; k += 2) {
            Pack<uint32_t> w[count];
            FLATCORE_UNROLL
            for (int piece = 0; piece < count; ++piece) {
              w[piece] =
                  reinterpret_cast<const Pack<uint32_t>*>(block + (group * count + piece) * kBlockSize)[k * 16 + lane];
            }
            FLATCORE_UNROLL
            for (int i = 0; i < 4; ++i) {
              const uint32_t x_words[2] = {features[i].at[k], features[i].at[k + 1]};
              float sum[4] = {};
              FLATCORE_UNROLL
              for (int piece = count - 1; piece >= 0; --piece) {
                const float before[4] = {sum[0], sum[1], sum[2], sum[3]};
                multiply_add<Piece>(sum, w[piece].items, x_words, before);
              }
              FLATCORE_UNROLL
              for (int e = 0; e < 4; ++e) sums[i][group][e] += sum[e];
            }
          }
        }
      }
    }
    FLATCORE_UNROLL
    for (int i = 0; i < 4; ++i) {
      square[i] += __shfl_xor_sync(kAllLanes, square[i], 1);
      square[i] += __shfl_xor_sync(kAllLanes, square[i], 2);
      double& total = squares[row + 8 * i];
      if (part == 0) total = static_cast<double>(square[i]) + (start == 0 ? 0.0 : total);
    }
    FLATCORE_UNROLL
    for (int group = 0; group < groups; ++group) {
      FLATCORE_UNROLL
      for (int upper = 0; upper < 2; ++upper) {
        const int j = group * kBlockClasses + upper * 8 + row;
        if (j >= call.C) continue;
        const double factor = call.D > 0 ? static_cast<double>(factors[j]) : 1.0;
        FLATCORE_UNROLL
        for (int i = 0; i < 4; ++i) {
          FLATCORE_UNROLL
          for (int e = 0; e < 2; ++e) {
            double& total = logits[j][8 * i + 2 * part + e];
            total = static_cast<double>(sums[i][group][2 * upper + e]) * factor + (start == 0 ? 0.0 : total);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace flatcore::cuda
