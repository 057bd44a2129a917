// head_weights: what the other kernels need of W alone.
//
// Buffers: as cuda/head_metrics.h says. Does not synchronise; the exponent e stays on the device.
// Numerics: float64 throughout; distances from differences. W is packed as it stands, or in pieces that add up to it.
// float64 weights are read twice, as their squares may leave the range before e is known. Merges in a fixed order: two
// runs agree bit for bit. Cost: W read once (packed on the way), once more for the centre, once more for the squares
// about it; the table of distances C^2 D / 2 differences. Never run on a device yet: no figure is known.
#include "cuda/head_metrics.h"
#include "cuda/head_pieces.h"
#include "cuda/head_rows.h"
#include "cuda/launch.h"
#include "cuda/since_80.h"

namespace flatcore::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = kThreads / kWarp;  // a warp per row of W
using Warp = Team<kWarp>;
constexpr int64_t kSlices = 64;  // of the rows of W, for the sums over them
constexpr int kPairSide = 4;     // rows of W by rows of W whose distances a warp sums

__device__ __forceinline__ int64_t first_row() {
  return static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kWarp;
}
unsigned grid_for_rows(int64_t rows) { return grid_for((rows + kRows - 1) / kRows); }

// Row j of W, times a factor, in pieces (cuda/head_pieces.h); a row of zeros behind the last.
template <class Piece, class T>
__device__ __forceinline__ void put_pieces(const HeadWeights& call, const T* row, int64_t j, float factor) {
  const Pieces<Piece> pieces{piece_groups(call), piece_count(call)};
  Piece* packed = static_cast<Piece*>(call.packed);
  for (int64_t d = Warp::lane(); d < call.packed_stride; d += kWarp) {
    float rest = j < call.C && d < call.D ? widened(row[d * call.weight.column_stride]) * factor : 0.0F;
    for (int piece = 0; piece < pieces.count; ++piece) {
      const Piece part = cut<Piece>(rest);
      packed[pieces.place(j, d, piece)] = part;
      rest -= widened(part);
    }
  }
  if (Warp::lane() == 0 && call.D > 0)
    reinterpret_cast<float*>(packed + pieces.end(call.packed_stride))[j] = 1.0F / factor;
}

// The largest magnitude and the sum of squares of rows of 2^e W; a row of the packed matrix on the way.
template <class T, class V>
__global__ void __launch_bounds__(kThreads)
    weight_rows(HeadWeights call, double* squares, double* largest, bool scaled) {
  const T* w = static_cast<const T*>(call.weight.data);
  V* packed = static_cast<V*>(call.packed);
  const double scale = scaled ? scalbn(1.0, static_cast<int>(call.summary[1])) : 1.0;
  const bool in_pieces = packed != nullptr && takes_pieces(call) && since_80();
  const int64_t classes = in_pieces ? piece_groups(call) * kBlockClasses : call.packed_rows;
  const int64_t rows = packed != nullptr ? classes : call.C;
  for (int64_t j = first_row(); j < rows; j += static_cast<int64_t>(gridDim.x) * kRows) {
    RowPartial partial;
    const T* row = w + j * call.weight.row_stride;
    for (int64_t d = Warp::lane(); d < call.D && j < call.C; d += kWarp) {
      const auto x = widened(row[d * call.weight.column_stride]);
      partial.take(static_cast<double>(x), scale);
      if (packed != nullptr && !in_pieces) packed[j * call.packed_stride + d] = static_cast<V>(x);
    }
    if (packed != nullptr && !in_pieces) {
      const int64_t from = j < call.C ? call.D : 0;
      for (int64_t d = from + Warp::lane(); d < call.packed_stride; d += kWarp) {
        packed[j * call.packed_stride + d] = V{};
      }
    }
    partial = Warp::merged(partial, MergePartials{});
    if constexpr (sizeof(T) <= 4 && sizeof(V) == 4) {
      if (in_pieces) {
        const float factor = piece_scale_of(partial.largest);
        call.features.dtype == Dtype::kBFloat16 ? put_pieces<BHalf>(call, row, j, factor)
                                                : put_pieces<float>(call, row, j, factor);
      }
    }
    if (Warp::lane() == 0 && j < call.C) {
      squares[j] = partial.squares;
      largest[j] = partial.largest;
    }
  }
}

