// The scheduler of the emulated threads, and a module with the bindings of the CUDA kernels compiled for the host.
#include <dlfcn.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind/bind.h"
#include "bind/exchange.h"
#include "cuda/elements.h"
#include "cuda/since_80.h"
#include "cuda_runtime.h"

// swapcontext makes a system call, and a block of 256 threads switches some thousand times.
#if defined(__x86_64__)
extern "C" void flatcore_switch(void** from, void* to);
asm(R"(
.text
.type flatcore_switch, @function
flatcore_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
#endif

// There where the kernels are watched (traffic.cpp): the load that a copy is.
extern "C" __attribute__((weak)) void __tsan_read_range(void*, size_t);

namespace emulator {

dim3 thread_index, block_index, grid_size, block_size;
Devices devices;

int context_state(int device, unsigned*, int* active) {
  if (device < 0 || device >= Devices::kCount) return 101;  // CUDA_ERROR_INVALID_DEVICE
  return *active = devices.active[device], 0;
}

namespace {

constexpr size_t kStack = 256 << 10;
constexpr int kWarp = 32;
constexpr size_t kLargest = 128;  // bytes of a value that lanes exchange
enum class State { kReady, kBlock, kWarpwide, kDone };

#if defined(__x86_64__)
struct Context {
  void* stack_pointer = nullptr;

  void prepare(char* stack, void (*function)()) {
    // what flatcore_switch pops: six registers, then the function, with the stack as a call leaves it
    auto top = (reinterpret_cast<uintptr_t>(stack) + kStack) & ~uintptr_t{15};
    void** slots = reinterpret_cast<void**>(top) - 8;
    for (int i = 0; i < 8; ++i) slots[i] = nullptr;
    slots[6] = reinterpret_cast<void*>(function);
    stack_pointer = slots;
  }
  void switch_to(Context& other) { flatcore_switch(&stack_pointer, other.stack_pointer); }
};
#else
struct Context {
  ucontext_t context;

  void prepare(char* stack, void (*function)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, function, 0);
  }
  void switch_to(Context& other) { swapcontext(&context, &other.context); }
};
#endif

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  Context context;
  bool started = false;
  State state = State::kReady;
  int predicate = 0;
  char handed[2][kLargest];  // alternately, so that a lane that runs ahead leaves the last exchange's value
  unsigned exchanges = 0;
  std::vector<std::vector<Copy>> copies{1};  // by groups, the last one open
};

std::vector<std::unique_ptr<Fiber>> fibers;
int current = 0, any = 0;
const char* fault = nullptr;  // what a fiber met: it can't throw
Context scheduler;
const std::function<void()>* body = nullptr;
int order = 0;
std::mutex one_at_a_time;

// Of the launches since they were last asked for: how often threads stopped at barriers and shuffles, in all blocks and
// in the busiest.
struct Work {
  int64_t all = 0, most = 0;
};
std::vector<Work> work;
int64_t stops = 0;

void wait(State state);

// A fiber lives on from block to block: creating one takes two system calls.
void enter() {
  while (true) {
    (*body)();
    wait(State::kDone);
  }
}

void resume(int index) {
  current = index;
  thread_index.x = static_cast<unsigned>(index);
  scheduler.switch_to(fibers[static_cast<size_t>(index)]->context);
}

void wait(State state) {
  ++stops;
  Fiber& fiber = *fibers[static_cast<size_t>(current)];
  fiber.state = state;
  fiber.context.switch_to(scheduler);
}

// Lets the fibers of [first, last) go on that all wait in `state`; false if none was to be released.
bool release(int first, int last, State state) {
  int waiting = 0;
  for (int i = first; i < last; ++i) waiting += fibers[static_cast<size_t>(i)]->state == state;
  if (waiting < last - first) return false;
  if (state == State::kBlock) any = 0;
  for (int i = first; i < last; ++i) {
    if (state == State::kBlock) any |= fibers[static_cast<size_t>(i)]->predicate;
    fibers[static_cast<size_t>(i)]->state = State::kReady;
  }
  return true;
}

void run_block(int threads, std::mt19937& random) {
  std::vector<int> turns(static_cast<size_t>(threads));
  for (int i = 0; i < threads; ++i) turns[static_cast<size_t>(i)] = order == 1 ? threads - 1 - i : i;
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[static_cast<size_t>(i)];
    fiber.state = State::kReady;
    fiber.exchanges = 0;
    fiber.copies.assign(1, {});
    if (fiber.started) continue;
    fiber.context.prepare(fiber.stack.get(), enter);
    fiber.started = true;
  }
  while (true) {
    if (order == 2) std::shuffle(turns.begin(), turns.end(), random);
    bool ran = false, done = true;
    for (const int i : turns) {
      if (fibers[static_cast<size_t>(i)]->state == State::kReady) {
        resume(i);
        ran = true;
        if (fault != nullptr) {
          fibers.clear();
          throw std::runtime_error(std::exchange(fault, nullptr));
        }
      }
      done = done && fibers[static_cast<size_t>(i)]->state == State::kDone;
    }
    if (done) return;
    bool released = release(0, threads, State::kBlock);
    for (int warp = 0; warp < threads; warp += kWarp) released |= release(warp, warp + kWarp, State::kWarpwide);
    if (!ran && !released) {
      fibers.clear();  // they stand in the middle of the kernel
      throw std::runtime_error("a barrier or shuffle in block " + std::to_string(block_index.x) +
                               " was not reached by all threads");
    }
  }
}

}  // namespace

