// Runs CUDA kernels on the CPU, one CTA after the other, so that their logic is tested where there is no GPU.
//
// Each CUDA thread is a fiber; barriers and shuffles switch to the next one. That suffices for kernels in which every
// thread of the CTA takes part in every barrier and shuffle, and it finds those in which not: the counts then differ.
// Loads and stores go through emulation/infuse/memory.cuh, which checks bounds and alignment. It shows nothing of
// races, of the memory model or of speed.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#undef __device__
#undef __forceinline__
#undef __global__
#undef __grid_constant__
#undef __launch_bounds__
#undef __shared__
#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

namespace emulation {

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

// From global to shared memory; takes place when it is waited for, as late as hardware may make it.
struct Copy {
  char* shared;
  const char* source;
  std::size_t bytes;
};

struct Fiber {
  jmp_buf place;  // where it goes on; a switch of contexts would be a system call each
  std::vector<char> stack = std::vector<char>(48 * 1024);
  bool is_started = false;
  Index index;
  float exchanged[2];  // by a shuffle and by the next one
  long switches, shuffles;
  bool done;
  std::vector<std::vector<Copy>> copy_groups;  // under way, oldest first; the last one is still open
};

struct Range {
  const char* first;
  const char* last;  // behind the end
};

inline std::vector<Fiber> fibers;
inline std::size_t current;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline std::vector<Range> ranges;  // that kernels may touch
inline std::vector<char> shared_memory;  // dynamic

[[noreturn]] inline void die(const char* what) {
  std::printf("FAILED: %s\n", what);
  std::exit(1);
}

inline void check_access(const void* address, std::size_t bytes, std::size_t alignment) {
  const char* first = static_cast<const char*>(address);
  if (reinterpret_cast<std::uintptr_t>(address) % alignment != 0) die("misaligned access");
  for (const Range& range : ranges) {
    if (first >= range.first && first + bytes <= range.last) return;
  }
  die("access out of bounds");
}

inline void give_way() {
  if (_setjmp(fibers[current].place) == 0) _longjmp(scheduler, 1);
}

inline void wait_for_all() {
  ++fibers[current].switches;
  give_way();
}

inline void run_fiber() {
  for (;;) {  // CTA after CTA
    body();
    fibers[current].done = true;
    give_way();
  }
}

inline void start(Fiber& fiber) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.data();
  context.uc_stack.ss_size = fiber.stack.size();
  context.uc_link = nullptr;
  makecontext(&context, run_fiber, 0);
  setcontext(&context);
}

inline void run_until_it_gives_way(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.is_started) _longjmp(fiber.place, 1);
  fiber.is_started = true;
  start(fiber);
}

}  // namespace emulation

inline emulation::Index threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { emulation::wait_for_all(); }

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  using namespace emulation;
  // The next shuffle writes elsewhere, and the one after it only when all have read this.
  const long slot = fibers[current].shuffles++ % 2;
  fibers[current].exchanged[slot] = value;
  wait_for_all();
  return fibers[current ^ static_cast<std::size_t>(mask)].exchanged[slot];
}

inline float __shfl_sync(unsigned, float value, int lane) {
  using namespace emulation;
  const long slot = fibers[current].shuffles++ % 2;
  fibers[current].exchanged[slot] = value;
  wait_for_all();
  return fibers[current / 32 * 32 + static_cast<std::size_t>(lane % 32)].exchanged[slot];
}

template <typename T>
T __ldg(const T* address) {
  emulation::check_access(address, sizeof(T), alignof(T));
  return *address;
}

[[noreturn]] inline void __trap() { emulation::die("__trap"); }

inline float __uint_as_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline std::uint32_t __float_as_uint(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline float __expf(float value) { return std::exp(value); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }

namespace emulation {

inline void set_shared_memory(std::size_t bytes) {
  shared_memory.assign(bytes, '\xff');  // NaN, in every dtype
}

template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, Index grid, Index block, const Arguments&... arguments) {
  gridDim = grid;
  blockDim = block;
  fibers.resize(block.x * block.y);
  body = [&] { kernel(arguments...); };
  for (unsigned cta = 0; cta < grid.x * grid.y; ++cta) {
    blockIdx = {cta % grid.x, cta / grid.x, 0};
    for (std::size_t i = 0; i < fibers.size(); ++i) {
      Fiber& fiber = fibers[i];
      fiber.index = {static_cast<unsigned>(i) % block.x, static_cast<unsigned>(i) / block.x, 0};
      fiber.switches = fiber.shuffles = 0;
      fiber.done = false;
      fiber.copy_groups.assign(1, {});
    }
    for (bool any = true; any;) {
      any = false;
      for (current = 0; current < fibers.size(); ++current) {
        if (fibers[current].done) continue;
        any = true;
        threadIdx = fibers[current].index;
        run_until_it_gives_way(fibers[current]);
      }
    }
    for (const Fiber& fiber : fibers) {
      if (fiber.switches != fibers[0].switches || fiber.shuffles != fibers[0].shuffles) {
        die("a barrier or shuffle that not all threads of the CTA reach");
      }
      if (fiber.copy_groups.size() > 1 || !fiber.copy_groups[0].empty()) die("copies under way at the end");
    }
  }
}

template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, unsigned grid, Index block, const Arguments&... arguments) {
  launch(kernel, Index{grid}, block, arguments...);
}

}  // namespace emulation
