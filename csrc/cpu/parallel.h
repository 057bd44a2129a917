// Tasks over threads: the one place that talks to OpenMP.
#pragma once

#include <cstdint>

namespace flatcore::cpu {

// Calls body(context, task, thread) for every task in 0..tasks-1 on at most `threads` threads, thread < threads.
// Runs in the calling thread for one thread or one task, and always in a child after fork, where the parent's team is
// gone and a parallel region would wait for it for ever.
void run_parallel(int threads, int64_t tasks, void (*body)(const void* context, int64_t task, int thread),
                  const void* context);

template <class Body>
inline void parallel_for(int threads, int64_t tasks, const Body& body) {
  run_parallel(
      threads, tasks,
      [](const void* context, int64_t task, int thread) { (*static_cast<const Body*>(context))(task, thread); }, &body);
}

}  // namespace flatcore::cpu
