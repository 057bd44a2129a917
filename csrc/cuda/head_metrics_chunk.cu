// head_metrics, large heads: what lies between the library's matrix products, for tiles of classes outside and blocks
// of rows inside.
//
// Order of calls: head_weights and the kernels of head_repeats.cu once; then for each block of rows head_loop_start,
// and for each tile of classes the library forms z = W_tile phi, head_loop_statistics merges the tile into the rows'
// running statistics and turns z into shares u, and the library adds u (W_tile - center) to the rows' sums; after the
// last tile head_loop_values (head_metrics_values.cu) finishes, and head_explicit does the rows that it marks.
// flatcore/_engine/chunked_cuda.py is the loop.
//
// Buffers: as cuda/head_metrics.h says; shares may be z itself. Does not synchronise.
// Numerics: as csrc/cpu/head_metrics_chunk.cpp: tiles merge by the monoid (csrc/math/softmax_tail.h), and where the
// best logit but one rises, all sums of the row, the product's too, are multiplied by one common factor. The
// exponentials are in float32, of exact differences, where the logits are float32 numbers as they stand (no bias to
// add, T = 1), else in float64; sums in float64. Shares in pieces: each piece is the rest rounded to W's 16-bit type,
// so that the library multiplies without widening W: two of float16 (22 bits) or three of bfloat16 (24 bits); two of
// bfloat16 would leave 1.5e-5.
// Cost: a tile's logits are read once, 16 bytes at a time, and stay in registers; shares are written once; an
// exponential a logit. A team of threads per row: a warp, 128 threads or 256, the fewest that hold a tile's row, eight
// floats each. Never run on a device yet: no figure is known.
#include <type_traits>

#include "cuda/head_metrics.h"
#include "cuda/head_rows.h"
#include "cuda/launch.h"

namespace flatcore::cuda {
namespace {

constexpr int kThreads = 256;
template <int width>
constexpr int kBlock = width == kWarp ? kThreads : width;  // several warps' rows, or one row

// The top two of some classes of a tile, by position in it.
constexpr uint32_t kNone = 0xffffffffU;
template <class V>
struct Tops {
  V t, r;
  uint32_t m, poison;
};
struct MergeTops {
  template <class V>
  __device__ __forceinline__ Tops<V> operator()(const Tops<V>& a, const Tops<V>& b) const {
    const bool b_first = b.t > a.t || (b.t == a.t && b.m < a.m);
    const V lower = b_first ? a.t : b.t;
    V r = a.r > b.r ? a.r : b.r;
    r = lower > r ? lower : r;
    return {b_first ? b.t : a.t, r, b_first ? b.m : a.m, a.poison | b.poison};
  }
};

// A lane's logits of a row, Pack<Z>::kCount side by side, and later its shares. V: float where logits are used as they
// stand, double for everything else.
template <class Z, class V, int width>
struct LaneLogits {
  static constexpr int kPack = Pack<Z>::kCount, kPacks = kHeadTileBytes / kThreads / 16, kItems = kPacks * kPack;
  V z[kItems];

  static __device__ __forceinline__ int64_t position(int item) {
    return (static_cast<int64_t>(item / kPack) * width + Team<width>::lane()) * kPack + item % kPack;
  }

  // Logits in V, -inf behind the last class; says whether one of them poisons the row.
  __device__ __forceinline__ bool load(const HeadLoop& call, const HeadTile& tile, int64_t i) {
    const bool given = call.logits.data != nullptr;
    const Z* from = tile.z != nullptr ? static_cast<const Z*>(tile.z) + i * tile.z_stride : nullptr;
    const bool whole = from != nullptr && reinterpret_cast<uintptr_t>(from) % 16 == 0;
    bool poison = false;
    FLATCORE_UNROLL
    for (int p = 0; p < kPacks; ++p) {
      const int64_t first = position(p * kPack);
      Pack<Z> pack;
      if (whole && first + kPack <= tile.classes) {
        pack = *reinterpret_cast<const Pack<Z>*>(from + first);
      } else {
        FLATCORE_UNROLL
        for (int e = 0; e < kPack; ++e) {
          const int64_t k = first + e;
          pack.items[e] = k >= tile.classes ? Z{}
                          : from != nullptr
                              ? from[k]
                              : static_cast<Z>(element(call.logits, tile.first + i, tile.first_class + k));
        }
      }
      FLATCORE_UNROLL
      for (int e = 0; e < kPack; ++e) {
        const int64_t k = first + e;
        V value = -static_cast<V>(math::kInfinity);
        if (k < tile.classes) {
          value = static_cast<V>(pack.items[e]);
          if (!given) poison |= !(value * V{} == V{});  // a product that overflowed is not a masked class
          if constexpr (sizeof(V) == 8) {
            if (!given && call.bias != nullptr) value += call.bias[tile.first_class + k];
          }
          poison |= !(value < static_cast<V>(math::kInfinity));
        }
        z[p * kPack + e] = value;
      }
    }
    return poison;
  }

