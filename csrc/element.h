// Element types and strided matrices as the kernels see them: plain addresses, 64-bit sizes, strides in elements.
#pragma once

#include <cstdint>

namespace flatcore {

enum class Dtype : int { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2, kFloat64 = 3 };

struct Matrix {
  const void* data = nullptr;
  int64_t row_stride = 0;
  int64_t column_stride = 1;
  Dtype dtype = Dtype::kFloat32;
};

// Bit patterns with the width of the type; the arithmetic is in cpu/simd.h and cuda/elements.h.
struct Half {
  uint16_t bits;
};
struct BHalf {
  uint16_t bits;
};

}  // namespace flatcore
