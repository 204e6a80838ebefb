// A warp's arithmetic on one tile: scores, mask, softmax and the sum of values.
#pragma once

#include <cstdint>

#include "attention_decode/state.cuh"
#include "infuse/mma.cuh"
#include "infuse/vec.cuh"

namespace infuse::attention_decode {

template <typename Traits>
__device__ __forceinline__ void load_query_step(std::uint32_t (&q)[4], const Place& place, int step) {
  const std::uint32_t matrix = place.lane / 8, row = place.lane % 8;
  load_matrices(q, swizzled(place.queries + (place.row_warp * kWarpRows + (matrix & 1) * 8 + row) * Traits::kRowBytes,
                            row, 2 * step + matrix / 2));
}

// q k^T of the warp's rows and a tile.
template <typename Traits>
__device__ __forceinline__ void multiply_keys(const Place& place, SharedAddress stage,
                                              const std::uint32_t (&queries)[Traits::kKeepsQueries ? Traits::kSteps : 1][4],
                                              float (&scores)[Traits::kTile / 8][4]) {
  const std::uint32_t matrix = place.lane / 8, row = place.lane % 8;
#pragma unroll
  for (int n = 0; n < Traits::kTile / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) scores[n][e] = 0.0f;
  }
#pragma unroll
  for (int step = 0; step < Traits::kSteps; ++step) {
    std::uint32_t loaded[4];
    if constexpr (!Traits::kKeepsQueries) load_query_step<Traits>(loaded, place, step);
    const std::uint32_t(&q)[4] = [&]() -> const std::uint32_t(&)[4] {
      if constexpr (Traits::kKeepsQueries) return queries[step];
      else return loaded;
    }();
#pragma unroll
    for (int n = 0; n < Traits::kTile / 16; ++n) {
      std::uint32_t keys[4];
      load_matrices(keys, tile_piece<Traits>(stage, n * 16 + matrix / 2 * 8 + row, 2 * step + (matrix & 1)));
      mma_16x8x16<typename Traits::T>(scores[2 * n], q, keys[0], keys[1]);
      mma_16x8x16<typename Traits::T>(scores[2 * n + 1], q, keys[2], keys[3]);
    }
  }
}

// The elements of the mask that lie over a lane's two scores of one row.
template <typename Element>
__device__ __forceinline__ void mask_pair(SharedAddress address, float (&pair)[2]) {
  if constexpr (sizeof(Element) == 1) {
    std::uint16_t both;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(both) : "r"(address) : "memory");
    pair[0] = (both & 0xff) != 0 ? 0.0f : kMinusInfinity;
    pair[1] = (both >> 8) != 0 ? 0.0f : kMinusInfinity;
  } else if constexpr (sizeof(Element) == 2) {
    std::uint32_t word;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
    pair[0] = Cast<Element>::low(word);
    pair[1] = Cast<Element>::high(word);
  } else {
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair[0]), "=f"(pair[1]) : "r"(address) : "memory");
  }
}

// Minus infinity stays; other numbers stay finite, the lowest of all too, which masks are filled with.
__device__ __forceinline__ float in_powers_of_two(float value) {
  constexpr float kLowest = -3e38f;
  return value == kMinusInfinity ? value : fmaxf(value * kLog2e, kLowest);
}

template <typename Traits, typename Element>
__device__ __forceinline__ void add_mask(const Place& place, SharedAddress mask,
                                         const std::uint32_t (&slots)[2], float (&scores)[Traits::kTile / 8][4]) {
  const SharedAddress own =
      mask + (place.row_warp * kWarpRows * Traits::kTile + 2 * (place.lane % 4)) * sizeof(Element);
#pragma unroll
  for (int n = 0; n < Traits::kTile / 8; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float pair[2];
      mask_pair<Element>(own + (slots[half] * Traits::kTile + n * 8) * sizeof(Element), pair);
      scores[n][2 * half] += in_powers_of_two(pair[0]);
      scores[n][2 * half + 1] += in_powers_of_two(pair[1]);
    }
  }
}

// Within a few units of the last place of 1, which is what counts for scores; tanhf is four times as long.
__device__ __forceinline__ float hyperbolic_tangent(float x) {
  return 1.0f - __fdividef(2.0f, power_of_two(x * (2.0f * kLog2e)) + 1.0f);
}

