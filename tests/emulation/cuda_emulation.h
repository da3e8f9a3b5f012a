// The words of CUDA that csrc/cuda uses, for a host compiler: every thread of a block is a fiber, blocks run one after the other.
//
// A fiber runs until it waits: at a barrier for the block, in a shuffle for its warp. What a GPU leaves undefined is an error here:
// a thread that ends, or waits elsewhere, while others wait for it, and 16-byte words that lie on no multiple of 16. What depends
// on the order in which threads happen to run (a missing barrier) differs between `ascending` and descending order.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

struct Word16 {  // not declared aligned, or the compiler would take the check for granted
  uint32_t x, y, z, w;
  Word16() = default;
  Word16(const Word16& from) { *this = from; }
  Word16& operator=(const Word16& from) {
    for (const void* end : {static_cast<const void*>(&from), static_cast<const void*>(this)})
      if (!on_stack(end) && reinterpret_cast<uintptr_t>(end) % 16)
        throw std::runtime_error("a 16-byte word at a misaligned address");
    memcpy(static_cast<void*>(this), &from, sizeof from);
    return *this;
  }
  static bool on_stack(const void* pointer);  // a register of the GPU's
};

enum class Wait { nothing, warp, block, end };

struct Fiber {
  static constexpr size_t stack_bytes = 64 << 10;
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  ucontext_t start;
  jmp_buf resume;
  bool started;
  Wait wait;
  const char* where;
  unsigned exchanges;
};

struct Warp {
  uint64_t values[2][32];  // of the last two exchanges: one thread may be a whole one ahead of another
};

struct Machine {
  dim3 thread, block, block_size, grid;
  bool ascending = true;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::function<void()> kernel;
  jmp_buf scheduler;
  std::exception_ptr error;
  int current;
};

inline Machine machine;

inline bool Word16::on_stack(const void* pointer) {
  const char* stack = machine.fibers[machine.current].stack.get();
  return pointer >= stack && pointer < stack + Fiber::stack_bytes;
}

inline void wait(Wait what, const char* where) {
  Fiber& fiber = machine.fibers[machine.current];
  fiber.wait = what;
  fiber.where = where;
  if (_setjmp(fiber.resume) == 0) _longjmp(machine.scheduler, 1);
}

inline void run_fiber() {
  try {
    machine.kernel();
  } catch (...) {
    machine.error = std::current_exception();
  }
  machine.fibers[machine.current].wait = Wait::end;
  _longjmp(machine.scheduler, 1);
}

inline void resume(int thread) {
  machine.current = thread;
  machine.thread.x = thread;
  Fiber& fiber = machine.fibers[thread];
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Lets those go on for whom all of [first, last) have arrived.
inline bool release(Wait what, int first, int last) {
  for (int i = first; i < last; ++i) {
    const Fiber& fiber = machine.fibers[i];
    if (fiber.wait != what || fiber.where != machine.fibers[first].where) return false;
  }
  for (int i = first; i < last; ++i) machine.fibers[i].wait = Wait::nothing;
  return true;
}

inline std::string stuck(int threads) {
  int ended = 0, in_warp = 0, at_block = 0;
  for (int i = 0; i < threads; ++i) {
    const Wait wait = machine.fibers[i].wait;
    ended += wait == Wait::end, in_warp += wait == Wait::warp, at_block += wait == Wait::block;
  }
  return "of " + std::to_string(threads) + " threads " + std::to_string(at_block) + " wait for the block, " +
         std::to_string(in_warp) + " for their warp, and " + std::to_string(ended) + " have ended";
}

inline void run_block(int threads) {
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = Fiber::stack_bytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, run_fiber, 0);
    fiber.started = false;
    fiber.wait = Wait::nothing;
    fiber.exchanges = 0;
  }
  for (int left = threads; left > 0;) {
    bool moved = false;
    for (int i = 0; i < threads; ++i) {
      const int thread = machine.ascending ? i : threads - 1 - i;
      Fiber& fiber = machine.fibers[thread];
      if (fiber.wait != Wait::nothing) continue;
      moved = true;
      resume(thread);
      if (machine.error) std::rethrow_exception(std::exchange(machine.error, nullptr));
      left -= fiber.wait == Wait::end;
      if (fiber.wait == Wait::warp) release(Wait::warp, thread / 32 * 32, thread / 32 * 32 + 32);
      if (fiber.wait == Wait::block) release(Wait::block, 0, threads);
    }
    if (!moved) throw std::runtime_error(stuck(threads));
  }
}

template <class T>
T shuffle_down(const char* where, unsigned mask, T value, int distance) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "");
  if (mask != 0xffffffffu) throw std::runtime_error("only whole warps are emulated");
  Fiber& fiber = machine.fibers[machine.current];
  uint64_t (&values)[32] = machine.warps[machine.current / 32].values[fiber.exchanges++ % 2];
  const int lane = machine.current % 32, from = lane + distance;
  memcpy(&values[lane], &value, sizeof value);
  wait(Wait::warp, where);
  if (from < 32) memcpy(&value, &values[from], sizeof value);
  return value;
}

}  // namespace emulation

using uint4 = emulation::Word16;

#define threadIdx (emulation::machine.thread)
#define blockIdx (emulation::machine.block)
#define blockDim (emulation::machine.block_size)
#define gridDim (emulation::machine.grid)

#define BUPO_TEXT_(x) #x
#define BUPO_TEXT(x) BUPO_TEXT_(x)
#define BUPO_HERE __FILE__ ":" BUPO_TEXT(__LINE__)
#define __syncthreads() emulation::wait(emulation::Wait::block, BUPO_HERE)
#define __syncwarp() emulation::wait(emulation::Wait::warp, BUPO_HERE)
#define __shfl_down_sync(mask, value, distance) emulation::shuffle_down(BUPO_HERE, mask, value, distance)

namespace bupo::cuda {

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 blocks, int threads, void*, const Arguments&... arguments) {
  using namespace emulation;
  if (threads < 32 || threads > 1024 || threads % 32) throw std::runtime_error(std::string(name) + ": blocks of whole warps only");
  while (static_cast<int>(machine.fibers.size()) < threads) machine.fibers.emplace_back();
  machine.warps.resize(threads / 32);
  machine.block_size = dim3(threads);
  machine.grid = blocks;
  machine.kernel = [&] { kernel(arguments...); };
  const unsigned count = blocks.x * blocks.y;
  try {
    for (unsigned i = 0; i < count; ++i) {
      const unsigned index = machine.ascending ? i : count - 1 - i;
      machine.block = dim3(index % blocks.x, index / blocks.x, 0);
      run_block(threads);
    }
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(std::string(name) + ": " + error.what());
  }
}

}  // namespace bupo::cuda
