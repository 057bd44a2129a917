#include "cpu/parallel.h"

#include <omp.h>
#include <pthread.h>

#include <atomic>

namespace flatcore::cpu {
namespace {

std::atomic<bool> forked{false};
const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });

}  // namespace

void run_parallel(int threads, int64_t tasks, void (*body)(const void*, int64_t, int), const void* context) {
  if (threads <= 1 || tasks <= 1 || registered != 0 || forked.load(std::memory_order_relaxed)) {
    for (int64_t task = 0; task < tasks; ++task) body(context, task, 0);
    return;
  }
  const int team = tasks < threads ? static_cast<int>(tasks) : threads;
  // Dynamic: on shared machines one core is often slower. Which thread runs a task never changes its numbers.
#pragma omp parallel for num_threads(team) schedule(dynamic, 1)
  for (int64_t task = 0; task < tasks; ++task) body(context, task, omp_get_thread_num());
}

}  // namespace flatcore::cpu
