// Products of 9 to 64 rows by warpgroups (wgmma): the weights are the operand with many rows, 64 features of a warpgroup,
// and x the narrow one. Two warpgroups have 128 features of each operand, or share the columns of 64.
#pragma once

#include <cstdint>

#include "infuse/reduce.cuh"
#include "infuse/wgmma.cuh"
#include "skinny_linear/ring.cuh"

namespace infuse::skinny_linear {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The high half of all matrices here; the low half counts in units of 16 bytes.
__device__ __forceinline__ std::uint64_t matrix_of(std::uint32_t low) {
  return (matrix_by_rows(0) >> 32 << 32) | low;
}

// An address has the CTA's number in the cluster in its upper bits, which a matrix has not.
__device__ __forceinline__ std::uint32_t low_half(SharedAddress address) {
  return static_cast<std::uint32_t>(matrix_by_rows(address));
}

// Multiplies the stages of a group of columns: every stage, or every second. Sums are left in registers.
template <typename Traits>
__device__ __forceinline__ void multiply_stages(const Params& params, const Ring& ring, std::uint32_t group,
                                                std::uint32_t column_group,
                                                float (&sums)[Traits::kOperands][Traits::kColumns / 2]) {
  using T = typename Traits::T;
  constexpr int kColumns = Traits::kColumns, kXBlock = kColumns * kBlockRowBytes / 16;
  const std::uint32_t weights_block = params.tile_rows * kBlockRowBytes / 16, second = params.blocks * weights_block;
  const std::uint32_t own = low_half(ring.start) + group * (kGroupRows * kBlockRowBytes / 16);
#pragma unroll
  for (int operand = 0; operand < Traits::kOperands; ++operand) {
#pragma unroll
    for (float& sum : sums[operand]) sum = 0.0f;
  }
  std::uint32_t stage = column_group, parity = 0;
#pragma unroll 1
  for (std::uint32_t i = ring.first + column_group; i < ring.end; i += params.column_groups) {
    if (stage >= params.stages) {
      stage -= params.stages;
      parity ^= 1;
    }
    const std::uint32_t place = stage * (params.stage_bytes / 16);
    std::uint32_t weights = own + place, x = low_half(ring.start) + place + params.x_offset / 16;
    wait(ring.full(stage), parity);
    __syncwarp();
    fence_products();
#pragma unroll 1
    for (std::uint32_t block = 0; block < params.blocks; ++block) {
#pragma unroll
      for (int step = 0; step < kBlockColumns / 16; ++step) {
        const std::uint64_t b = matrix_of(x + step * 2);
        multiply<T, kColumns>(sums[0], matrix_of(weights + step * 2), b, true);
        if constexpr (Traits::kGated) multiply<T, kColumns>(sums[1], matrix_of(weights + second + step * 2), b, true);
      }
      weights += weights_block;
      x += kXBlock;
    }
    end_products();
    wait_for_products<0>();
    if (threadIdx.x % kWarpSize == 0) arrive(ring.empty(stage));
    stage += params.column_groups;
  }
#pragma unroll
  for (int operand = 0; operand < Traits::kOperands; ++operand) pin(sums[operand]);
}

// Sums as fp32 [row of x][feature of the gate, then of the up projection].
template <typename Traits>
__device__ __forceinline__ void put_sums(const Params& base, SharedAddress place, std::uint32_t group,
                                         const float (&sums)[Traits::kOperands][Traits::kColumns / 2]) {
  const std::uint32_t pitch = sums_pitch<Traits>(base), lane = threadIdx.x % kWarpSize;
  const std::uint32_t first = group * kGroupRows + threadIdx.x / kWarpSize % 4 * 16 + lane / 4;
#pragma unroll
  for (int operand = 0; operand < Traits::kOperands; ++operand) {
#pragma unroll
    for (int i = 0; i < Traits::kColumns / 2; ++i) {
      const std::uint32_t feature = first + i / 2 % 2 * 8, row = i / 4 * 8 + 2 * (lane % 4) + i % 2;
      if (feature >= base.tile_rows || row >= base.rows) continue;
      const SharedAddress address = place + (row * pitch + operand * base.tile_rows + feature) * 4;
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(sums[operand][i]) : "memory");
    }
  }
}

#endif

}  // namespace infuse::skinny_linear
