// head_explicit: the marked rows' neuronwise flatness and gradient norms, from float64 logits and differences of rows;
// for the gradient (head_backward_explicit.cu) what it needs of them.
//
// Two launches: slices of the rows' classes over the grid, and a merge of each row's slices in their order. Of heads of
// at most 256 classes, and where more rows are marked than there are slots, a block does a row by itself.
//
// Buffers: as cuda/head_metrics.h says. Does not synchronise; two runs agree bit for bit. In how many slices a row
// comes depends on how many rows are marked, and its last digits with it. Numerics: csrc/cuda/explicit_row.h; the
// spread of the w_j about their mean is summed as differences to the mean so far, every term >= 0.
// Cost: a byte per row to find them, in every block; a marked row reads W once for the logits and once more, a tile of
// 32 rows later, from a cache, for the classes that have a share; 7 C D operations in float64 and 2 C D conversions to
// it. Never run on a device yet: no figure is known.
#include "cuda/explicit_row.h"
#include "cuda/launch.h"

namespace flatcore::cuda {
namespace {

// Which row, and what of it is asked for: its anchor, and whether the bias counts as a column of W.
struct Entry {
  int64_t i, n, anchor;
  bool gradient, with_bias;
};
__device__ __forceinline__ Entry entry_of(const HeadExplicit& call, int64_t i, bool gradient) {
  const int64_t n = call.first + i;
  const int64_t top = call.row_state != nullptr ? call.row_state[i].m : call.prediction[n];
  return {i, n, gradient ? call.target[n] : top, gradient, call.include_bias && !gradient};
}

// How a class, or a slice, joins those before it, whose total is `before`: for neuronwise the spread about the mean
// gains weight (w - mean)^2. The mean is what the sum is over the total, as accurate as the sum however far away the
// first classes lie; one that moves by differences would keep the roundings of those.
struct Joins {
  double share, weight, inverse;  // share before/(before + share); 1/before

