// Barriers of a part of a CTA.
#pragma once

namespace infuse {

constexpr int kMaxGroupBarriers = 15;  // hardware has 16, of which __syncthreads takes number 0

// Waits for all `threads` threads of a group, a multiple of 32. `group` < kMaxGroupBarriers.
__device__ __forceinline__ void sync_group(int group, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "r"(threads) : "memory");
}

}  // namespace infuse
