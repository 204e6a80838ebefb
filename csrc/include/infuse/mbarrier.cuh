// Barriers in shared memory that count arrivals and bytes (mbarrier), barriers of a part of a CTA that some threads only
// arrive at, and the split of registers among warpgroups (sm_90).
//
// An mbarrier is 8 bytes. Its phases complete in turn: wait(address, parity) returns once the phase of that parity is
// complete, so the first wait for parity 0 returns after the first phase and a wait for parity 1 on a fresh barrier
// returns at once.
#pragma once

#include <cstdint>

#include "infuse/async_copy.cuh"

namespace infuse {

constexpr int kBarrierBytes = 8;

// A phase completes after `arrivals` arrivals and all bytes that were announced. By one thread; then
// publish_barriers and a barrier of the CTA before anyone uses it.
__device__ __forceinline__ void init_barrier(SharedAddress barrier, std::uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrive(SharedAddress barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and announces bytes that copies will bring.
__device__ __forceinline__ void arrive_expecting(SharedAddress barrier, std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// parity: 0 or 1.
__device__ __forceinline__ void wait(SharedAddress barrier, std::uint32_t parity) {
  asm volatile(
      "{\n"
      "  .reg .pred done;\n"
      "again:\n"
      "  mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "  @done bra finished;\n"
      "  bra again;\n"
      "finished:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Place in a ring of kStages buffers, each with a barrier that says it is full and one that says it is empty.
template <int kStages>
struct RingPlace {
  std::uint32_t stage = 0, parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Named barriers 0 to 15 of the hardware; 0 is that of __syncthreads. `threads` counts those that wait and those that
// only arrive, a multiple of 32.
__device__ __forceinline__ void wait_at_named(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void arrive_at_named(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// Registers of each thread from here on, a multiple of 8; executed by all warps of a warpgroup.
template <int kRegisters>
__device__ __forceinline__ void give_up_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
#endif

}  // namespace infuse
