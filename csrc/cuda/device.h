// What every CUDA entry point shares, without CUDA's headers: the stream, and how a launch reports.
#pragma once

#include <string>

namespace flatcore::cuda {

using Stream = void*;  // cudaStream_t

// Null, or what CUDA said and where.
struct Launched {
  const char* error = nullptr;
  const char* what = nullptr;
};

// The runtime that is linked in, and what it finds.
struct Runtime {
  int runtime_version = 0;  // 13000 is 13.0
  int driver_version = 0;   // the newest runtime that the driver serves; 0 without a driver
  int devices = 0;
  std::string reason;  // why no device can be used; empty if one can
};
Runtime runtime();

// One device, and whether this build's kernels run there.
struct Device {
  int capability = 0;   // 90 is compute capability 9.0; 0 if even that could not be asked
  bool active = false;  // whether the process works on it already
  std::string reason;   // why no kernel runs there; empty if one does, or if the device is not active
};
Device device(int index);

// Whether the process works on the device: what changes a device that is not costs 0.3 s and some 500 MB of its memory.
bool is_active(int device);

// Loads every kernel on a device; false, and nothing is done, where the process does not work on it yet.
bool load_all(int device);

// The architectures that were compiled, as CMake names them.
const char* architectures();

}  // namespace flatcore::cuda
