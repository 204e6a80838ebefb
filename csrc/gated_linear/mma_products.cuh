// From shared memory to the registers that mma.sync reads, and the products.
#pragma once

#include <cstdint>

#include "gated_linear/mma_load.cuh"
#include "infuse/mma.cuh"

namespace infuse::gated_linear {

// Sums of a warp's 64 rows and 32 columns: [16 rows][gate, then up, 8 columns each].
using MmaSums = float[4][8][4];

// Operands of one step of 16 along dim: x of 64 rows; weights of 32 columns of the gate and 32 of the up, two words for
// each eight.
struct MmaOperands {
  std::uint32_t x[4][4], weights[4][4];
};

// Where a lane's rows for ldmatrix begin in the first stage. Shared memory begins at a multiple of 128 bytes, as that
// of a kernel without any of fixed size does.
struct MmaPlaces {
  SharedAddress x, weights;
};

template <typename Traits>
__device__ __forceinline__ MmaPlaces places_of_warp(SharedAddress shared) {
  const std::uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::uint32_t x_row = warp % Traits::kWarpRows * 64 + lane % 16;
  const SharedAddress x = shared + x_row * Traits::kRowBytes + swizzled_piece(x_row, lane / 16);
  const SharedAddress weights = shared + Traits::kXBytes + warp / Traits::kWarpRows * Traits::kWarpWeightBytes;
  if (Traits::kByColumns) return {x, weights + lane % 16 * 128 + (lane / 16 ^ lane % 8) * 16};
  const std::uint32_t row = lane / 16 * 8 + lane % 8;
  return {x, weights + row * Traits::kRowBytes + swizzled_piece(row, lane / 8 % 2)};
}

// step: 0 or 1, which 16 of a stage's 32 elements along dim. Two pieces further is 32 bytes, whatever the swizzle did.
template <typename Traits>
__device__ __forceinline__ void load_operands(const MmaPlaces& places, std::uint32_t stage, int step,
                                              MmaOperands& operands) {
  const SharedAddress x = (places.x + stage * Traits::kStageBytes) ^ (step * 32);
  const SharedAddress weights = places.weights + stage * Traits::kStageBytes;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    load_matrices(operands.x[i], x + i * 16 * Traits::kRowBytes);
    if constexpr (Traits::kByColumns) {
      load_matrices_transposed(operands.weights[i], (weights ^ (i * 32)) + step * 16 * 128);
    } else {
      load_matrices(operands.weights[i], (weights ^ (step * 32)) + i * 16 * Traits::kRowBytes);
    }
  }
}

template <typename T>
__device__ __forceinline__ void multiply_step(const MmaOperands& operands, MmaSums& sums) {
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      mma_16x8x16<T>(sums[m][n], operands.x[m], operands.weights[n / 2][n % 2 * 2],
                     operands.weights[n / 2][n % 2 * 2 + 1]);
    }
  }
}

}  // namespace infuse::gated_linear
