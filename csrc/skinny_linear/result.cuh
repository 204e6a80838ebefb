// From the sums of a tile to results: bias, activation, addend, one rounding, also of those that are stored in fp32.
#pragma once

#include <cstdint>

#include "infuse/activation.cuh"
#include "infuse/memory.cuh"
#include "infuse/vec.cuh"
#include "skinny_linear/params.h"

namespace infuse::skinny_linear {

// What a tile is of: the number of its linear and its first feature.
struct Tile {
  std::uint32_t linear, feature;
};

__device__ __forceinline__ Tile tile_of(const Params& params, std::uint32_t number) {
  const std::uint32_t linear = (number >= params.linears[1].first_tile) + (number >= params.linears[2].first_tile);
  return {linear, (number - params.linears[linear].first_tile) * params.tile_rows};
}

__device__ __forceinline__ float activate(Activation activation, float gate) {
  switch (activation) {
    case Activation::kSilu: return __fdividef(gate, 1.0f + __expf(-gate));
    case Activation::kGeluTanh: {
      const float inner = 0.7978845608028654f * fmaf(0.044715f * gate * gate, gate, gate);
      return 0.5f * gate * (1.0f + tanhf(inner));
    }
    case Activation::kGeluErf: return 0.5f * gate * (1.0f + erff(gate * 0.7071067811865476f));
    default: return gate;
  }
}

// kWidth neighbouring elements, 8, 4 or 2, of which `count` exist; zeros for the others.
template <typename T, int kWidth>
__device__ __forceinline__ void load_results(const T* source, bool is_wide, std::uint32_t count,
                                             float (&values)[kWidth]) {
  if (is_wide && count >= kWidth) {
    Vec<T, kWidth> packed;
    if constexpr (kWidth == 8) {
      packed = load<Reuse::kOnce, T, kWidth>(source, true);
    } else {
      // Not through the read-only path: the kernel before this one may have written it.
#pragma unroll
      for (int i = 0; i < kWidth / 2; ++i) packed.words[i] = reinterpret_cast<const std::uint32_t*>(source)[i];
    }
    unpack(packed, values);
  } else {
#pragma unroll
    for (std::uint32_t i = 0; i < kWidth; ++i) values[i] = i < count ? static_cast<float>(source[i]) : 0.0f;
  }
}

template <typename T, int kWidth>
__device__ __forceinline__ void add_bias(const Linear& linear, std::uint32_t feature, float (&values)[kWidth]) {
  if (linear.bias == nullptr) return;
  float bias[kWidth];
  load_results(static_cast<const T*>(linear.bias) + feature, linear.is_wide, linear.features - feature, bias);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) values[i] += bias[i];
}

// Rounds neighbouring results to T and stores those of them that exist.
template <typename T, int kWidth>
__device__ __forceinline__ void store_rounded(const Linear& linear, std::uint32_t row, std::uint32_t feature,
                                              float (&values)[kWidth]) {
  const std::uint32_t count = linear.features - feature;
  const std::int64_t place = row * linear.out_stride + feature;
  const bool is_whole = linear.is_wide && count >= kWidth;
  const Vec<T, kWidth> packed = pack<T>(values);
  if (linear.out_is_fp32) {
    float* out = static_cast<float*>(linear.out) + place;
    unpack(packed, values);
    if (is_whole) {
      store(out, pack<float>(values));
    } else {
#pragma unroll
      for (std::uint32_t i = 0; i < kWidth; ++i) {
        if (i < count) out[i] = values[i];
      }
    }
    return;
  }
  T* out = static_cast<T*>(linear.out) + place;
  if (is_whole) {
    store(out, packed);
  } else {
#pragma unroll
    for (std::uint32_t i = 0; i < kWidth; ++i) {
      const Vec<T, 1> one{{packed.words[i / 2] >> (i % 2 * 16)}};
      if (i < count) store(out + i, one);
    }
  }
}

// Finishes features [feature, feature + kWidth) of a row of linear `number`. sums: of the linear, or of the gate; up: if
// there is an activation.
template <typename T, int kWidth>
__device__ __forceinline__ void store_results(const Params& params, std::uint32_t number, std::uint32_t row,
                                              std::uint32_t feature, float (&sums)[kWidth], float (&up)[kWidth]) {
  const Linear& linear = params.linears[number];
  add_bias<T>(linear, feature, sums);
  if (params.activation != Activation::kNone) {
    add_bias<T>(params.linears[1], feature, up);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sums[i] = activate(params.activation, sums[i]) * up[i];
  }
  if (params.addend != nullptr && number == 0) {
    const T* source = static_cast<const T*>(params.addend) + row * params.addend_stride + feature;
    float addend[kWidth];
    load_results(source, linear.is_wide, linear.features - feature, addend);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sums[i] += addend[i];
  }
  store_rounded<T>(linear, row, feature, sums);
}

}  // namespace infuse::skinny_linear
