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

// With OpenMP the threads are those of torch, which has loaded the same runtime: threads of another would wait for torch's to stop
// spinning after each of its ops.
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

void make_present(void* memory, std::int64_t bytes, int threads) {
#if defined(__linux__)
  constexpr int populate_write = 23;  // MADV_POPULATE_WRITE of Linux 5.14; an older one refuses, and nothing is lost
  // MADV_HUGEPAGE is not asked for: where 2 MiB in one piece are rare, the kernel looks for them ten times as long as this takes.
  static const std::uintptr_t page = sysconf(_SC_PAGESIZE);
  constexpr std::uintptr_t part = 4 << 20;
  struct Range {
    std::uintptr_t first, end;
  } range{reinterpret_cast<std::uintptr_t>(memory) / page * page, reinterpret_cast<std::uintptr_t>(memory) + bytes};
  const std::uintptr_t size = range.end - range.first;
  if (size < part) return;  // so little is not worth the calls
  const auto populate = [](void* context, std::int64_t i, int) {
    const Range& range = *static_cast<Range*>(context);
    const std::uintptr_t at = range.first + i * part, left = range.end - at;
    madvise(reinterpret_cast<void*>(at), left < part ? left : part, populate_write);
  };
  parallel_for(threads, static_cast<std::int64_t>((size + part - 1) / part), populate, &range);
#else
  (void)memory, (void)bytes, (void)threads;
#endif
}

}  // namespace bupo::cpu
