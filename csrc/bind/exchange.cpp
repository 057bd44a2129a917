#include "bind/exchange.h"

#include <cstdint>

namespace flatcore::bind {
namespace {

// The interface of DLPack 1, as its specification has it.
struct Device {
  int32_t type;
  int32_t index;
};
constexpr int32_t kCpu = 1;
constexpr int32_t kCuda = 2;
struct Dense {
  void* data;
  Device device;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct Exchange {
  uint32_t major, minor;
  Exchange* previous;
  int (*allocate)(Dense*, void**, void*, void (*)(void*, const char*, const char*));
  int (*owned_from)(void*, void**);
  int (*to_object)(void*, void**);
  int (*view_of)(void*, Dense*);  // 0, or an exception is set
  int (*current_stream)(int32_t, int32_t, void**);
};
constexpr uint32_t kMajor = 1;

// Set once, at import; the types live as long as the interpreter.
const Exchange* exchange = nullptr;
PyTypeObject* tensor_type = nullptr;
PyTypeObject* parameter_type = nullptr;

struct Names {
  PyObject* features = PyUnicode_InternFromString("features");
  PyObject* weight = PyUnicode_InternFromString("linear_weight");
  PyObject* bias = PyUnicode_InternFromString("linear_bias");
  PyObject* logits = PyUnicode_InternFromString("logits");
  PyObject* target = PyUnicode_InternFromString("target");
  PyObject* is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
  PyObject* storage = PyUnicode_InternFromString("untyped_storage");
  PyObject* nbytes = PyUnicode_InternFromString("nbytes");
  PyObject* offset = PyUnicode_InternFromString("storage_offset");
};
const Names& names() {
  static const Names* const all = new Names;  // never given back: strings of a module that ends with the interpreter
  return *all;
}

py::object ask(PyObject* object, PyObject* method) {
  PyObject* arguments[] = {object};
  return py::reinterpret_steal<py::object>(PyObject_VectorcallMethod(method, arguments, 1, nullptr));
}

bool is_true(const py::object& value) { return value.ptr() == Py_True; }

// Whether the tensor's storage holds all that its shape says: FSDP frees a storage and keeps its views; autograd's
// zeros and a functionalised tensor have one that is as long as it should be and lies nowhere.
bool storage_covers(PyObject* tensor, const Dense& view) {
  int64_t last = 0;
  for (int32_t axis = 0; axis < view.ndim; ++axis) {
    if (view.shape[axis] == 0) return true;
    last += (view.shape[axis] - 1) * view.strides[axis];
  }
  if (view.data == nullptr) return false;
  const py::object storage = ask(tensor, names().storage);
  if (!storage) return false;
  const py::object nbytes = ask(storage.ptr(), names().nbytes), offset = ask(tensor, names().offset);
  if (!nbytes || !offset) return false;
  return (offset.cast<int64_t>() + last + 1) * (view.bits / 8) <= nbytes.cast<int64_t>();
}

enum class Kind { kFloating, kLabels };

// The exception that a question has left, if any, is dropped: whoever checks by name will say what is wrong.
bool is_plain(PyObject* tensor, Kind kind, int32_t ndim, bool recorded, Dense& view) {
  if (Py_TYPE(tensor) != tensor_type && Py_TYPE(tensor) != parameter_type) return false;
  if (exchange->view_of(tensor, &view) != 0) {
    PyErr_Clear();
    return false;
  }
  if (view.ndim != ndim || view.lanes != 1 || view.strides == nullptr) return false;
  if (view.device.type != kCpu && view.device.type != kCuda) return false;
  const bool floating = (view.code == 2 && (view.bits == 16 || view.bits == 32 || view.bits == 64)) ||
                        (view.code == 4 && view.bits == 16);
  const bool labels = view.code == 0 && view.bits == 64;
  if (kind == Kind::kFloating ? !floating : !labels) return false;
  view.data = static_cast<char*>(view.data) + view.byte_offset;
  if (reinterpret_cast<uintptr_t>(view.data) % (view.bits / 8) != 0) return false;
  const py::object negated = ask(tensor, names().is_neg);
  bool good = negated && !is_true(negated) && storage_covers(tensor, view);
  if (good && recorded) {
    const auto followed = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, names().requires_grad));
    good = followed && !is_true(followed);
  }
  if (PyErr_Occurred() != nullptr) PyErr_Clear();
  return good;
}

Dtype dtype_of(const Dense& view) {
  if (view.code == 4) return Dtype::kBFloat16;
  return view.bits == 16 ? Dtype::kFloat16 : view.bits == 32 ? Dtype::kFloat32 : Dtype::kFloat64;
}

Matrix matrix_of(const Dense& view) {
  Matrix out;
  out.data = view.data;
  out.row_stride = view.ndim == 2 ? view.strides[0] : 0;
  out.column_stride = view.shape[view.ndim - 1] == 1 ? 1 : view.strides[view.ndim - 1];
  out.dtype = dtype_of(view);
  return out;
}

}  // namespace

