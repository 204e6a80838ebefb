// The two products of a tile: scores, and probabilities times values.
#pragma once

#include <cstdint>

#include "attention_forward/mma_softmax.cuh"
#include "infuse/mma.cuh"

namespace infuse::attention_forward {

// q k^T.
template <typename Traits>
__device__ __forceinline__ void multiply_keys(SharedAddress tile, Scores<Traits>& scores) {
  const std::uint32_t lane = read_lane();
  const std::uint32_t matrix = lane / 8, row = lane % 8;
  const SharedAddress own = tile + (matrix / 2 * 8 + row) * Traits::kRowBytes + (matrix & 1) * 16;
  const SharedAddress own_queries =
      queries_of_warp<Traits>() + ((matrix & 1) * 8 + row) * Traits::kRowBytes + matrix / 2 * 16;
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

// out += probabilities times values. The probabilities of 16 keys are computed between the products of the 16 before
// them: the tensor cores work on while they are.
template <typename Traits, bool kDrops>
__device__ __forceinline__ void multiply_values(SharedAddress tile, std::uint32_t dim_v, float scale,
                                                std::uint64_t kept, const Scores<Traits>& scores,
                                                Sums<Traits>& sums) {
  using T = typename Traits::T;
  constexpr int kSteps = kTile / 16, kColumns = Traits::kDim / 16;
  constexpr int kSure = Traits::kDim == 192 ? 8 : kColumns;  // heads of 192 often have values of 128
  const std::uint32_t lane = read_lane(), matrix = lane / 8, row = lane % 8;
  const SharedAddress own = tile + ((matrix & 1) * 8 + row) * Traits::kRowBytes + matrix / 2 * 16;
  Probabilities<Traits> p[2];
#pragma unroll
  for (int pair = 0; pair < kPairs<Traits>; ++pair) {
    exponentiate<Traits, kDrops>(0, pair, scale, kept, scores, sums, p[0]);
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      if (n == kSure && dim_v <= 16 * kSure) break;
      std::uint32_t values[4];
      load_matrices_transposed(values, own + step * 16 * Traits::kRowBytes + n * 32);
#pragma unroll
      for (int b = 0; b < Traits::kBlocks; ++b) {
        mma_16x8x16<T>(sums.out[b][2 * n], p[step % 2][b], values[0], values[1]);
        mma_16x8x16<T>(sums.out[b][2 * n + 1], p[step % 2][b], values[2], values[3]);
      }
      if (step + 1 == kSteps || n >= kSure) continue;
#pragma unroll
      for (int pair = n * kPairs<Traits> / kSure; pair < (n + 1) * kPairs<Traits> / kSure; ++pair) {
        exponentiate<Traits, kDrops>(step + 1, pair, scale, kept, scores, sums, p[(step + 1) % 2]);
      }
    }
  }
}

}  // namespace infuse::attention_forward