  __device__ __forceinline__ Joins(double u, double before)
      : share(u),
        weight(before > 0.0 && u > 0.0 ? u * (before / (before + u)) : 0.0),
        inverse(before > 0.0 ? 1.0 / before : 0.0) {}
};
// The sum over the classes of u_j (w_j - w_a) in a column, and the spread.
__device__ __forceinline__ void add_apart(bool gradient, double apart, double u, double weight, double inverse,
                                          double& value, double& spread) {
  if (!gradient) {
    const double moved = apart - value * inverse;
    spread += weight * moved * moved;
  }
  value += u * apart;
}

// Classes [from, to) of a row, by a block.
template <class T>
__device__ __forceinline__ void put_slice(const HeadExplicit& call, const Entry& entry, int64_t from, int64_t to,
                                          double* slot) {
  using Warp = Team<kWarp>;
  constexpr int kPack = PackedRows<T>::kPack, kUnroll = 4;  // rows whose loads are in flight
  __shared__ ExplicitTile tile;
  const int lane = Warp::lane();
  const bool first_warp = threadIdx.x < kWarp;
  const double inverse_temperature = 1.0 / call.temperature;
  const double scale = scalbn(1.0, static_cast<int>(call.summary[1]));
  const PackedRows<T> weight(call.weight, call.D);
  SliceState state{math::empty_tail(), -math::kInfinity, 0.0, -math::kInfinity, 0.0, 0.0};
  double spread = 0.0;  // of this thread's columns
  for (int64_t base = from; base < to; base += kExplicitTile) {
    put_tile<T, false>(call, entry.n, entry.anchor, entry.with_bias, scale, base, nullptr, tile);
    // a class of each lane, in all warps alike
    const bool is_class = base + lane < to, differs = is_class && tile.differs[lane] != 0, same = is_class && !differs;
    const double z = is_class ? tile.z[lane] : -math::kInfinity;
    math::SoftmaxTail tail =
        Warp::merged(math::leaf_tail(base + lane, z),
                     [](const math::SoftmaxTail& a, const math::SoftmaxTail& b) { return math::combine_tops(a, b); });
    const double rest = base + lane == tail.m ? 0.0 : math::tail_scale(z, tail.r, inverse_temperature);
    const double top = LargerOf{}(state.top, Warp::merged(differs ? z : -math::kInfinity, LargerOf{}));
    const double group_top = LargerOf{}(state.group_top, Warp::merged(same ? z : -math::kInfinity, LargerOf{}));
    const double moves = state.top == top ? 1.0 : math::tail_scale(state.top, top, inverse_temperature);
    const double group_moves =
        state.group_top == group_top ? 1.0 : math::tail_scale(state.group_top, group_top, inverse_temperature);
    const double u = differs ? math::tail_scale(z, top, inverse_temperature) : 0.0;
    const double in_group = same ? math::tail_scale(z, group_top, inverse_temperature) : 0.0;
    const Sums<3> sums = Warp::merged(Sums<3>{{rest, rest * rest, in_group}}, AddSums{});
    tail.u1 = sums.at[0];
    tail.u2 = sums.at[1];
    state.tail = math::combine(state.tail, tail, inverse_temperature);
    state.top = top;
    state.group_top = group_top;
    state.group = state.group * group_moves + sums.at[2];
    const bool counts = math::explicit_share_counts(u);
    const int live = put_live(counts, tile);
    if (first_warp) tile.factor[lane] = u;
    __syncthreads();
    double running = state.total * moves, before = running;
    FLATCORE_ROLLED
    for (int k = 0; k < kExplicitTile; ++k) {
      if (k == lane) before = running;
      running += tile.factor[k];
    }
    state.total = running;
    if (first_warp) {
      const Joins joins(u, before);
      tile.weight[lane] = joins.weight;
      tile.inverse[lane] = joins.inverse;
    }
    __syncthreads();
    spread *= moves;
    for (int64_t d = static_cast<int64_t>(threadIdx.x) * kPack; d < call.D; d += kExplicitThreads * kPack) {
      const Pack<T> own = weight.load(entry.anchor, d);
      double columns[kPack];
      FLATCORE_UNROLL
      for (int e = 0; e < kPack; ++e) {
        columns[e] = base != from && d + e < call.D ? slot[d + e] * moves : 0.0;
      }
      FLATCORE_ROLLED
      for (int k = 0; k < live; k += kUnroll) {
        Pack<T> rows[kUnroll];
        FLATCORE_UNROLL
        for (int r = 0; r < kUnroll; ++r) {
          rows[r] = weight.load(base + tile.live[k + r < live ? k + r : k], d);
        }
        FLATCORE_UNROLL
        for (int r = 0; r < kUnroll; ++r) {
          if (k + r >= live) continue;
          const int at = tile.live[k + r];
          const double u_at = tile.factor[at], weight_at = tile.weight[at], inverse = tile.inverse[at];
          FLATCORE_UNROLL
          for (int e = 0; e < kPack; ++e) {
            const double apart =
                (static_cast<double>(widened(rows[r].items[e])) - static_cast<double>(widened(own.items[e]))) * scale;
            add_apart(entry.gradient, apart, u_at, weight_at, inverse, columns[e], spread);
          }
        }
      }
      FLATCORE_UNROLL
      for (int e = 0; e < kPack; ++e) {
        if (d + e < call.D) slot[d + e] = columns[e];
      }
    }
    if (entry.with_bias && threadIdx.x == 0) {  // the last column
      double value = base != from ? slot[call.D] * moves : 0.0;
      for (int k = 0; k < live; ++k) {
        const int at = tile.live[k];
        const double apart = (call.bias[base + at] - call.bias[entry.anchor]) * scale;
        add_apart(false, apart, tile.factor[at], tile.weight[at], tile.inverse[at], value, spread);
      }
      slot[call.D] = value;
    }
    __syncthreads();  // the tile is written again
  }
  state.spread = ExplicitBlock::merged(Sums<1>{{spread}}, AddSums{}).at[0];
  if (threadIdx.x == 0) *reinterpret_cast<SliceState*>(slot + call.D + 1) = state;
}

struct RowNorms {
  double spread, norm1, norm2_squared, norm_inf;
};
struct MergeRowNorms {
  __device__ __forceinline__ RowNorms operator()(const RowNorms& a, const RowNorms& b) const {
    return {a.spread + b.spread, a.norm1 + b.norm1, a.norm2_squared + b.norm2_squared,
            LargerOf{}(a.norm_inf, b.norm_inf)};
  }
};

// What the slices of a row, `stride` slots apart, come to: its values, or what the gradient needs. By a block.
__device__ __forceinline__ void finish_row(const HeadExplicit& call, const Entry& entry, const double* slot,
                                           int64_t stride, int slices) {
  __shared__ double totals[kExplicitThreads], factors[kExplicitThreads];
  // of the slices before it, and to its mean from its sum
  __shared__ double weights[kExplicitThreads], inverses[kExplicitThreads], own_inverses[kExplicitThreads];
  const double inverse_temperature = 1.0 / call.temperature;
  const int64_t apart = stride * (call.D + 1 + kExplicitSliceWords), columns = call.D + (entry.with_bias ? 1 : 0);
  const int me = static_cast<int>(threadIdx.x);
  // a slice of each thread
  SliceState own{math::empty_tail(), -math::kInfinity, 0.0, -math::kInfinity, 0.0, 0.0};
  if (me < slices) own = *reinterpret_cast<const SliceState*>(slot + me * apart + call.D + 1);
  const math::SoftmaxTail tail = ExplicitBlock::merged(own.tail, CombineTails{inverse_temperature});
  const double top = ExplicitBlock::merged(own.top, LargerOf{});
  const double group_top = ExplicitBlock::merged(own.group_top, LargerOf{});
  const double factor = own.top == top ? 1.0 : math::tail_scale(own.top, top, inverse_temperature);
  totals[me] = own.total * factor;
  factors[me] = factor;
  const double in_group =
      own.group * (own.group_top == group_top ? 1.0 : math::tail_scale(own.group_top, group_top, inverse_temperature));
  const Sums<2> sums = ExplicitBlock::merged(Sums<2>{{in_group, own.spread * factor}}, AddSums{});
  __syncthreads();
  double total = 0.0, before = 0.0;
  FLATCORE_ROLLED
  for (int s = 0; s < slices; ++s) {
    if (s == me) before = total;
    total += totals[s];
  }
  const Joins joins(totals[me], before);
  weights[me] = joins.weight;
  inverses[me] = joins.inverse;
  own_inverses[me] = own.total > 0.0 ? 1.0 / own.total : 0.0;
  __syncthreads();
  double* direction = call.found != nullptr ? found_of(call, entry.i) : nullptr;
  RowNorms norms{};
  for (int64_t d = me; d < columns; d += kExplicitThreads) {
    double value = 0.0, spread = 0.0;
    FLATCORE_ROLLED
    for (int s = 0; s < slices; ++s) {
      const double part = slot[s * apart + d];
      const double moved = part * own_inverses[s] - value * inverses[s];
      spread += weights[s] * moved * moved;
      value += part * factors[s];
    }
    const double a = fabs(value);
    if (direction != nullptr) direction[d] = value;
    norms = MergeRowNorms{}(norms, {spread, a, a * a, a});
  }
  norms = ExplicitBlock::merged(norms, MergeRowNorms{});
  const auto split = math::epsilon_split<double>(tail.t, tail.r, tail.u1, tail.u2, inverse_temperature);
  const double group = group_top == -math::kInfinity
                           ? 0.0
                           : sums.at[0] * exp((group_top - tail.t) * inverse_temperature - split.log1p_tau);
  const double variance = math::explicit_variance(sums.at[1] + norms.spread, group, norms.norm2_squared, total);
  const double log_share = (top - tail.t) * inverse_temperature - split.log1p_tau;
  const bool none = top == -math::kInfinity;
  if (direction == nullptr) {
    const Values values(call);
    const double log_unit = call.summary[1] * math::kLn2 + math::log_nonnegative(call.temperature);
    if (entry.gradient) {
      const double shift = log_share - log_unit;
      if (me != 0) return;
      values.put(kLogGradientNorm, entry.n,
                 none ? -math::kInfinity : shift + 0.5 * math::log_nonnegative(norms.norm2_squared));
      values.put(kLogGradientNorm1, entry.n, none ? -math::kInfinity : shift + math::log_nonnegative(norms.norm1));
      values.put(kLogGradientNormInf, entry.n, none ? -math::kInfinity : shift + math::log_nonnegative(norms.norm_inf));
      return;
    }
    const double log_n = math::log_head_square(log_feature_squares<kExplicitThreads>(call, entry.n), call.include_bias);
    const bool zero = none || log_n == -math::kInfinity;
    const double value = log_n + log_share + math::log_nonnegative(variance) - 2.0 * log_unit;
    if (me == 0) values.put(kLogNeuronwise, entry.n, zero ? -math::kInfinity : value);
    return;
  }
  const double norm = asks_for(call, kLogGradientNorm)    ? sqrt(norms.norm2_squared)
                      : asks_for(call, kLogGradientNorm1) ? norms.norm1
                                                          : norms.norm_inf;
  const double size = entry.gradient ? norm : variance;
  if (entry.gradient) {  // the sum becomes its dual direction
    Sums<1> count{};
    for (int64_t d = me; d < call.D; d += kExplicitThreads) count.at[0] += fabs(direction[d]) == norms.norm_inf;
    const double ties = ExplicitBlock::merged(count, AddSums{}).at[0];
    for (int64_t d = me; d < call.D && size > 0.0; d += kExplicitThreads) {
      direction[d] = math::dual_entry(norm_order(call.fields), direction[d], norm, ties);
    }
  }
  if (me != 0) return;
  auto* row = reinterpret_cast<ExplicitRow*>(direction + call.D + 1);
  *row = {tail.t,
          split.log1p_tau,
          top,
          log_share < 0.0 ? log_share : 0.0,
          !none && size > 0.0 ? size : 0.0,
          norms.norm2_squared,
          0.0,
          0.0,
          0.0};
}

// The marked rows of a block of the problem's, once for each of the two kinds that a row is marked with.
struct Entries {
  MarkedRows neuronwise, gradient;