std::optional<PlainHead> plain_head(const py::object& head, bool recorded) {
  if (exchange == nullptr) return std::nullopt;
  const auto field = [&](PyObject* name) {
    return py::reinterpret_steal<py::object>(PyObject_GetAttr(head.ptr(), name));
  };
  const py::object features = field(names().features), weight = field(names().weight), bias = field(names().bias),
                   logits = field(names().logits), target = field(names().target);
  if (!features || !weight || !bias || !logits || !target) throw py::error_already_set();
  PlainHead out;
  Dense phi, w, other;
  if (!is_plain(features.ptr(), Kind::kFloating, 2, recorded, phi)) return std::nullopt;
  if (!is_plain(weight.ptr(), Kind::kFloating, 2, recorded, w)) return std::nullopt;
  const auto there = [&](const Dense& view) {
    return view.device.type == phi.device.type && view.device.index == phi.device.index;
  };
  out.N = phi.shape[0];
  out.D = phi.shape[1];
  out.C = w.shape[0];
  if (out.C < 1 || w.shape[1] != out.D || !there(w)) return std::nullopt;
  out.features = matrix_of(phi);
  out.weight = matrix_of(w);
  out.double_compute = out.features.dtype == Dtype::kFloat64 || out.weight.dtype == Dtype::kFloat64;
  if (!bias.is_none()) {
    if (!is_plain(bias.ptr(), Kind::kFloating, 1, recorded, other) || other.shape[0] != out.C || !there(other))
      return std::nullopt;
    out.bias = matrix_of(other);
  }
  if (!logits.is_none()) {
    if (!is_plain(logits.ptr(), Kind::kFloating, 2, recorded, other) || !there(other)) return std::nullopt;
    if (other.shape[0] != out.N || other.shape[1] != out.C) return std::nullopt;
    out.logits = matrix_of(other);
    out.double_compute |= out.logits.dtype == Dtype::kFloat64;
  }
  if (!target.is_none()) {
    if (!is_plain(target.ptr(), Kind::kLabels, 1, false, other) || other.shape[0] != out.N || !there(other))
      return std::nullopt;
    if (out.N > 1 && other.strides[0] != 1) return std::nullopt;
    out.target = static_cast<const int64_t*>(other.data);
  }
  return out;
}

void register_exchange(py::module_& module) {
  module.def(
      "connect",  // whether torch's table is of a version that is known here; None: read nothing through it
      [](const py::object& table, const py::type& tensor, const py::type& parameter) {
        exchange = nullptr;
        if (table.is_none()) return false;
        const auto* found = static_cast<const Exchange*>(PyCapsule_GetPointer(table.ptr(), "dlpack_exchange_api"));
        if (found == nullptr) throw py::error_already_set();
        while (found != nullptr && found->major != kMajor) found = found->previous;
        if (found == nullptr || found->view_of == nullptr) return false;
        tensor_type = reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr());
        parameter_type = reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr());
        exchange = found;
        return true;
      },
      py::arg("table"), py::arg("tensor"), py::arg("parameter"));
  module.def(
      "plain_head",  // (N, D, C, whether any asks for float64), or None
      [](const py::object& head) -> py::object {
        const auto found = plain_head(head, false);
        if (!found) return py::none();
        return py::make_tuple(found->N, found->D, found->C, found->double_compute);
      },
      py::arg("head"));
}

}  // namespace flatcore::bind