void run(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (block.x % kWarp != 0) throw std::runtime_error("whole warps only");
  while (fibers.size() < block.x) fibers.push_back(std::make_unique<Fiber>());
  grid_size = grid;
  block_size = block;
  body = &kernel;
  std::mt19937 random(0);
  work.emplace_back();
  for (unsigned b = 0; b < grid.x; ++b) {
    block_index.x = order == 1 ? grid.x - 1 - b : b;
    stops = 0;
    run_block(static_cast<int>(block.x), random);
    work.back().all += stops;
    work.back().most = std::max(work.back().most, stops);
  }
}

void barrier() { wait(State::kBlock); }

int barrier_or(int predicate) {
  fibers[static_cast<size_t>(current)]->predicate = predicate;
  wait(State::kBlock);
  const int found = any;
  fibers[static_cast<size_t>(current)]->predicate = 0;
  wait(State::kBlock);
  return found;
}

void warp_barrier() { wait(State::kWarpwide); }

namespace {

// Hands in the lane's value; the slot in which the warp's lanes have theirs when all have handed in.
unsigned hand_in(const void* value, size_t size) {
  if (size > kLargest) throw std::runtime_error("a value of " + std::to_string(size) + " bytes is exchanged");
  Fiber& fiber = *fibers[static_cast<size_t>(current)];
  const unsigned slot = fiber.exchanges++ % 2;
  std::memcpy(fiber.handed[slot], value, size);
  wait(State::kWarpwide);
  return slot;
}
const void* of_lane(int lane, unsigned slot) {
  return fibers[static_cast<size_t>(current - current % kWarp + lane)]->handed[slot];
}

// The sum of exact terms as a tensor core makes it: each is cut off two bits below the last one that a float of the
// largest one's exponent has, and so is the sum at its own last bit. Two is the least that is told of devices.
float cut_sum(const double* terms, int count) {
  double largest = 0.0;
  for (int i = 0; i < count; ++i) {
    if (!(std::fabs(terms[i]) <= largest)) largest = std::fabs(terms[i]);
    if (!std::isfinite(largest)) return static_cast<float>(std::accumulate(terms, terms + count, 0.0));
  }
  if (largest == 0.0) return 0.0F;
  const int last = std::max(std::ilogb(largest), -126) - 25;
  double sum = 0.0;  // exact: 17 terms of 26 bits
  for (int i = 0; i < count; ++i) sum += std::trunc(std::ldexp(terms[i], -last));
  const int length = sum == 0.0 ? 0 : std::ilogb(sum) + 1, over = std::max(length - 24, -149 - last);
  if (over > 0) sum = std::ldexp(std::trunc(std::ldexp(sum, -over)), over);
  return static_cast<float>(std::ldexp(sum, last));  // infinite beyond the range
}

// Element of a column of words: word / 2 of bfloat16, or a word's upper 19 bits.
double element_of(uint32_t word, int half, bool bfloat16) {
  const uint32_t bits = !bfloat16 ? word & 0xffffe000U : half == 0 ? word << 16 : word & 0xffff0000U;
  return static_cast<double>(flatcore::math::bit_cast<float>(bits));
}

}  // namespace

