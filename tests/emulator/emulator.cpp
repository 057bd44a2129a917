// The scheduler of the emulated threads, and a module with the bindings of the CUDA kernels compiled for the host.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind/bind.h"
#include "cuda_runtime.h"

namespace emulator {

thread_local dim3 thread_index, block_index, grid_size, block_size;

namespace {

constexpr size_t kStack = 256 << 10;
constexpr int kWarp = 32;
enum class State { kReady, kBlock, kWarpwide, kDone };

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;
  jmp_buf resume;
  bool started = false;
  State state = State::kReady;
  int predicate = 0;
  uint32_t handed[2] = {0, 0};  // alternately, so that a lane that runs ahead leaves the last exchange's value
  unsigned exchanges = 0;
};

thread_local std::vector<std::unique_ptr<Fiber>> fibers;
thread_local int current = 0, any = 0;
thread_local jmp_buf scheduler;
thread_local const std::function<void()>* body = nullptr;
int order = 0;

void enter() {
  (*body)();
  fibers[static_cast<size_t>(current)]->state = State::kDone;
  _longjmp(scheduler, 1);
}

// Not inlined: what a longjmp may leave of the caller's registers is then its own affair.
__attribute__((noinline)) void resume(int index) {
  current = index;
  thread_index.x = static_cast<unsigned>(index);
  Fiber& fiber = *fibers[static_cast<size_t>(index)];
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

__attribute__((noinline)) void wait(State state) {
  Fiber& fiber = *fibers[static_cast<size_t>(current)];
  fiber.state = state;
  if (_setjmp(fiber.resume) == 0) _longjmp(scheduler, 1);
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
    fiber.started = false;
    fiber.state = State::kReady;
    fiber.exchanges = 0;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, enter, 0);
  }
  while (true) {
    if (order == 2) std::shuffle(turns.begin(), turns.end(), random);
    bool ran = false, done = true;
    for (const int i : turns) {
      if (fibers[static_cast<size_t>(i)]->state == State::kReady) {
        resume(i);
        ran = true;
      }
      done = done && fibers[static_cast<size_t>(i)]->state == State::kDone;
    }
    if (done) return;
    bool released = release(0, threads, State::kBlock);
    for (int warp = 0; warp < threads; warp += kWarp) released |= release(warp, warp + kWarp, State::kWarpwide);
    if (!ran && !released) {
      throw std::runtime_error("a barrier or shuffle in block " + std::to_string(block_index.x) +
                               " was not reached by all threads");
    }
  }
}

}  // namespace

void run(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  if (block.x % kWarp != 0) throw std::runtime_error("whole warps only");
  while (fibers.size() < block.x) fibers.push_back(std::make_unique<Fiber>());
  grid_size = grid;
  block_size = block;
  body = &kernel;
  std::mt19937 random(0);
  for (unsigned b = 0; b < grid.x; ++b) {
    block_index.x = order == 1 ? grid.x - 1 - b : b;
    run_block(static_cast<int>(block.x), random);
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

uint32_t exchange(uint32_t value, int source) {
  Fiber& fiber = *fibers[static_cast<size_t>(current)];
  const unsigned slot = fiber.exchanges++ % 2;
  fiber.handed[slot] = value;
  const int first = current - current % kWarp;
  wait(State::kWarpwide);
  return fibers[static_cast<size_t>(first + source)]->handed[slot];
}

}  // namespace emulator

PYBIND11_MODULE(cuda_emulated, module) {
  module.def(
      "set_order", [](int order) { emulator::order = order; }, pybind11::arg("order"),
      "0: threads in order, 1: backwards, 2: shuffled anew between barriers.");
  flatcore::bind::register_head_problem(module);
  flatcore::bind::register_cuda(module);
}
