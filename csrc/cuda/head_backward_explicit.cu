// head_metrics_backward: rows from explicit differences, where the sums over u (W - center) leave too little of what
// they were taken from.
//
// Order of launches: head_explicit finds the rows' directions; explicit_rows_classes each class's dL/dz and what it
// gives to the row's features, by slices of the classes as there; explicit_rows_features merges those; and
// explicit_rows_weight adds to W's gradient, a block for 8 rows of it, which goes through the marked rows in their
// order: no atomics, whatever the order of the blocks. No launch keeps C numbers of a row: the products of W's rows are
// formed again.
//
// Buffers: as cuda/head_metrics.h says. Does not synchronise. Two runs agree bit for bit. Numerics:
// csrc/cuda/explicit_row.h, from float64 logits. Cost: a byte per row to find the marked ones, in every block; of a
// marked row W is read four times and about 16 C D operations are done in float64. Never run on a device yet: no figure
// is known.
#include "cuda/explicit_row.h"
#include "cuda/head_backward_direction.h"
#include "cuda/launch.h"
#include "math/upstream.h"

namespace flatcore::cuda {
namespace {

constexpr int kRowGroup = 16;   // marked rows that a block adds to W's gradient at once
constexpr int kColumnPack = 4;  // columns of a thread there

// A marked row, as the kernels behind head_explicit see it.
struct MarkedRow {
  int64_t i, n, top, anchor;
  bool gradient, with_bias;
  double c, scale;
  const double* direction;
  ExplicitRow row;