  __device__ __forceinline__ Tops<V> tops(bool poison) const {
    Tops<V> tops{-static_cast<V>(math::kInfinity), -static_cast<V>(math::kInfinity), kNone, poison ? 1U : 0U};
    FLATCORE_UNROLL
    for (int item = 0; item < kItems; ++item) {
      const bool higher = z[item] > tops.t;
      const V second = z[item] > tops.r ? z[item] : tops.r;
      tops.r = higher ? tops.t : second;
      tops.m = higher ? static_cast<uint32_t>(position(item)) : tops.m;
      tops.t = higher ? z[item] : tops.t;
    }
    return tops;
  }

  // z becomes exp((z - base)/T), 0 for `skip` and for masked classes; returns the sums of them and of their squares.
  __device__ __forceinline__ Sums<2> exponentials(int64_t skip, double base, double inverse_temperature) {
    Sums<2> sums{};
    FLATCORE_UNROLL
    for (int item = 0; item < kItems; ++item) {
      const bool none = position(item) == skip || !(z[item] > -static_cast<V>(math::kInfinity));
      double u = 0.0;
      if constexpr (sizeof(V) == 4) {
        z[item] = none ? V{} : math::exp_difference_float(z[item], static_cast<float>(base));
        u = static_cast<double>(z[item]);
      } else {
        u = none ? 0.0 : math::exp_nonpositive((z[item] - base) * inverse_temperature);
        z[item] = static_cast<double>(static_cast<Z>(u));
      }
      sums.at[0] += u;
      sums.at[1] += u * u;
    }
    return sums;
  }
};

// Of the shares as they are stored: of u_j, u_j ||2^e w_j - center||^2, u_j (2^e b_j - center_b).
struct ShareSums {
  double one, square, bias;
};

// Shares that are summed and no more: of a head whose table of distances stands for W's rows.
struct NoColumns {
  __device__ __forceinline__ void add(Sums<5>& sums, int64_t, double u) const { sums.at[2] += u; }
};
// What belongs to W's rows.
struct Columns {
  const double* squares;
  const double* bias;
  double scale, bias_center;

