#include <atomic>

#include "kernels.h"

#ifndef _OPENMP
#include <thread>
#include <vector>
#endif

namespace bupo::cpu {

// With OpenMP these are torch's own threads: it has loaded the same runtime, and threads of another would wait for its own to stop
// spinning after each torch op.
void parallel_for(int threads, std::int64_t tasks, void (*task)(void*, std::int64_t, int), void* context) {
  std::atomic<std::int64_t> next{0};
  const auto work = [&](int worker) {
    for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) task(context, i, worker);
  };
  if (tasks < threads) threads = static_cast<int>(tasks);
  if (threads <= 1) return work(0);
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int worker = 0; worker < threads; worker++) work(worker);
#else
  std::vector<std::thread> others;
  for (int worker = 1; worker < threads; worker++) others.emplace_back(work, worker);
  work(0);
  for (auto& other : others) other.join();
#endif
}

}  // namespace bupo::cpu
