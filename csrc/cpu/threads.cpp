#include <atomic>

#include "kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
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

#if defined(__linux__)
// Returns how many bytes the kernel has free in pieces of 2 MiB and more, of pages of 4 KiB: a line of a zone of memory has a number for
// each power of two of them.
static std::uintptr_t free_in_huge_pages() {
  std::FILE* file = std::fopen("/proc/buddyinfo", "re");
  if (!file) return 0;
  std::uintptr_t bytes = 0;
  for (char line[512]; std::fgets(line, sizeof(line), file);) {
    const char* at = std::strstr(line, "zone");
    if (!at) continue;
    at += std::strcspn(at, " "), at += std::strspn(at, " "), at += std::strcspn(at, " ");  // past the name, which is a word
    char* end = nullptr;
    for (int order = 0;; order++, at = end) {
      const long count = std::strtol(at, &end, 10);
      if (end == at) break;
      if (order >= 9) bytes += static_cast<std::uintptr_t>(count) << (12 + order);
    }
  }
  std::fclose(file);
  return bytes;
}
#endif

void make_present(void* memory, std::int64_t bytes, int threads) {
#if defined(__linux__)
  constexpr int populate_write = 23;  // MADV_POPULATE_WRITE of Linux 5.14; an older one refuses, and nothing is lost
  static const std::uintptr_t page = sysconf(_SC_PAGESIZE);
  constexpr std::uintptr_t part = 4 << 20;
  struct Range {
    std::uintptr_t first, end;
  } range{reinterpret_cast<std::uintptr_t>(memory) / page * page, reinterpret_cast<std::uintptr_t>(memory) + bytes};
  const std::uintptr_t size = range.end - range.first;
  if (size < part) return;  // so little is not worth the calls
  // Huge pages take a third of the time, but ten times as long where the kernel has to make room for them: so only where it has them.
  // From 32 MiB on glibc's memory is mapped for its owner alone, and nobody else's pages become huge.
  constexpr std::uintptr_t huge = 2 << 20;
  if (size >= 32 << 20 && page == 4096 && free_in_huge_pages() > size + size / 2) {
    const std::uintptr_t first = (range.first + huge - 1) / huge * huge;
    madvise(reinterpret_cast<void*>(first), (range.end - first) / huge * huge, MADV_HUGEPAGE);
  }
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