void exchange(void* value, size_t size, int source) {
  const unsigned slot = hand_in(value, size);
  std::memcpy(value, of_lane(source, slot), size);
}

void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4], bool bfloat16) {
  uint32_t mine[6];
  std::memcpy(mine, a, sizeof(a));
  std::memcpy(mine + 4, b, sizeof(b));
  const unsigned slot = hand_in(mine, sizeof(mine));
  const int lane = current % kWarp, halves = bfloat16 ? 2 : 1;
  for (int at = 0; at < 4; ++at) {
    const int row = lane / 4 + 8 * (at / 2), column = 2 * (lane % 4) + at % 2;
    double terms[17];
    int count = 0;
    terms[count++] = static_cast<double>(c[at]);
    for (int word = 0; word < 8; ++word) {
      const auto* left = static_cast<const uint32_t*>(of_lane(4 * (row % 8) + word % 4, slot));
      const auto* right = static_cast<const uint32_t*>(of_lane(4 * column + word % 4, slot));
      for (int half = 0; half < halves; ++half) {
        terms[count++] = element_of(left[row / 8 + 2 * (word / 4)], half, bfloat16) *
                         element_of(right[4 + word / 4], half, bfloat16);
      }
    }
    d[at] = cut_sum(terms, count);
  }
}

void start_copy(void* to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes < 0 ||
      bytes > 16) {
    fault = "a copy is not of up to 16 bytes from and to a 16-byte boundary";
    wait(State::kReady);
  }
  if (__tsan_read_range != nullptr) __tsan_read_range(const_cast<void*>(from), static_cast<size_t>(bytes));
  std::memset(to, 0xff, 16);
  fibers[static_cast<size_t>(current)]->copies.back().push_back({to, from, static_cast<size_t>(bytes)});
}

void end_group() { fibers[static_cast<size_t>(current)]->copies.emplace_back(); }

