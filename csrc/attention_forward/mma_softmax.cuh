// From a warp's scores of a tile to probabilities: the softmax tile by tile (Milakov and Gimelshein 2018), and dropout.
#pragma once

#include <cstdint>

#include "attention/dropout.cuh"
#include "attention_forward/mma_state.cuh"
#include "infuse/vec.cuh"

namespace infuse::attention_forward {

// A row's base is raised only where a score is beyond it by more than this, in powers of two: sums are brought to a new
// base in few tiles then, and no probability becomes larger than 2^8 (as FlashAttention-4 does).
constexpr float kSlack = 8.0f;

// What scores are multiplied by for powers of two.
template <typename Traits>
__device__ __forceinline__ float scale_of_scores(const Params& params) {
  return Traits::kFull && params.scales_first ? 1.0f : params.scale_log2;
}

// Brings the bases, and the sums with them, to the scores of a tile.
template <typename Traits>
__device__ __forceinline__ void raise_bases(float scale, const Scores<Traits>& scores, Sums<Traits>& sums) {
  float factor[Traits::kBlocks][2];
  bool raised = false;
#pragma unroll
  for (int b = 0; b < Traits::kBlocks; ++b) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = attention::kMinusInfinity;
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n) {
        largest = fmaxf(largest, fmaxf(scores[b][n][2 * half], scores[b][n][2 * half + 1]));
      }
      largest = attention::largest_of_row(largest) * scale;
      float& base = sums.base[b][half];
      const bool raises = largest > base + kSlack;
      factor[b][half] = raises ? attention::power_of_two(base - largest) : 1.0f;
      base = raises ? largest : base;
      raised |= raises;
    }
  }
  if (!__any_sync(kFullMask, raised)) return;
#pragma unroll
  for (int b = 0; b < Traits::kBlocks; ++b) {
#pragma unroll
    for (int e = 0; e < 2; ++e) sums.denominator[b][e] *= factor[b][e];
#pragma unroll
    for (int n = 0; n < Traits::kDim / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums.out[b][n][e] *= factor[b][e / 2];
    }
  }
}

// Of a warp's rows and 16 keys, rounded, as the tensor cores take them.
template <typename Traits>
using Probabilities = std::uint32_t[Traits::kBlocks][4];
template <typename Traits>
constexpr int kPairs = Traits::kBlocks * 4;  // of a lane

constexpr int kQuads = kTile / 16;  // groups of four neighbouring keys of a row, of a lane

// The `pair`-th two probabilities of the step's 16 keys. kept: a bit for each score of the lane, see kept_scores.
template <typename Traits, bool kDrops>
__device__ __forceinline__ void exponentiate(int step, int pair, float scale, std::uint64_t kept,
                                             const Scores<Traits>& scores, Sums<Traits>& sums,
                                             Probabilities<Traits>& p) {
  const int b = pair / 4, n = 2 * step + pair / 2 % 2, half = pair % 2;
  const float minus_base = sums.base[b][half] == attention::kMinusInfinity ? 0.0f : -sums.base[b][half];
  const float first = attention::power_of_two(fmaf(scores[b][n][2 * half], scale, minus_base));
  const float second = attention::power_of_two(fmaf(scores[b][n][2 * half + 1], scale, minus_base));
  sums.denominator[b][half] += first;
  sums.denominator[b][half] += second;
  std::uint32_t& word = p[b][pair % 4];
  word = Cast<typename Traits::T>::pack(first, second);
  if constexpr (kDrops) {
    const std::uint32_t both = static_cast<std::uint32_t>(kept >> (((2 * b + half) * kQuads + n / 2) * 4 + n % 2 * 2));
    word &= (both & 1) * 0xffffu | (both >> 1 & 1) * 0xffff0000u;
  }
}

// A bit for each score of the lane, set where dropout keeps it: four bits a quad, the quads of a row side by side.
template <typename Traits>
__device__ __forceinline__ std::uint64_t kept_scores(const Params& params, const Place& place, std::uint32_t tile) {
  static_assert(2 * Traits::kBlocks * kQuads * 4 <= 64);
  const std::uint32_t lane = read_lane(), threshold = params.dropout.threshold;
  attention::RandomSource source = attention::random_source(params.dropout);
  source.zero = 0;  // here are registers for the keys of all rounds
  const std::uint64_t row = (std::uint64_t{place.batch} * params.heads.divisor + place.head) * params.queries +
                            warp_row<Traits>(place) + lane / 4;
  std::uint64_t kept = 0;
#pragma unroll 1  // for the sake of the code's size
  for (std::uint32_t row_of_lane = 0; row_of_lane < 2 * Traits::kBlocks; ++row_of_lane) {
    const std::uint64_t first = attention::first_quad_of_row(row + 8 * row_of_lane, params.keys) +
                                (tile * kTile + 8 * (lane % 4)) / 4;
    std::uint32_t of_row = 0;
#pragma unroll
    for (std::uint32_t quad = 0; quad < kQuads; ++quad) {
      const uint4 words = attention::random_words(source, first + quad / 2 * 8 + quad % 2);
      of_row |= (words.x >= threshold ? 1u << 4 * quad : 0) | (words.y >= threshold ? 2u << 4 * quad : 0) |
                (words.z >= threshold ? 4u << 4 * quad : 0) | (words.w >= threshold ? 8u << 4 * quad : 0);
    }
    asm volatile("" : "+r"(of_row));  // else all of it is computed with 64 bits
    kept |= std::uint64_t{of_row} << 4 * kQuads * row_of_lane;
  }
  return kept;
}

}  // namespace infuse::attention_forward