  __device__ __forceinline__ explicit Columns(const HeadLoop& call)
      : squares(call.centered_squares),
        bias(call.include_bias ? call.bias : nullptr),
        scale(scalbn(1.0, static_cast<int>(call.summary[1]))),
        bias_center(call.center[call.D]) {}
  __device__ __forceinline__ void add(Sums<5>& sums, int64_t j, double u) const {
    if (u == 0.0) return;  // by select: the bias of a masked class is -inf
    sums.at[2] += u;
    sums.at[3] += u * squares[j];
    if (bias != nullptr) sums.at[4] += u * (bias[j] * scale - bias_center);
  }
};

// Brings the shares of equal rows together: each group's sum in its first class, or, where a number takes no more than
// `most`, in as few of its classes as that allows. A warp per group.
template <int width, class Z>
__device__ __forceinline__ void merge_repeats(const HeadLoop& call, const HeadTile& tile, double most, Z* shares) {
  using Warp = Team<kWarp>;
  const int64_t warp = Team<width>::lane() / kWarp * kWarp;
  for (int64_t start = warp; start < tile.classes; start += width) {
    const int64_t mine = start + Warp::lane();
    const int32_t length = mine < tile.classes ? call.runs[tile.first_class + mine] : 0;
    unsigned groups = __ballot_sync(kAllLanes, length > 1);
    while (groups != 0) {
      const int leader = __popc((groups & (0U - groups)) - 1U);
      groups &= groups - 1U;
      const int32_t count = __shfl_sync(kAllLanes, length, leader);
      const int64_t* members = call.order + tile.first_class + start + leader;
      Sums<1> total{};
      FLATCORE_ROLLED
      for (int32_t e = Warp::lane(); e < count; e += kWarp) total.at[0] += static_cast<double>(shares[members[e]]);
      total = Warp::merged(total, AddSums{});
      FLATCORE_ROLLED
      for (int32_t e = Warp::lane(); e < count; e += kWarp) {
        const double left = total.at[0] - e * most;
        shares[members[e]] = static_cast<Z>(left > most ? most : left > 0.0 ? left : 0.0);
      }
    }
  }
}

// Writes a lane's shares and sums them as stored. T: W's 16-bit type, or Z for shares that are not in pieces.
template <class T, class Z, class V, int width, class W>
__device__ __forceinline__ void put_shares(const HeadLoop& call, const HeadTile& tile, int64_t i,
                                           const LaneLogits<Z, V, width>& lane, const W& columns, Sums<5>& sums) {
  using Lane = LaneLogits<Z, V, width>;
  using Rounded = std::conditional_t<sizeof(T) == 8, double, float>;
  constexpr bool pieces = sizeof(T) == 2;
  struct alignas(sizeof(T) * Lane::kPack) Group {
    T items[Lane::kPack];
  };
  const int64_t padded = padded_classes(tile.classes);
  const int count = pieces ? call.pieces : 1;
  T* row = static_cast<T*>(tile.shares) + i * padded * count;
  FLATCORE_UNROLL
  for (int p = 0; p < Lane::kPacks; ++p) {
    const int64_t first = Lane::position(p * Lane::kPack);
    if (first >= padded) continue;
    const int64_t slice = pieces ? first / kPieceClasses * kPieceClasses : 0;
    const int64_t length = pieces && slice + kPieceClasses < padded ? kPieceClasses : padded - slice;
    T* to = row + slice * count + (first - slice);
    double rest[Lane::kPack];
    FLATCORE_UNROLL
    for (int e = 0; e < Lane::kPack; ++e) {
      rest[e] = static_cast<double>(lane.z[p * Lane::kPack + e]) * kPieceScale<T>;
    }
    FLATCORE_ROLLED
    for (int piece = count - 1; piece >= 0; --piece) {  // the largest comes last
      Group group;
      FLATCORE_UNROLL
      for (int e = 0; e < Lane::kPack; ++e) {
        group.items[e] = Narrowed<T>::of(static_cast<Rounded>(rest[e]));
        rest[e] -= static_cast<double>(widened(group.items[e]));
      }
      *reinterpret_cast<Group*>(to + piece * length) = group;
    }
    FLATCORE_UNROLL
    for (int e = 0; e < Lane::kPack; ++e) {
      const double stored = static_cast<double>(lane.z[p * Lane::kPack + e]) - rest[e] / kPieceScale<T>;
      columns.add(sums, tile.first_class + first + e, stored);
    }
  }
}

template <class Z, class V, int width>
__device__ __forceinline__ void put_any_shares(const HeadLoop& call, const HeadTile& tile, int64_t i,
                                               const LaneLogits<Z, V, width>& lane, const Columns& columns,
                                               Sums<5>& sums) {
  if (sizeof(Z) == 8 || call.pieces == 0) {
    put_shares<Z>(call, tile, i, lane, columns, sums);
  } else if constexpr (sizeof(Z) == 4) {
    if (call.weight.dtype == Dtype::kFloat16) {
      put_shares<Half>(call, tile, i, lane, columns, sums);
    } else {
      put_shares<BHalf>(call, tile, i, lane, columns, sums);
    }
  }
}

// A row before its first tile: a warp each.
__global__ void __launch_bounds__(kThreads, 2) loop_start(HeadLoop call, int64_t first, int64_t rows) {
  using Warp = Team<kWarp>;
  constexpr int warps = kThreads / kWarp;
  const int64_t step = static_cast<int64_t>(gridDim.x) * warps;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / kWarp; i < rows; i += step) {
    const double log_n = log_feature_squares<kWarp>(call, first + i);
    if (Warp::lane() != 0) continue;
    HeadTail& state = call.tails[(call.all_tails ? first : 0) + i];
    state = {math::empty_tail(), kNan, 0.0, 0.0, 0.0, log_n};
    if (log_n != log_n) state.tail.u1 = kNan;
  }
}

// What of W's rows is asked for: none, the library's product with them, or their table of distances.
enum class RowsOfWeight { kNone, kProduct, kTable };

template <RowsOfWeight of_weight>
constexpr int kResident = (of_weight == RowsOfWeight::kProduct ? 2 : 3) * kThreads;  // threads of a multiprocessor

template <class Z, class V, RowsOfWeight of_weight, int width>
__global__ void __launch_bounds__(kBlock<width>, kResident<of_weight> / kBlock<width>)
    loop_statistics(HeadLoop call, HeadTile tile) {
  using Group = Team<width>;
  using Lane = LaneLogits<Z, V, width>;
  constexpr int rows = kBlock<width> / width;
  constexpr bool weights = of_weight == RowsOfWeight::kProduct, table = of_weight == RowsOfWeight::kTable;
  const double inverse_temperature = 1.0 / call.temperature;
  const int64_t step = static_cast<int64_t>(gridDim.x) * rows;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * rows + threadIdx.x / width; i < tile.rows; i += step) {
    const int64_t n = tile.first + i;
    HeadTail& state = call.tails[(call.all_tails ? tile.first : 0) + i];
    const math::SoftmaxTail before = state.tail;
    Lane lane;
    const bool poison = lane.load(call, tile, i);
    if (label_of(call, n) == Label::kValid) {
      const int64_t own = call.target[n] - tile.first_class;
      FLATCORE_UNROLL
      for (int item = 0; item < Lane::kItems; ++item) {
        if (Lane::position(item) == own && own < tile.classes) state.own = static_cast<double>(lane.z[item]);
      }
    }
    const Tops<V> tops = Group::merged(lane.tops(poison), MergeTops{});
    const bool bad = tops.poison != 0 || before.u1 != before.u1;
    const math::SoftmaxTail of_tile{static_cast<double>(tops.t),
                                    tops.m == kNone ? math::kNoClass : tile.first_class + tops.m,
                                    static_cast<double>(tops.r), 0.0, 0.0};
    math::SoftmaxTail both = math::combine_tops(before, of_tile);
    const bool none = bad || both.m == math::kNoClass;
    const bool is_new = both.m != before.m;
    const double factor = before.r == both.r ? 1.0 : math::tail_scale(before.r, both.r, inverse_temperature);
    const double joins = is_new ? math::tail_scale(before.t, both.r, inverse_temperature) : 0.0;
    Sums<5> sums{};
    if (none) {  // zeros keep a poisoned row out of the product's other rows on every library
      FLATCORE_UNROLL
      for (int item = 0; item < Lane::kItems; ++item) lane.z[item] = V{};
    } else {
      const double base = both.r == -math::kInfinity ? 0.0 : both.r;
      const Sums<2> of_u = lane.exponentials(is_new ? static_cast<int64_t>(tops.m) : -1, base, inverse_temperature);
      sums.at[0] = of_u.at[0];
      sums.at[1] = of_u.at[1];
    }
    if constexpr (weights) {
      __shared__ Z together[kBlock<width> * Lane::kItems];
      if (call.found[kRepeated] != 0) {
        Z* shares = together + threadIdx.x / width * (width * Lane::kItems);
        FLATCORE_UNROLL
        for (int item = 0; item < Lane::kItems; ++item) shares[Lane::position(item)] = static_cast<Z>(lane.z[item]);
        Group::sync();  // other warps' shares are there
        const bool half = call.pieces != 0 && call.weight.dtype == Dtype::kFloat16;
        merge_repeats<width>(call, tile, half ? 1.0 : 0x1p100, shares);
        Group::sync();  // and their sums
        FLATCORE_UNROLL
        for (int item = 0; item < Lane::kItems; ++item) lane.z[item] = static_cast<V>(shares[Lane::position(item)]);
      }
      put_any_shares(call, tile, i, lane, Columns(call), sums);
    }
    if constexpr (table) put_shares<Z>(call, tile, i, lane, NoColumns{}, sums);
    if constexpr (weights || table) {
      sums = Group::merged(sums, AddSums{});
    } else {
      const Sums<2> merged = Group::merged(Sums<2>{{sums.at[0], sums.at[1]}}, AddSums{});
      sums.at[0] = merged.at[0];
      sums.at[1] = merged.at[1];
    }

    // one factor for all that the product's sums are compared with, so that its rounding does not matter
    const Z common = static_cast<Z>(factor), share = static_cast<Z>(joins);
    const bool moves = tile.first_class != 0 && !none && (common != Z{1} || share != Z{});
    if (weights && moves) {
      const double raw = piece_scale(call, call.pieces);
      const double scale = call.pieces != 0 ? raw : scalbn(1.0, static_cast<int>(call.summary[1]));
      Z* mean = static_cast<Z*>(call.mean) + i * call.D;
      for (int64_t d = Group::lane(); d < call.D; d += width) {
        Z value = mean[d] * common;
        if (share != Z{}) {  // the top class that was overtaken joins the rest
          const double center = call.pieces != 0 ? 0.0 : call.center[d];
          value += share * static_cast<Z>(element(call.weight, before.m, d) * scale - center);
        }
        mean[d] = value;
      }
    }
    Group::sync();  // every lane has read the state that the first one writes: a shuffle orders no memory
    if (Group::lane() != 0) continue;
    if (none) {
      if (bad) state.tail.u1 = kNan;
      continue;
    }
    both.u1 = before.u1 * factor + joins + sums.at[0];
    both.u2 = before.u2 * factor * factor + joins * joins + sums.at[1];
    state.tail = both;
    if (table) state.share_sum = sums.at[2];  // one tile has all classes
    if (!weights) continue;
    const double kept = static_cast<double>(common);
    Sums<5> total{{0.0, 0.0, state.share_sum * kept, state.square_sum * kept, state.bias_sum * kept}};
    if (share != Z{}) Columns(call).add(total, before.m, static_cast<double>(share));
    state.share_sum = total.at[2] + sums.at[2];
    state.square_sum = total.at[3] + sums.at[3];
    state.bias_sum = total.at[4] + sums.at[4];
  }
}

