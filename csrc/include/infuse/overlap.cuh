// Programmatic dependent launch, seen from the kernels; no-ops before compute capability 9.0. See Launch::starts_early.
#pragma once

namespace infuse {

// Returns when all that the previous kernel of the stream wrote can be read. To be called by every thread that reads
// or writes global memory, before it does.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel start once every CTA of this one has called it or ended. That kernel waits for the end of this
// one by itself, so it is safe anywhere; best where the CTA's last loads have been issued.
__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Brings `bytes`, a multiple of 16, into the L2. Reads nothing, so it may come before wait_for_previous_kernel.
__device__ __forceinline__ void prefetch_to_l2([[maybe_unused]] const void* address, [[maybe_unused]] unsigned bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address), "r"(bytes) : "memory");
#endif
}

}  // namespace infuse