// e from the largest entry, and log ||W||_F^2 from the rows' squares (`scaled`: times 2^(2e) already).
__global__ void __launch_bounds__(kThreads)
    weight_total(HeadWeights call, const double* squares, const double* largest, bool scaled) {
  using Block = Team<kThreads>;
  const double* bias = call.include_bias ? call.bias : nullptr;
  double most = 0.0;
  for (int64_t j = Block::lane(); j < call.C; j += kThreads) {
    most = largest[j] > most ? largest[j] : most;
    const double b = bias != nullptr ? fabs(bias[j]) : 0.0;
    if (b > most && b < math::kInfinity) most = b;
  }
  most = Block::merged(most, LargerOf{});
  const int exponent = math::scaling_exponent(most, call.double_compute);
  const double scale = scalbn(1.0, exponent);
  Sums<1> total{};
  for (int64_t j = Block::lane(); j < call.C; j += kThreads) {
    const double b = bias != nullptr ? bias[j] * scale : 0.0;
    total.at[0] += (scaled ? squares[j] : squares[j] * scale * scale) + b * b;
  }
  total = Block::merged(total, AddSums{});
  if (Block::lane() == 0) {
    call.summary[0] = log(total.at[0]) - 2.0 * exponent * math::kLn2;
    call.summary[1] = exponent;
  }
}

// Sums over a slice of the rows of 2^e (w_j - w_0), the bias as column D: parts (kSlices, D + 1).
template <class T>
__global__ void __launch_bounds__(kThreads) weight_slices(HeadWeights call, double* parts) {
  const T* w = static_cast<const T*>(call.weight.data);
  const double scale = scalbn(1.0, static_cast<int>(call.summary[1]));
  const int64_t columns = (call.D + 1 + kThreads - 1) / kThreads;
  const int64_t length = (call.C + kSlices - 1) / kSlices;
  for (int64_t task = blockIdx.x; task < columns * kSlices; task += gridDim.x) {
    const int64_t d = task % columns * kThreads + threadIdx.x, slice = task / columns;
    const int64_t end = (slice + 1) * length < call.C ? (slice + 1) * length : call.C;
    double sum = 0.0;
    if (d < call.D) {
      const T* column = w + d * call.weight.column_stride;
      const double base = static_cast<double>(widened(column[0])) * scale;
      for (int64_t j = slice * length; j < end; ++j) {
        sum += static_cast<double>(widened(column[j * call.weight.row_stride])) * scale - base;
      }
    } else if (d == call.D && call.include_bias) {
      for (int64_t j = slice * length; j < end; ++j) sum += (call.bias[j] - call.bias[0]) * scale;
    }
    if (d <= call.D) parts[slice * (call.D + 1) + d] = sum;
  }
}

// The mean as the first row plus the mean difference to it: equal rows give exactly that row.
__global__ void __launch_bounds__(kThreads) weight_center(HeadWeights call, const double* parts) {
  const double scale = scalbn(1.0, static_cast<int>(call.summary[1]));
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t d = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; d <= call.D; d += step) {
    double sum = 0.0;
    for (int64_t slice = 0; slice < kSlices; ++slice) sum += parts[slice * (call.D + 1) + d];
    const double own = d < call.D ? element(call.weight, 0, d) * scale : call.include_bias ? call.bias[0] * scale : 0.0;
    const double mean = own + sum / static_cast<double>(call.C);
    call.center[d] = call.double_compute || d == call.D ? mean : static_cast<double>(static_cast<float>(mean));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) weight_centered(HeadWeights call) {
  const T* w = static_cast<const T*>(call.weight.data);
  const double scale = scalbn(1.0, static_cast<int>(call.summary[1]));
  for (int64_t j = first_row(); j < call.C; j += static_cast<int64_t>(gridDim.x) * kRows) {
    const T* row = w + j * call.weight.row_stride;
    Sums<1> sum{};
    for (int64_t d = Warp::lane(); d < call.D; d += kWarp) {
      const double x = static_cast<double>(widened(row[d * call.weight.column_stride])) * scale - call.center[d];
      sum.at[0] += x * x;
    }
    sum = Warp::merged(sum, AddSums{});
    if (Warp::lane() != 0) continue;
    const double b = call.include_bias ? call.bias[j] * scale - call.center[call.D] : 0.0;
    call.centered_squares[j] = sum.at[0] + b * b;
  }
}

