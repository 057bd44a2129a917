// The blocks of csrc/cuda on the host, lane after lane, behind a C interface, for tests/test_cuda_build.py.
#include "cuda/row_norms_block.h"
#include "cuda/unmasked_cross_entropy_block.h"

using namespace flatcore;
using namespace flatcore::cuda;

// As row_norms.cu does it: a warp for a short row, a block for each tile of a long one and a warp to merge the tiles.
template <class T>
static void norms_of(const T* x, int64_t stride, int64_t count, int64_t tile, double* out) {
  RowPartial shared[8];
  Norms norms;
  if (tile == 0) {
    HostLanes<RowPartial, kWarp> lanes;
    const RowPartial total = block_partial(lanes, shared, x, stride, count, kWarp);
    norms = finished_row(lanes, shared, x, stride, count, kWarp, total);
  } else {
    const int64_t tiles = (count + tile - 1) / tile;
    RowPartial* partials = new RowPartial[static_cast<size_t>(tiles)];
    for (int64_t k = 0; k < tiles; ++k) {
      HostLanes<RowPartial, 256> lanes;
      const int64_t start = k * tile, rest = count - start;
      partials[k] = block_partial(lanes, shared, x + start * stride, stride, rest < tile ? rest : tile, 256);
    }
    HostLanes<RowPartial, kWarp> lanes;
    const RowPartial total = tiles_partial(lanes, shared, partials, tiles, kWarp);
    norms = finished_row(lanes, shared, x, stride, count, kWarp, total);
    delete[] partials;
  }
  out[0] = norms.l1;
  out[1] = norms.l2;
  out[2] = norms.linf;
}

// As unmasked_cross_entropy.cu does it, by a warp or by a block of 256.
template <class T, int width>
static void unmasked_row(const T* z, int64_t classes, int64_t y, int64_t ignore_index, double* loss, double* log_scale,
                         T* cotangent) {
  HostLanes<RestPartial, width> lanes;
  RestPartial shared[8], rest;
  const bool ignored = y == ignore_index, known = y >= 0 && y < classes;
  if (!ignored && known) rest = rest_of_row(lanes, shared, z, classes, y, width);
  const RowResult row = row_result(ignored, known, known ? static_cast<double>(widened(z[y])) : 0.0, rest);
  *loss = row.loss;
  *log_scale = row.log_scale;
  for (int lane = 0; lane < width; ++lane) write_cotangent(cotangent, z, classes, y, row, lane, width);
}
template <class T>
static void unmasked(const void* z, const int64_t* target, int64_t rows, int64_t row_stride, int64_t classes,
                     int64_t ignore_index, int width, double* loss, double* log_scale, void* cotangent) {
  for (int64_t n = 0; n < rows; ++n) {
    const T* row = static_cast<const T*>(z) + n * row_stride;
    T* out = static_cast<T*>(cotangent) + n * classes;
    if (width == kWarp) {
      unmasked_row<T, kWarp>(row, classes, target[n], ignore_index, loss + n, log_scale + n, out);
    } else {
      unmasked_row<T, 256>(row, classes, target[n], ignore_index, loss + n, log_scale + n, out);
    }
  }
}

extern "C" {

void row_norms(const void* x, int dtype, int64_t rows, int64_t row_stride, int64_t stride, int64_t count, int64_t tile,
               double* out) {
  for (int64_t n = 0; n < rows; ++n) {
    const int64_t at = n * row_stride;
    switch (static_cast<cpu::Dtype>(dtype)) {
      case cpu::Dtype::kFloat16:
        norms_of(static_cast<const cpu::Half*>(x) + at, stride, count, tile, out + 3 * n);
        break;
      case cpu::Dtype::kBFloat16:
        norms_of(static_cast<const cpu::BHalf*>(x) + at, stride, count, tile, out + 3 * n);
        break;
      case cpu::Dtype::kFloat32:
        norms_of(static_cast<const float*>(x) + at, stride, count, tile, out + 3 * n);
        break;
      case cpu::Dtype::kFloat64:
        norms_of(static_cast<const double*>(x) + at, stride, count, tile, out + 3 * n);
        break;
    }
  }
}

// The order of the merges: every lane holds the text of a merge tree over lanes; here its checksum by position.
struct Trace {
  double low = 0.0, high = -1.0;  // the lanes lie in [low, high]
  int merges = 0;
};
struct MergeTraces {
  Trace operator()(const Trace& a, const Trace& b) const {
    Trace both;
    both.low = a.low < b.low ? a.low : b.low;
    both.high = a.high > b.high ? a.high : b.high;
    both.merges = a.merges + b.merges + 1;
    return both;
  }
};
void trace(int* out) {
  HostLanes<Trace, 256> lanes;
  Trace shared[8];
  lanes.each([](int lane, Trace& value) { value.low = value.high = lane; });
  lanes.reduce(shared, MergeTraces{});
  lanes.each([&](int lane, Trace& value) {
    out[3 * lane] = static_cast<int>(value.low);
    out[3 * lane + 1] = static_cast<int>(value.high);
    out[3 * lane + 2] = value.merges;
  });
}

void unmasked_cross_entropy(const void* z, int dtype, const int64_t* target, int64_t rows, int64_t row_stride,
                            int64_t classes, int64_t ignore_index, int width, double* loss, double* log_scale,
                            void* cotangent) {
  const auto run = dtype == 0   ? unmasked<cpu::Half>
                   : dtype == 1 ? unmasked<cpu::BHalf>
                   : dtype == 2 ? unmasked<float>
                                : unmasked<double>;
  run(z, target, rows, row_stride, classes, ignore_index, width, loss, log_scale, cotangent);
}

// As float64 through a type and back: what narrowing makes of numbers of at most 1.
void narrow_halves(const float* x, uint16_t* half, uint16_t* bhalf, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    half[i] = Narrowed<cpu::Half>::of(x[i]).bits;
    bhalf[i] = Narrowed<cpu::BHalf>::of(x[i]).bits;
  }
}

void widen_halves(const uint16_t* bits, double* half, double* bhalf, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    half[i] = static_cast<double>(widened(cpu::Half{bits[i]}));
    bhalf[i] = static_cast<double>(widened(cpu::BHalf{bits[i]}));
  }
}
}