  __device__ __forceinline__ MarkedRow(const HeadBackwardLoop& call, const HeadExplicit& rows, int64_t index)
      : i(index),
        n(rows.first + index),
        top(call.row_state[index].m),
        anchor(is_gradient(call) ? call.target[n] : top),
        gradient(is_gradient(call)),
        with_bias(call.include_bias && !gradient),
        c(call.numbers[index].c),
        scale(scalbn(1.0, static_cast<int>(call.summary[1]))),
        direction(found_of(rows, index)),
        row(*reinterpret_cast<const ExplicitRow*>(direction + call.D + 1)) {}
  __device__ __forceinline__ bool adds() const { return row.size > 0.0; }
};

// What a class has of a row: dL/dz, and row j of W's gradient gains along direction + apart 2^e (w_j - w_a).
struct ClassPart {
  double g, along, apart;
};
__device__ __forceinline__ ClassPart class_part(const HeadBackwardLoop& call, const MarkedRow& of, int64_t j, double z,
                                                bool differs, double square, double dot) {
  if (!of.adds() || z == -math::kInfinity) return {0.0, 0.0, 0.0};
  const double inverse_temperature = 1.0 / call.temperature, per_z = of.c * inverse_temperature;
  const double share = math::exp_nonpositive(of.row.log_share), size = of.row.size;
  const double u = differs ? math::tail_scale(z, of.row.top, inverse_temperature) : 0.0;
  const double log_p = (z - of.row.t) * inverse_temperature - of.row.log1p_tau;
  if (of.gradient) {
    if (differs) return {math::explicit_norm_cotangent(per_z, u, dot, share, size), of.c * u / size, 0.0};
    const double log_c = call.log_coefficient != nullptr ? call.log_coefficient[of.n] : 0.0;
    const double factor =
        j == of.anchor ? 0.0 : math::twin_factor(call.upstream[of.n], log_c, log_p, of.row.log_share, size);
    return {-per_z * exp(log_p), factor, 0.0};
  }
  const math::ExplicitVarianceCotangent form{per_z, share, of.row.norm2, size};
  const double per_row = 2.0 * of.c / size * of.scale;
  if (differs) return {form.other(u, square, dot), -per_row * u * share, per_row * u};
  return {form.twin(exp(log_p)), -per_row * exp(log_p), 0.0};
}
// The same of the classes whose own part is what the others leave.
__device__ __forceinline__ ClassPart settled(const MarkedRow& of, int64_t j, ClassPart part) {
  if (!of.gradient) return part;
  // a wrong label: the top class's share is all but 1 and its own term a difference of equals; the sum is 0
  if (j == of.top && of.row.top_differs != 0.0) part.g = -of.row.others;
  if (j == of.anchor) part.along = -of.row.along;
  part.along *= of.scale;
  return part;
}

__device__ __forceinline__ void put(const HeadBackwardLoop& call, void* to, int64_t at, double value) {
  if (call.double_compute) {
    static_cast<double*>(to)[at] = value;
  } else {
    static_cast<float*>(to)[at] = static_cast<float>(value);
  }
}
__device__ __forceinline__ void add(const HeadBackwardLoop& call, void* to, int64_t at, double value) {
  if (call.double_compute) {
    static_cast<double*>(to)[at] += value;
  } else {
    static_cast<float*>(to)[at] += static_cast<float>(value);
  }
}

// Sums over the classes of a slice, behind the D sums of g_j w_j.
struct PartSums {
  double others, along, top_differs;
};
struct AddParts {
  __device__ __forceinline__ PartSums operator()(const PartSums& a, const PartSums& b) const {
    return {a.others + b.others, a.along + b.along, a.top_differs + b.top_differs};
  }
};

// Classes [from, to) of a row, by a block.
template <class T>
__device__ __forceinline__ void put_parts(const HeadBackwardLoop& call, const MarkedRow& of, int64_t from, int64_t to,
                                          double* slot) {
  using Warp = Team<kWarp>;
  constexpr int kPack = PackedRows<T>::kPack, kUnroll = 4;
  __shared__ ExplicitTile tile;
  const int lane = Warp::lane();
  const PackedRows<T> weight(call.weight, call.D);
  const bool features = call.d_features != nullptr && call.logits.data == nullptr;
  PartSums sums{};
  for (int64_t base = from; base < to && of.adds(); base += kExplicitTile) {
    put_tile<T, true>(call, of.n, of.anchor, of.with_bias, of.scale, base, of.direction, tile);
    const int64_t j = base + lane;
    const bool is_class = j < to, differs = is_class && tile.differs[lane] != 0;
    ClassPart part{0.0, 0.0, 0.0};
    if (is_class) part = class_part(call, of, j, tile.z[lane], differs, tile.square[lane], tile.dot[lane]);
    const bool is_left = of.gradient && j == of.top && differs;
    const double g = is_left ? 0.0 : part.g;
    if (j != of.top) sums.others += part.g;
    if (j != of.anchor) sums.along += part.along;
    if (is_left) sums.top_differs = 1.0;
    if (is_class && threadIdx.x < kWarp && call.d_logits != nullptr) put(call, call.d_logits, of.n * call.C + j, g);
    const int live = put_live(g != 0.0, tile);
    if (threadIdx.x < kWarp) tile.factor[lane] = g;
    __syncthreads();
    for (int64_t d = static_cast<int64_t>(threadIdx.x) * kPack; d < call.D && features; d += kExplicitThreads * kPack) {
      double columns[kPack];
      FLATCORE_UNROLL
      for (int e = 0; e < kPack; ++e) columns[e] = base != from && d + e < call.D ? slot[d + e] : 0.0;
      FLATCORE_ROLLED
      for (int k = 0; k < live; k += kUnroll) {
        Pack<T> rows[kUnroll];
        FLATCORE_UNROLL
        for (int r = 0; r < kUnroll; ++r) rows[r] = weight.load(base + tile.live[k + r < live ? k + r : k], d);
        FLATCORE_UNROLL
        for (int r = 0; r < kUnroll; ++r) {
          if (k + r >= live) continue;
          const double factor = tile.factor[tile.live[k + r]];
          FLATCORE_UNROLL
          for (int e = 0; e < kPack; ++e) columns[e] += factor * static_cast<double>(widened(rows[r].items[e]));
        }
      }
      FLATCORE_UNROLL
      for (int e = 0; e < kPack; ++e) {
        if (d + e < call.D) slot[d + e] = columns[e];
      }
    }
    __syncthreads();  // the tile is written again
  }
  sums = Warp::merged(sums, AddParts{});
  if (threadIdx.x == 0) *reinterpret_cast<PartSums*>(slot + call.D + 1) = sums;
}

// What the slices of a row, `stride` slots apart, come to: its features' gradient, and what its top class and its
// anchor are left. By a block.
__device__ __forceinline__ void finish_parts(const HeadBackwardLoop& call, const HeadExplicit& rows,
                                             const MarkedRow& of, const double* slot, int64_t stride, int slices) {
  const int64_t apart = stride * head_explicit_slot(call.D);
  const int me = static_cast<int>(threadIdx.x);
  PartSums sums{};
  if (me < slices) sums = *reinterpret_cast<const PartSums*>(slot + me * apart + call.D + 1);
  sums = ExplicitBlock::merged(sums, AddParts{});
  if (me == 0) {
    auto& row = *reinterpret_cast<ExplicitRow*>(found_of(rows, of.i) + call.D + 1);
    row.others = sums.others;
    row.along = sums.along;
    row.top_differs = sums.top_differs;
    if (sums.top_differs != 0.0 && call.d_logits != nullptr) {
      put(call, call.d_logits, of.n * call.C + of.top, -sums.others);
    }
  }
  if (call.d_features == nullptr) return;
  if (!of.adds()) {  // a value of 0: no gradient, and nothing of ||phi|| either
    for (int64_t d = me; d < call.D; d += kExplicitThreads) put(call, call.d_features, of.n * call.D + d, 0.0);
    return;
  }
  if (call.logits.data != nullptr) return;
  for (int64_t d = me; d < call.D; d += kExplicitThreads) {
    double value = sums.top_differs != 0.0 ? -sums.others * element(call.weight, of.top, d) : 0.0;
    FLATCORE_ROLLED
    for (int s = 0; s < slices; ++s) value += slot[s * apart + d];
    add(call, call.d_features, of.n * call.D + d, value);
  }
}

__device__ __forceinline__ SpecialField marked_field(const HeadProblem& call) {
  return is_gradient(call) ? kSpecialGradient : kSpecialNeuronwise;
}

template <class T>
__global__ void __launch_bounds__(kExplicitThreads) explicit_rows_classes(HeadBackwardLoop call, HeadExplicit rows) {
  __shared__ int before[kExplicitThreads + 1];
  const bool alone = call.C <= kExplicitAlone;
  const RowsOfBlock of_block(rows, alone);
  for (int64_t start = of_block.first; start < rows.rows; start += of_block.step) {
    const int64_t left = rows.rows - start;
    const MarkedRows marked(rows.special + start, left < of_block.length ? left : of_block.length, marked_field(call),
                            before);
    const int64_t count = marked.count();
    if (count == 0) continue;
    const Slices slices = alone ? Slices{1, call.C} : slices_of(call.C, rows.slots, count);
    for (int64_t task = alone ? 0 : blockIdx.x; task < slices.count * count; task += alone ? 1 : gridDim.x) {
      const MarkedRow of(call, rows, start + marked.row(task % count));
      const int64_t from = task / count * slices.length, end = from + slices.length;
      double* slot = slot_of(rows, slices.count > 1 ? task : blockIdx.x);
      put_parts<T>(call, of, from, end < call.C ? end : call.C, slot);
      __syncthreads();
      if (slices.count == 1) finish_parts(call, rows, of, slot, 0, 1);
      __syncthreads();  // the slot is written again
    }
  }
}

__global__ void __launch_bounds__(kExplicitThreads) explicit_rows_features(HeadBackwardLoop call, HeadExplicit rows) {
  __shared__ int before[kExplicitThreads + 1];
  const MarkedRows marked(rows.special, rows.rows, marked_field(call), before);
  const int64_t count = marked.count();
  if (count == 0) return;
  const Slices slices = slices_of(call.C, rows.slots, count);
  for (int64_t k = blockIdx.x; k < count && slices.count > 1; k += gridDim.x) {
    const MarkedRow of(call, rows, marked.row(k));
    finish_parts(call, rows, of, slot_of(rows, k), count, static_cast<int>(slices.count));
    __syncthreads();
  }
}

// Rows of W a warp each, the marked rows 16 at a time: their parts of a class, then a thread per four columns.
template <class T>
__global__ void __launch_bounds__(kExplicitThreads) explicit_rows_weight(HeadBackwardLoop call, HeadExplicit rows) {
  using Warp = Team<kWarp>;
  __shared__ int before[kExplicitThreads + 1];
  __shared__ ClassPart parts[kRowGroup][kExplicitWarps];
  __shared__ int64_t index[kRowGroup];
  const MarkedRows marked(rows.special, rows.rows, marked_field(call), before);
  const int64_t count = marked.count();
  const int me = static_cast<int>(threadIdx.x), warp = me / kWarp;
  const bool gradient = is_gradient(call), given = call.logits.data != nullptr;
  const T* w = static_cast<const T*>(call.weight.data);
  const double scale = scalbn(1.0, static_cast<int>(call.summary[1]));
  const int64_t step = static_cast<int64_t>(gridDim.x) * kExplicitWarps;
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * kExplicitWarps; base < call.C && count > 0; base += step) {
    const int64_t j = base + warp;
    for (int64_t start = 0; start < count; start += kRowGroup) {
      const int here = count - start < kRowGroup ? static_cast<int>(count - start) : kRowGroup;
      if (me < here) index[me] = marked.row(start + me);
      __syncthreads();
      double of_bias = 0.0;
      for (int r = 0; r < here; ++r) {
        const MarkedRow of(call, rows, index[r]);
        ClassPart part{0.0, 0.0, 0.0};
        if (j < call.C && of.adds()) {
          const auto found = class_products<T, 1, true>(call, of.n, of.anchor, of.with_bias, scale, j, of.direction);
          part = class_part(call, of, j, found.z[0], found.differs[0], found.square[0], found.dot[0]);
          part = settled(of, j, part);
          if (!given) of_bias += part.g;
          if (of.with_bias) {
            of_bias += part.along * of.direction[call.D] + part.apart * ((call.bias[j] - call.bias[of.anchor]) * scale);
          }
        }
        if (Warp::lane() == 0) parts[r][warp] = part;
      }
      if (Warp::lane() == 0 && j < call.C && call.d_bias != nullptr) call.d_bias[j] += of_bias;
      __syncthreads();
      for (int64_t d = static_cast<int64_t>(threadIdx.x) * kColumnPack; d < call.D && call.d_weight != nullptr;
           d += kExplicitThreads * kColumnPack) {
        double sums[kExplicitWarps][kColumnPack] = {};
        FLATCORE_ROLLED
        for (int r = 0; r < here; ++r) {
          const int64_t n = rows.first + index[r];
          const int64_t anchor = gradient ? call.target[n] : call.row_state[index[r]].m;
          const double* direction = found_of(rows, index[r]);
          FLATCORE_UNROLL
          for (int e = 0; e < kColumnPack; ++e) {
            if (d + e >= call.D) continue;
            const int64_t column = (d + e) * call.weight.column_stride;
            const double along = direction[d + e], x = given ? 0.0 : element(call.features, n, d + e);
            const double own = static_cast<double>(widened(w[anchor * call.weight.row_stride + column]));
            FLATCORE_UNROLL
            for (int k = 0; k < kExplicitWarps; ++k) {
              const ClassPart part = parts[r][k];
              // by select: the factor may have left the range where the direction has no part
              double value = part.g * x + (along == 0.0 ? 0.0 : part.along * along);
              if (!gradient && base + k < call.C) {
                const double row = static_cast<double>(widened(w[(base + k) * call.weight.row_stride + column]));
                value += part.apart * ((row - own) * scale);
              }
              sums[k][e] += value;
            }
          }
        }
        FLATCORE_UNROLL
        for (int k = 0; k < kExplicitWarps; ++k) {
          FLATCORE_UNROLL
          for (int e = 0; e < kColumnPack; ++e) {
            if (base + k < call.C && d + e < call.D) {
              add(call, call.d_weight, (base + k) * call.D + d + e, sums[k][e]);
            }
          }
        }
      }
      __syncthreads();  // the parts are written again
    }
  }
}

template <class T>
Launched run(const HeadBackwardLoop& call, const HeadExplicit& rows) {
  Launched done = head_explicit(rows);
  const auto then = [&](const char* what, int64_t grid, auto kernel) {
    if (done.error == nullptr) done = launch(what, call.stream, grid_for(grid), kExplicitThreads, kernel, call, rows);
  };
  const bool alone = call.C <= kExplicitAlone;
  const int64_t chunks = (rows.rows + kExplicitThreads - 1) / kExplicitThreads, slots = rows.slots;
  then("head_backward_explicit: classes", alone && chunks < slots ? chunks : slots, &explicit_rows_classes<T>);
  if (!alone) {
    const int64_t half = (slots + 1) / 2;
    then("head_backward_explicit: features", rows.rows < half ? rows.rows : half, &explicit_rows_features);
  }
  if (call.d_weight != nullptr || call.d_bias != nullptr) {
    constexpr int64_t most = 512;
    const int64_t blocks = (call.C + kExplicitWarps - 1) / kExplicitWarps;
    then("head_backward_explicit: weight", blocks < most ? blocks : most, &explicit_rows_weight<T>);
  }
  return done;
}

}  // namespace

Launched head_backward_explicit(const HeadBackwardLoop& call, int64_t first, int64_t rows) {
  if (rows == 0) return {};
  const DeviceGuard guard(call.device);
  if (guard.status() != cudaSuccess) return launched(guard.status(), "head_backward_explicit: the device");
  HeadExplicit marked;
  static_cast<HeadCall&>(marked) = call;
  marked.first = first;
  marked.rows = rows;
  marked.special = call.special;
  marked.row_state = call.row_state;
  marked.summary = call.summary;
  marked.found = call.scratch;
  marked.scratch = call.scratch + rows * head_explicit_row(call.D);
  marked.slots = call.slots;
  switch (call.weight.dtype) {
    case Dtype::kFloat16:
      return run<Half>(call, marked);
    case Dtype::kBFloat16:
      return run<BHalf>(call, marked);
    case Dtype::kFloat32:
      return run<float>(call, marked);
    case Dtype::kFloat64:
      return run<double>(call, marked);
  }
  return {"unknown dtype", "head_backward_explicit"};
}

}  // namespace flatcore::cuda
