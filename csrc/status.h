// What a kernel reports instead of throwing, exiting or printing; the binding gives the row to Python, which raises.
#pragma once

#include <cstdint>

namespace flatcore {

enum class Status { kOk, kBadLabel };

struct Outcome {
  Status status = Status::kOk;
  int64_t row = -1;  // the first row that caused it
};

}  // namespace flatcore