// A warp per tile of 4 x 4 pairs of rows: 8 rows are read for them, not 32.
template <class T>
__global__ void __launch_bounds__(kThreads) weight_distances(HeadWeights call) {
  constexpr int side = kPairSide;
  const T* w = static_cast<const T*>(call.weight.data);
  const double scale = scalbn(1.0, static_cast<int>(call.summary[1]));
  const int64_t tiles = (call.C + side - 1) / side, step = static_cast<int64_t>(gridDim.x) * kRows;
  const auto row = [&](int64_t j) { return w + (j < call.C ? j : call.C - 1) * call.weight.row_stride; };
  for (int64_t tile = first_row(); tile < tiles * tiles; tile += step) {
    const int64_t first = tile / tiles * side, second = tile % tiles * side;
    if (second < first) continue;
    Sums<side * side> sums{};
    for (int64_t d = Warp::lane(); d < call.D; d += kWarp) {
      const int64_t at = d * call.weight.column_stride;
      double a[side], b[side];
      FLATCORE_UNROLL
      for (int i = 0; i < side; ++i) {
        a[i] = static_cast<double>(widened(row(first + i)[at]));
        b[i] = static_cast<double>(widened(row(second + i)[at]));
      }
      FLATCORE_UNROLL
      for (int i = 0; i < side * side; ++i) {
        const double x = (a[i / side] - b[i % side]) * scale;
        sums.at[i] += x * x;
      }
    }
    sums = Warp::merged(sums, AddSums{});
    // a lane writes a pair; picked by selects, as an index into registers would be a stack frame
    double mine = 0.0;
    FLATCORE_UNROLL
    for (int i = 0; i < side * side; ++i) mine = Warp::lane() == i ? sums.at[i] : mine;
    const int64_t j = first + Warp::lane() / side, k = second + Warp::lane() % side;
    if (Warp::lane() >= side * side || k < j || k >= call.C) continue;
    call.distances[j * call.C + k] = call.distances[k * call.C + j] = mine;
    if (call.bias_distances != nullptr) {
      const double b = (call.bias[j] - call.bias[k]) * scale;
      call.bias_distances[j * call.C + k] = call.bias_distances[k * call.C + j] = mine + b * b;
    }
  }
}

template <class T, class V>
Launched run(const HeadWeights& call) {
  double* squares = call.workspace;
  double* largest = squares + call.C;
  double* parts = largest + call.C;
  const unsigned rows = grid_for_rows(call.packed != nullptr ? call.packed_rows : call.C);
  Launched done{};
  const auto then = [&](const char* what, unsigned grid, auto kernel, auto... arguments) {
    if (done.error == nullptr) done = launch(what, call.stream, grid, kThreads, kernel, call, arguments...);
  };
  then("head_weights: rows", rows, &weight_rows<T, V>, squares, largest, false);
  then("head_weights: total", 1U, &weight_total, squares, largest, false);
  if constexpr (sizeof(T) == 8) {
    then("head_weights: scaled rows", rows, &weight_rows<T, V>, squares, largest, true);
    then("head_weights: total", 1U, &weight_total, squares, largest, true);
  }
  if (call.center != nullptr) {
    const int64_t columns = (call.D + 1 + kThreads - 1) / kThreads;
    then("head_weights: slices", grid_for(columns * kSlices), &weight_slices<T>, parts);
    then("head_weights: centre", grid_for(columns), &weight_center, parts);
    then("head_weights: squares", grid_for_rows(call.C), &weight_centered<T>);
  }
  if (call.distances != nullptr) {
    const int64_t tiles = (call.C + kPairSide - 1) / kPairSide;
    then("head_weights: distances", grid_for_rows(tiles * tiles), &weight_distances<T>);
  }
  return done;
}

}  // namespace

int64_t head_weights_workspace(int64_t D, int64_t C) { return 2 * C + kSlices * (D + 1); }

Launched head_weights(const HeadWeights& call) {
  const DeviceGuard guard(call.device);
  if (guard.status() != cudaSuccess) return launched(guard.status(), "head_weights: the device");
  switch (call.weight.dtype) {
    case Dtype::kFloat16:
      return call.double_compute ? run<Half, double>(call) : run<Half, float>(call);
    case Dtype::kBFloat16:
      return call.double_compute ? run<BHalf, double>(call) : run<BHalf, float>(call);
    case Dtype::kFloat32:
      return call.double_compute ? run<float, double>(call) : run<float, float>(call);
    case Dtype::kFloat64:
      return run<double, double>(call);
  }
  return {"unknown dtype", "head_weights"};
}

}  // namespace flatcore::cuda