template <class Z, class V, RowsOfWeight weights>
Launched run(const HeadLoop& call, const HeadTile& tile) {
  const char* what = "head_loop_statistics";
  constexpr int64_t items = LaneLogits<Z, V, kWarp>::kItems, warps = kThreads / kWarp;
  if (tile.classes <= kWarp * items) {
    return launch(what, call.stream, grid_for((tile.rows + warps - 1) / warps), kThreads,
                  &loop_statistics<Z, V, weights, kWarp>, call, tile);
  }
  if constexpr (weights == RowsOfWeight::kTable) {
    return {"too many classes for a table", what};
  } else {
    if (tile.classes <= 128 * items) {
      return launch(what, call.stream, grid_for(tile.rows), 128, &loop_statistics<Z, V, weights, 128>, call, tile);
    }
    return launch(what, call.stream, grid_for(tile.rows), kThreads, &loop_statistics<Z, V, weights, kThreads>, call,
                  tile);
  }
}

template <RowsOfWeight weights>
Launched run(const HeadLoop& call, const HeadTile& tile) {
  if (call.double_compute) return run<double, double, weights>(call, tile);
  return used_as_they_stand(call) ? run<float, float, weights>(call, tile) : run<float, double, weights>(call, tile);
}

}  // namespace

Launched head_loop_start(const HeadLoop& call, int64_t first, int64_t rows) {
  if (rows == 0) return {};
  const DeviceGuard guard(call.device);
  if (guard.status() != cudaSuccess) return launched(guard.status(), "head_loop_start: the device");
  constexpr int64_t warps = kThreads / kWarp;
  return launch("head_loop_start", call.stream, grid_for((rows + warps - 1) / warps), kThreads, &loop_start, call,
                first, rows);
}

Launched head_loop_statistics(const HeadLoop& call, const HeadTile& tile) {
  if (tile.rows == 0) return {};
  const DeviceGuard guard(call.device);
  if (guard.status() != cudaSuccess) return launched(guard.status(), "head_loop_statistics: the device");
  if (call.distances != nullptr) return run<RowsOfWeight::kTable>(call, tile);
  return call.centered_squares != nullptr ? run<RowsOfWeight::kProduct>(call, tile)
                                          : run<RowsOfWeight::kNone>(call, tile);
}

}  // namespace flatcore::cuda