// From products to scores in powers of two: scale, cap, mask, and nothing beyond the last key.
template <typename Traits>
__device__ __forceinline__ void finish_scores(const Params& params, const Rows& rows, const Place& place,
                                              SharedAddress mask, const std::uint32_t (&slots)[2],
                                              std::uint32_t tile, bool is_masked, float (&scores)[Traits::kTile / 8][4]) {
#pragma unroll
  for (int n = 0; n < Traits::kTile / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) scores[n][e] *= params.scale_log2;
  }
  if (params.softcap_log2 != 0.0f) [[unlikely]] {
#pragma unroll
    for (int n = 0; n < Traits::kTile / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[n][e] = params.softcap_log2 * hyperbolic_tangent(scores[n][e]);
    }
  }
  if (!is_masked) [[likely]] {
    // Nothing to add.
  } else if (params.mask_kind == Mask::kBool) {
    add_mask<Traits, std::uint8_t>(place, mask, slots, scores);
  } else if (params.mask_kind == Mask::kTwoBytes) {
    add_mask<Traits, typename Traits::T>(place, mask, slots, scores);
  } else if (params.mask_kind == Mask::kFloat32) {
    add_mask<Traits, float>(place, mask, slots, scores);
  }
  const std::uint32_t first = tile * Traits::kTile;
  if (first + Traits::kTile <= params.keys && !params.is_causal) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const std::uint32_t row = rows.first + place.row_warp * kWarpRows + place.lane / 4 + 8 * half;
    const std::uint32_t query = params.group.divide(row);
    const std::uint32_t end = params.is_causal && query + 1 < params.keys ? query + 1 : params.keys;
#pragma unroll
    for (int n = 0; n < Traits::kTile / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (first + n * 8 + 2 * (place.lane % 4) + e >= end) scores[n][2 * half + e] = kMinusInfinity;
      }
    }
  }
}

__device__ __forceinline__ float largest_of_row(float value) {  // over the four lanes of a row
  value = fmaxf(value, __shfl_xor_sync(kFullMask, value, 1));
  return fmaxf(value, __shfl_xor_sync(kFullMask, value, 2));
}

// Scores become probabilities relative to the largest score so far; what was found before is brought to the same.
template <typename Traits>
__device__ __forceinline__ void rebase(float (&scores)[Traits::kTile / 8][4], Sums<Traits::kDim>& sums) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float largest = kMinusInfinity;
#pragma unroll
    for (int n = 0; n < Traits::kTile / 8; ++n) {
      largest = fmaxf(largest, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
    }
    largest = fmaxf(sums.largest[half], largest_of_row(largest));
    const float base = largest == kMinusInfinity ? 0.0f : largest;
    if (__any_sync(kFullMask, largest != sums.largest[half])) {
      const float factor = power_of_two(sums.largest[half] - base);
      sums.denominator[half] *= factor;
#pragma unroll
      for (int n = 0; n < Traits::kDim / 8; ++n) {
        sums.out[n][2 * half] *= factor;
        sums.out[n][2 * half + 1] *= factor;
      }
      sums.largest[half] = largest;
    }
#pragma unroll
    for (int n = 0; n < Traits::kTile / 8; ++n) {
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        scores[n][e] = power_of_two(scores[n][e] - base);
        sums.denominator[half] += scores[n][e];
      }
    }
  }
}

// out += probabilities times values, the probabilities rounded to T.
template <typename Traits>
__device__ __forceinline__ void multiply_values(const Place& place, SharedAddress stage,
                                                const float (&scores)[Traits::kTile / 8][4],
                                                Sums<Traits::kDim>& sums) {
  using T = typename Traits::T;
  const std::uint32_t matrix = place.lane / 8, row = place.lane % 8;
#pragma unroll
  for (int step = 0; step < Traits::kTile / 16; ++step) {
    const float(&first)[4] = scores[2 * step];
    const float(&second)[4] = scores[2 * step + 1];
    const std::uint32_t p[4] = {Cast<T>::pack(first[0], first[1]), Cast<T>::pack(first[2], first[3]),
                                Cast<T>::pack(second[0], second[1]), Cast<T>::pack(second[2], second[3])};
#pragma unroll
    for (int n = 0; n < Traits::kDim / 16; ++n) {
      std::uint32_t values[4];
      load_matrices_transposed(values, tile_piece<Traits>(stage, step * 16 + (matrix & 1) * 8 + row, 2 * n + matrix / 2));
      mma_16x8x16<T>(sums.out[2 * n], p, values[0], values[1]);
      mma_16x8x16<T>(sums.out[2 * n + 1], p, values[2], values[3]);
    }
  }
}

}  // namespace infuse::attention_decode