void wait_for_groups_but(int count) {
  auto& groups = fibers[static_cast<size_t>(current)]->copies;
  while (static_cast<int>(groups.size()) > count + 1) {
    for (const Copy& copy : groups.front()) {
      std::memset(copy.to, 0, 16);
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace emulator

namespace {

// Kernels with a mistake, for a test of the emulator.
void planted_barrier(double*) {
  if (threadIdx.x < 40) __syncthreads();
}
void planted_shuffle(double* out) {
  if (threadIdx.x != 3) *out = __shfl_sync(0xffffffffU, 1.0, 0);
}
void planted_race(double* out) {
  __shared__ double last;
  last = threadIdx.x;
  __syncthreads();
  *out = last;
}
void planted_none(double* out) {
  __shared__ double last[64];
  last[threadIdx.x] = threadIdx.x;
  __syncthreads();
  *out = last[63 - threadIdx.x] + threadIdx.x;
}
// A copy that is read before it was waited for, one that is waited for, and one to where no copy may go.
template <bool waited, int offset>
void planted_copy(double* out) {
  using namespace flatcore::cuda;
  alignas(16) static const double from[2] = {3.0, 4.0};
  alignas(16) __shared__ double to[64][4];
  start_copy<false>(reinterpret_cast<char*>(to[threadIdx.x]) + offset, from, 16);
  end_group();
  start_copy<false>(&to[threadIdx.x][2], from, 8);
  end_group();
  wait_for_groups_but<waited ? 1 : 2>();
  *out = to[threadIdx.x][1];
}

double planted(const std::string& name) {
  double out = 0.0;
  const auto kernel = name == "barrier"   ? planted_barrier
                      : name == "shuffle" ? planted_shuffle
                      : name == "race"    ? planted_race
                      : name == "copy"    ? planted_copy<true, 0>
                      : name == "no wait" ? planted_copy<false, 0>
                      : name == "address" ? planted_copy<true, 8>
                                          : planted_none;
  emulator::run(dim3(1), dim3(64), [&] { kernel(&out); });
  return out;
}

using flatcore::bind::pointer;

// The product of two vectors of bfloat16 on a tensor core, D a multiple of 16: one sum in its accumulator, or a float
// that takes every 16 columns.
float tensor_sum(uintptr_t x, uintptr_t w, int64_t D, bool carried) {
  float out = 0.0F;
  emulator::run(dim3(1), dim3(32), [&] {
    const unsigned row = threadIdx.x / 4, part = threadIdx.x % 4;
    float sum[4] = {}, total = 0.0F;
    for (int64_t d = 0; d < D; d += 16) {
      const uint32_t *a = pointer<const uint32_t>(w) + d / 2, *b = pointer<const uint32_t>(x) + d / 2;
      const uint32_t left[4] = {row == 0 ? a[part] : 0, 0, row == 0 ? a[part + 4] : 0, 0};
      const uint32_t right[2] = {row == 0 ? b[part] : 0, row == 0 ? b[part + 4] : 0};
      const float before[4] = {carried ? 0.0F : sum[0], 0.0F, 0.0F, 0.0F};
      flatcore::cuda::multiply_add<flatcore::BHalf>(sum, left, right, before);
      total = carried ? total + sum[0] : sum[0];
    }
    if (threadIdx.x == 0) out = total;
  });
  return out;
}

void narrow_halves(uintptr_t x, uintptr_t half, uintptr_t bhalf, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    pointer<flatcore::Half>(half)[i] = flatcore::cuda::Narrowed<flatcore::Half>::of(pointer<float>(x)[i]);
    pointer<flatcore::BHalf>(bhalf)[i] = flatcore::cuda::Narrowed<flatcore::BHalf>::of(pointer<float>(x)[i]);
  }
}

void widen_halves(uintptr_t bits, uintptr_t half, uintptr_t bhalf, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    pointer<double>(half)[i] = static_cast<double>(flatcore::cuda::widened(pointer<flatcore::Half>(bits)[i]));
    pointer<double>(bhalf)[i] = static_cast<double>(flatcore::cuda::widened(pointer<flatcore::BHalf>(bits)[i]));
  }
}

// Kernels whose attributes were asked for, as addresses in this module's file; a call of it forgets them.
pybind11::list loaded(emulator::Devices& all) {
  pybind11::list found;
  for (const void* kernel : all.loaded) {
    Dl_info where;
    if (dladdr(kernel, &where) == 0) throw std::runtime_error("a kernel lies in no module");
    found.append(reinterpret_cast<uintptr_t>(kernel) - reinterpret_cast<uintptr_t>(where.dli_fbase));
  }
  all.loaded.clear();
  return found;
}

}  // namespace

PYBIND11_MODULE(cuda_emulated, module) {
  module.def(
      "set_order", [](int order) { emulator::order = order; }, pybind11::arg("order"),
      "0: threads in order, 1: backwards, 2: shuffled anew between barriers.");
  module.def(
      "work",
      [] {
        pybind11::list found;
        for (const emulator::Work& launch : emulator::work) found.append(pybind11::make_tuple(launch.all, launch.most));
        emulator::work.clear();
        return found;
      },
      "Of the launches since the last call: how often threads stopped, in all blocks and in the busiest one.");
  module.def("planted", &planted, pybind11::arg("name"));
  module.def("tensor_sum", &tensor_sum, pybind11::arg("x"), pybind11::arg("w"), pybind11::arg("D"),
             pybind11::arg("carried"));
  using emulator::Devices;
  pybind11::class_<Devices>(module, "Devices", pybind11::module_local())
      .def_readwrite("current", &Devices::current)
      .def_readonly("queries", &Devices::queries)
      .def_property_readonly("loaded", &loaded)
      .def_readonly("launches", &Devices::launches)
      .def_readwrite("dry", &Devices::dry)
      .def_property_readonly("active",
                             [](const Devices& all) { return pybind11::make_tuple(all.active[0], all.active[1]); })
      .def("set",
           [](Devices& all, int device, bool active, int capability) {
             all.active[device] = active;
             all.capability[device] = capability;
           })
      .def("plant", [](Devices& all, int image) { all.image = static_cast<cudaError_t>(image); });
  module.attr("devices") = pybind11::cast(&emulator::devices, pybind11::return_value_policy::reference);
  module.def("narrow_halves", &narrow_halves);
  module.def("widen_halves", &widen_halves);
  flatcore::bind::register_exchange(module);
  flatcore::bind::register_head_problem(module);
  flatcore::bind::register_cuda(module);
}