  __device__ __forceinline__ Entries(const uint8_t* marks, int64_t rows, int (*before)[kExplicitThreads + 1])
      : neuronwise(marks, rows, kSpecialNeuronwise, before[0]), gradient(marks, rows, kSpecialGradient, before[1]) {}
  __device__ __forceinline__ int64_t count() const { return neuronwise.count() + gradient.count(); }
  // `start`: of the marks among the problem's rows
  __device__ __forceinline__ Entry entry(const HeadExplicit& call, int64_t start, int64_t k) const {
    const bool of_gradient = k >= neuronwise.count();
    const int64_t i = of_gradient ? gradient.row(k - neuronwise.count()) : neuronwise.row(k);
    return entry_of(call, start + i, of_gradient);
  }
};

template <class T>
__global__ void __launch_bounds__(kExplicitThreads, 1) explicit_rows(HeadExplicit call) {
  __shared__ int before[2][kExplicitThreads + 1];
  const bool alone = call.C <= kExplicitAlone;
  const RowsOfBlock of(call, alone);
  for (int64_t start = of.first; start < call.rows; start += of.step) {
    const int64_t left = call.rows - start;
    const Entries entries(call.special + start, left < of.length ? left : of.length, before);
    const int64_t count = entries.count();
    if (count == 0) continue;
    const Slices slices = alone ? Slices{1, call.C} : slices_of(call.C, call.slots, count);
    // the blocks that run at one time are at the same rows of W
    for (int64_t task = alone ? 0 : blockIdx.x; task < slices.count * count; task += alone ? 1 : gridDim.x) {
      const Entry entry = entries.entry(call, start, task % count);
      const int64_t from = task / count * slices.length, end = from + slices.length;
      double* slot = slot_of(call, slices.count > 1 ? task : blockIdx.x);
      put_slice<T>(call, entry, from, end < call.C ? end : call.C, slot);
      __syncthreads();
      if (slices.count == 1) finish_row(call, entry, slot, 0, 1);
      __syncthreads();  // the slot is written again
    }
  }
}

__global__ void __launch_bounds__(kExplicitThreads) explicit_rows_merged(HeadExplicit call) {
  __shared__ int before[2][kExplicitThreads + 1];
  const Entries entries(call.special, call.rows, before);
  const int64_t count = entries.count();
  if (count == 0) return;
  const Slices slices = slices_of(call.C, call.slots, count);
  for (int64_t k = blockIdx.x; k < count && slices.count > 1; k += gridDim.x) {
    finish_row(call, entries.entry(call, 0, k), slot_of(call, k), count, static_cast<int>(slices.count));
    __syncthreads();
  }
}

}  // namespace

Launched head_explicit(const HeadExplicit& call) {
  if (call.rows == 0) return {};
  const DeviceGuard guard(call.device);
  if (guard.status() != cudaSuccess) return launched(guard.status(), "head_explicit: the device");
  const auto run = [&](auto kernel) {
    const int64_t chunks = (call.rows + kExplicitThreads - 1) / kExplicitThreads;
    const int64_t tasks = call.C <= kExplicitAlone && chunks < call.slots ? chunks : call.slots;
    const Launched done = launch("head_explicit", call.stream, grid_for(tasks), kExplicitThreads, kernel, call);
    if (done.error != nullptr || call.C <= kExplicitAlone) return done;
    const int64_t merged = 2 * call.rows < call.slots / 2 ? 2 * call.rows : (call.slots + 1) / 2;
    return launch("head_explicit: merge", call.stream, grid_for(merged), kExplicitThreads, &explicit_rows_merged, call);
  };
  switch (call.weight.dtype) {
    case Dtype::kFloat16:
      return run(&explicit_rows<Half>);
    case Dtype::kBFloat16:
      return run(&explicit_rows<BHalf>);
    case Dtype::kFloat32:
      return run(&explicit_rows<float>);
    case Dtype::kFloat64:
      return run(&explicit_rows<double>);
  }
  return {"unknown dtype", "head_explicit"};
}

}  // namespace flatcore::cuda
