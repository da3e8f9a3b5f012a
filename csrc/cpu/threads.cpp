#include <atomic>

#include "kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

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

void make_present(void* memory, std::int64_t bytes) {
#if defined(__linux__)
  constexpr int populate_write = 23;  // MADV_POPULATE_WRITE of Linux 5.14; an older one refuses, and nothing is lost
  constexpr std::uintptr_t huge = 2 << 20;
  static const std::uintptr_t page = sysconf(_SC_PAGESIZE);
  const std::uintptr_t first = reinterpret_cast<std::uintptr_t>(memory), end = first + bytes;
  const std::uintptr_t first_huge = (first + huge - 1) / huge * huge, end_huge = end / huge * huge;
  if (first_huge >= end_huge) return;  // so little is not worth the calls
  madvise(reinterpret_cast<void*>(first_huge), end_huge - first_huge, MADV_HUGEPAGE);
  madvise(reinterpret_cast<void*>(first / page * page), end - first / page * page, populate_write);
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace bupo::cpu
