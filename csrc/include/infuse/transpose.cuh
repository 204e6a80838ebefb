// Exchanges of words among neighbouring lanes.
#pragma once

#include <cstdint>

namespace infuse {

// Turns words[i] of lane j into words[j] of lane i, within each four lanes. Called by all lanes of a warp. What lane j
// holds of four 8-column blocks of a product's rows (infuse/mma.cuh, infuse/wgmma.cuh) becomes all of block j.
__device__ __forceinline__ void transpose_in_four(std::uint32_t (&words)[4]) {
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool is_upper = (threadIdx.x & distance) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & distance) != 0) continue;
      const std::uint32_t other =
          __shfl_xor_sync(0xffffffffu, is_upper ? words[i] : words[i + distance], distance);
      (is_upper ? words[i] : words[i + distance]) = other;
    }
  }
}

}  // namespace infuse
