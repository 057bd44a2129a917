// The shared per-row mathematics behind a C interface, for tests/test_math.py: scalars, and vectors of four doubles or
// floats.
#include "math/epsilon_split.h"
#include "math/softmax_tail.h"

typedef double Vector __attribute__((vector_size(32)));
typedef uint64_t VectorBits __attribute__((vector_size(32)));
typedef float FloatVector __attribute__((vector_size(16)));
typedef uint32_t FloatBits __attribute__((vector_size(16)));
namespace flatcore::math {
template <>
struct Shape<Vector> {
  using Bits = VectorBits;
};
template <>
struct Shape<FloatVector> {
  using Bits = FloatBits;
};
}  // namespace flatcore::math

using namespace flatcore::math;

template <class F, class G>
static void map(const double* x, double* scalar, double* vector, int64_t count, F f, G g) {
  for (int64_t i = 0; i < count; ++i) scalar[i] = f(x[i]);
  for (int64_t i = 0; i + 4 <= count; i += 4) {
    Vector v;
    __builtin_memcpy(&v, x + i, sizeof(v));
    v = g(v);
    __builtin_memcpy(vector + i, &v, sizeof(v));
  }
}

extern "C" {

void map_exp(const double* x, double* scalar, double* vector, int64_t count) {
  map(
      x, scalar, vector, count, [](double v) { return exp_nonpositive(v); },
      [](Vector v) { return exp_nonpositive(v); });
}
void map_log(const double* x, double* scalar, double* vector, int64_t count) {
  map(
      x, scalar, vector, count, [](double v) { return log_nonnegative(v); },
      [](Vector v) { return log_nonnegative(v); });
}
void map_log1p(const double* x, double* scalar, double* vector, int64_t count) {
  map(
      x, scalar, vector, count, [](double v) { return log1p_nonnegative(v); },
      [](Vector v) { return log1p_nonnegative(v); });
}

// In float, of numbers that are floats.
void map_log_float(const double* x, double* scalar, double* vector, int64_t count) {
  map(
      x, scalar, vector, count, [](double v) { return static_cast<double>(log_normal_float(static_cast<float>(v))); },
      [](Vector v) {
        return __builtin_convertvector(log_normal_float(__builtin_convertvector(v, FloatVector)), Vector);
      });
}
void map_log1p_float(const double* x, double* scalar, double* vector, int64_t count) {
  map(
      x, scalar, vector, count,
      [](double v) { return static_cast<double>(log1p_nonnegative_float(static_cast<float>(v))); },
      [](Vector v) {
        return __builtin_convertvector(log1p_nonnegative_float(__builtin_convertvector(v, FloatVector)), Vector);
      });
}
// exp(difference of two floats), and that of the difference over a temperature; 0 for exponents below `least`.
void exp_differences_float(const float* x, const float* top, double temperature, float least, float* plain,
                           float* scaled, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    plain[i] = exp_difference_float(x[i], top[i], least);
    scaled[i] = exp_difference_float(x[i], top[i], FloatTemperature(temperature, static_cast<double>(least)));
  }
}

// Merges the leaves in the order of a list of pairs: node i takes (pairs[2i], pairs[2i + 1]); the last node is
// returned.
void merge(const double* z, int64_t classes, const int64_t* pairs, int64_t merges, double inverse_temperature,
           SoftmaxTail* nodes) {
  for (int64_t j = 0; j < classes; ++j) nodes[j] = leaf_tail(j, z[j]);
  for (int64_t i = 0; i < merges; ++i) {
    nodes[classes + i] = combine(nodes[pairs[2 * i]], nodes[pairs[2 * i + 1]], inverse_temperature);
  }
}

// margin, confidence, eps, log eps, log1p tau, log(1 - sum p^2)
void split(double t, double r, double u1, double u2, double inverse_temperature, double* out) {
  const EpsilonSplit<double> s = epsilon_split<double>(t, r, u1, u2, inverse_temperature);
  const double fields[] = {s.margin, s.confidence, s.eps, s.log_eps, s.log1p_tau, s.log_one_minus_sum_p2};
  for (int i = 0; i < 6; ++i) out[i] = fields[i];
}
}
