// Every load and store of the kernels, for tests: their files compiled with -fsanitize=thread call one function of
// these at each, and no sanitizer is linked. Counted are those of memory that a test watches, by launch: the bytes that
// are read and written at least once, and the bytes asked for.
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda_runtime.h"

namespace {

struct Range {
  uintptr_t start;
  size_t size;
  int64_t read = 0, written = 0, asked = 0;  // bytes, over all launches; asked: as often as they are read
  std::vector<int> read_by, written_by;      // the last launch that did, by byte
};
std::vector<Range> ranges;

void access(const void* address, size_t size, bool writes) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  const int launch = emulator::devices.launches;
  for (Range& range : ranges) {
    if (at < range.start || at >= range.start + range.size) continue;
    if (!writes) range.asked += static_cast<int64_t>(size);
    std::vector<int>& by = writes ? range.written_by : range.read_by;
    int64_t& total = writes ? range.written : range.read;
    for (size_t i = at - range.start; i < at - range.start + size && i < range.size; ++i) {
      total += by[i] != launch;
      by[i] = launch;
    }
    return;
  }
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))
// Watches memory from now on; what is watched already is not counted twice.
EXPORTED void traffic_watch(uintptr_t start, size_t size) {
  for (const Range& range : ranges) {
    if (start >= range.start && start < range.start + range.size) return;
  }
  ranges.push_back({start, size, 0, 0, 0, std::vector<int>(size, -1), std::vector<int>(size, -1)});
}
EXPORTED void traffic_forget() { ranges.clear(); }
// Of the memory that holds this address, of all for 0.
EXPORTED int64_t traffic_bytes(uintptr_t at, int kind) {
  int64_t total = 0;
  for (const Range& range : ranges) {
    if (at != 0 && (at < range.start || at >= range.start + range.size)) continue;
    total += kind == 0 ? range.read : kind == 1 ? range.written : range.asked;
  }
  return total;
}

#define ACCESS(size)                                                                 \
  extern "C" void __tsan_read##size(void* at) { access(at, size, false); }           \
  extern "C" void __tsan_write##size(void* at) { access(at, size, true); }           \
  extern "C" void __tsan_unaligned_read##size(void* at) { access(at, size, false); } \
  extern "C" void __tsan_unaligned_write##size(void* at) { access(at, size, true); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
extern "C" void __tsan_read_range(void* at, size_t size) { access(at, size, false); }
extern "C" void __tsan_write_range(void* at, size_t size) { access(at, size, true); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void*, void*) {}
extern "C" void __tsan_vptr_read(void*) {}

// The launches' own atomics, and the guards of static variables.
extern "C" uint8_t __tsan_atomic8_load(const volatile uint8_t* at, int) { return __atomic_load_n(at, 5); }
extern "C" uint64_t __tsan_atomic64_load(const volatile uint64_t* at, int) { return __atomic_load_n(at, 5); }
extern "C" uint64_t __tsan_atomic64_fetch_or(volatile uint64_t* at, uint64_t bits, int) {
  return __atomic_fetch_or(at, bits, 5);
}
extern "C" int __tsan_atomic64_compare_exchange_strong(volatile uint64_t* at, uint64_t* expected, uint64_t value, int,
                                                       int) {
  return __atomic_compare_exchange_n(at, expected, value, false, 5, 5);
}
