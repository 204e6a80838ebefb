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
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(48 * 1024);
  Index index;
  float exchanged;  // by a shuffle
  long switches;
  bool done;
  std::vector<std::vector<Copy>> copy_groups;  // under way, oldest first; the last one is still open
};

struct Range {
  const char* first;
  const char* last;  // behind the end
};

inline std::vector<Fiber> fibers;
inline std::size_t current;
inline ucontext_t scheduler;
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

inline void wait_for_all() {
  Fiber& fiber = fibers[current];
  ++fiber.switches;
  swapcontext(&fiber.context, &scheduler);
}

inline void run_fiber() {
  body();
  fibers[current].done = true;
  swapcontext(&fibers[current].context, &scheduler);
}

}  // namespace emulation

inline emulation::Index threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { emulation::wait_for_all(); }

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  using namespace emulation;
  fibers[current].exchanged = value;
  wait_for_all();
  const float got = fibers[current ^ static_cast<std::size_t>(mask)].exchanged;
  wait_for_all();
  return got;
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
      fiber.switches = 0;
      fiber.done = false;
      fiber.copy_groups.assign(1, {});
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = &scheduler;
      makecontext(&fiber.context, run_fiber, 0);
    }
    for (bool any = true; any;) {
      any = false;
      for (current = 0; current < fibers.size(); ++current) {
        if (fibers[current].done) continue;
        any = true;
        threadIdx = fibers[current].index;
        swapcontext(&scheduler, &fibers[current].context);
      }
    }
    for (const Fiber& fiber : fibers) {
      if (fiber.switches != fibers[0].switches) die("a barrier or shuffle that not all threads of the CTA reach");
      if (fiber.copy_groups.size() > 1 || !fiber.copy_groups[0].empty()) die("copies under way at the end");
    }
  }
}

template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, unsigned grid, Index block, const Arguments&... arguments) {
  launch(kernel, Index{grid}, block, arguments...);
}

}  // namespace emulation
