// torch's tensors as memory, read without a call of Python for each of their properties: through the table of C
// functions that DLPack asks of a library (`__dlpack_c_exchange_api__`), so that nothing here links to torch.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>

#include "element.h"
#include "head_problem.h"

namespace flatcore::bind {

namespace py = pybind11;

// What a head's tensors hold, if it is simply what lies in their memory.
struct PlainHead {
  Matrix features, weight, logits;
  Matrix bias;  // one row
  const int64_t* target = nullptr;
  int64_t N = 0, D = 0, C = 0;
  bool double_compute = false;
};

// The record of flatcore/_engine/head.py: empty unless every tensor is one (no subclass, no lazy negation, dense,
// aligned, its storage there), of a dtype and shape that the kernels take as it is, and all lie on one device.
// `recorded`: also empty if one requires gradient, for autograd would follow what is done with it.
std::optional<PlainHead> plain_head(const py::object& head, bool recorded);

void register_exchange(py::module_& module);

}  // namespace flatcore::bind
