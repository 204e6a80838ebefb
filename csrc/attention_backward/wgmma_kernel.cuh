// Gradients of keys and values, and sums of those of queries, by TMA and wgmma (sm_90a).
#pragma once

#include "attention_backward/wgmma_consumer.cuh"
#include "infuse/overlap.cuh"

namespace infuse::attention_backward {

// Code for something else than 9.0a is empty, and cannot be launched: has_wgmma asks how many threads it takes.
template <typename Sizes>
constexpr int threads_of_kernel() {
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
  return 32;
#else
  return Sizes::kThreads;
#endif
}

template <typename T, typename Sizes>
__global__ void __launch_bounds__(threads_of_kernel<Sizes>(), 1)
    wgmma_backward_kernel(const __grid_constant__ WgmmaParams params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const SharedAddress shared = (dynamic_shared_memory() + 1023) & ~1023u;
  const Barriers<Sizes> barriers{shared + Sizes::kBarriers};
  if (threadIdx.x == 0) barriers.init();
  __syncthreads();
  if (threadIdx.x < 128) {
    give_up_registers<24>();
    if (threadIdx.x == 0) {
      wait_for_previous_kernel();
      produce<Sizes>(params, shared, barriers);
    }
  } else {
    take_registers<240>();
    wait_for_previous_kernel();
    Consumer<T, Sizes>(params.common, shared, barriers).run();
  }
#endif
}

}  // namespace infuse::attention_backward
