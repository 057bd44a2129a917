// What the bindings share: they only translate. Arguments were validated in Python with their names; here only what
// could read out of bounds is checked again.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/targets.h"

namespace flatcore::bind {

namespace py = pybind11;

void register_cuda(py::module_& module);  // of the module with CUDA kernels
void register_head_problem(py::module_& module);
void register_head_metrics(py::module_& module);
void register_head_metrics_backward(py::module_& module);
void register_row_norms(py::module_& module);
void register_unmasked_cross_entropy(py::module_& module);

// A head with its inputs and outputs, built once per call in Python and shared by the kernels that work on it.
struct Problem : HeadProblem {
  Problem() = default;
  // `bias` may point into `own_bias`: a move takes that along, a copy would leave it behind
  Problem(Problem&&) = default;
  Problem(const Problem&) = delete;
  std::vector<double> own_bias;
};

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);  // NOLINT(performance-no-int-to-ptr): addresses come from Python
}

// (address, row stride, column stride, dtype) with strides in elements, or None.
inline Matrix matrix(const py::object& value) {
  Matrix out;
  if (value.is_none()) return out;
  const auto parts = value.cast<py::tuple>();
  if (parts.size() != 4) throw std::invalid_argument("a matrix is (address, row stride, column stride, dtype)");
  const int dtype = parts[3].cast<int>();
  if (dtype < 0 || dtype > 3) throw std::invalid_argument("unknown dtype code " + std::to_string(dtype));
  out.data = pointer<const void>(parts[0].cast<uintptr_t>());
  out.row_stride = parts[1].cast<int64_t>();
  out.column_stride = parts[2].cast<int64_t>();
  out.dtype = static_cast<Dtype>(dtype);
  return out;
}

inline const cpu::Target& kernels_of(const std::string& name) {
  const cpu::Target* found = cpu::find_target(name);
  if (found == nullptr) throw std::invalid_argument("CPU target '" + name + "' is not usable here");
  return *found;
}

// Memory that one call needs for itself, on a cache line. From malloc as torch's own on the CPU, without the
// microsecond that a tensor costs. Made with the GIL held.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : data_(std::aligned_alloc(64, (static_cast<size_t>(bytes) + 127) / 64 * 64)) {
    if (data_ != nullptr) return;
    PyErr_Format(PyExc_MemoryError, "out of memory: this call needs %lld bytes of workspace",
                 static_cast<long long>(bytes));
    throw py::error_already_set();
  }
  ~Workspace() { std::free(data_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
};

inline void check_size(const char* name, int64_t value, int64_t least) {
  if (value < least) throw std::invalid_argument(std::string(name) + " is " + std::to_string(value));
}

inline void check_rows(const HeadProblem& problem, int64_t first, int64_t rows) {
  check_size("first", first, 0);
  check_size("rows", rows, 0);
  if (first + rows > problem.N) throw std::invalid_argument("the block ends behind the last row");
}

}  // namespace flatcore::bind
