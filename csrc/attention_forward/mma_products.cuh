// The two products of a tile: scores, and probabilities times values.
#pragma once

#include <cstdint>

#include "attention_forward/mma_state.cuh"
#include "infuse/mma.cuh"
#include "infuse/vec.cuh"

namespace infuse::attention_forward {

// q k^T.
template <typename Traits>
__device__ __forceinline__ void multiply_keys(SharedAddress tile, Scores<Traits>& scores) {
  const std::uint32_t lane = read_lane();
  const std::uint32_t matrix = lane / 8, row = lane % 8;
  const SharedAddress own = tile + (matrix / 2 * 8 + row) * Traits::kRowBytes + (matrix & 1) * 16;
  const SharedAddress own_queries = queries_of_warp<Traits>() + ((matrix & 1) * 8 + row) * Traits::kRowBytes + matrix / 2 * 16;
#pragma unroll
  for (auto& block : scores) {
#pragma unroll
    for (auto& quad : block) {
#pragma unroll
      for (float& score : quad) score = 0.0f;
    }
  }
#pragma unroll
  for (int step = 0; step < Traits::kSteps; ++step) {
    std::uint32_t q[Traits::kBlocks][4];
#pragma unroll
    for (int b = 0; b < Traits::kBlocks; ++b) load_matrices(q[b], own_queries + b * 16 * Traits::kRowBytes + step * 32);
#pragma unroll
    for (int n = 0; n < kTile / 16; ++n) {
      std::uint32_t keys[4];
      load_matrices(keys, own + n * 16 * Traits::kRowBytes + step * 32);
#pragma unroll
      for (int b = 0; b < Traits::kBlocks; ++b) {
        mma_16x8x16<typename Traits::T>(scores[b][2 * n], q[b], keys[0], keys[1]);
        mma_16x8x16<typename Traits::T>(scores[b][2 * n + 1], q[b], keys[2], keys[3]);
      }
    }
  }
}

// out += probabilities times values.
template <typename Traits>
__device__ __forceinline__ void multiply_values(SharedAddress tile, const Probabilities<Traits>& p, Sums<Traits>& sums) {
  const std::uint32_t lane = read_lane();
  using T = typename Traits::T;
  const std::uint32_t matrix = lane / 8, row = lane % 8;
  const SharedAddress own = tile + ((matrix & 1) * 8 + row) * Traits::kRowBytes + matrix / 2 * 16;
#pragma unroll
  for (int step = 0; step < kTile / 16; ++step) {
#pragma unroll
    for (int n = 0; n < Traits::kDim / 16; ++n) {
      std::uint32_t values[4];
      load_matrices_transposed(values, own + step * 16 * Traits::kRowBytes + n * 32);
#pragma unroll
      for (int b = 0; b < Traits::kBlocks; ++b) {
        mma_16x8x16<T>(sums.out[b][2 * n], p[b][step], values[0], values[1]);
        mma_16x8x16<T>(sums.out[b][2 * n + 1], p[b][step], values[2], values[3]);
      }
    }
  }
}

}  // namespace infuse::attention_forward
