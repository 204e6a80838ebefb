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

// Of a row of x with that sum of squares.
__device__ __forceinline__ float reciprocal_rms(const Params& params, float squares) {
  const float mean = squares * params.norm.inv_dim, eps = params.norm.eps;
  // The comparison lets a NaN through, as torch's clamp does.
  return rsqrtf(params.norm.eps_as_minimum ? (mean < eps ? eps : mean) : mean + eps);
}

// kWidth neighbouring elements, 8, 4 or 2, of which `count` exist; zeros for the others.
template <typename T, int kWidth>
__device__ __forceinline__ Vec<T, kWidth> load_results(const T* source, bool is_wide, std::uint32_t count) {
  Vec<T, kWidth> packed = {};
  if (is_wide && count >= kWidth) {
    if constexpr (kWidth == 8) {
      packed = load<Reuse::kOnce, T, kWidth>(source, true);
    } else {
      // Not through the read-only path: the kernel before this one may have written it.
#pragma unroll
      for (int i = 0; i < kWidth / 2; ++i) packed.words[i] = reinterpret_cast<const std::uint32_t*>(source)[i];
    }
  } else {
    const auto* elements = reinterpret_cast<const std::uint16_t*>(source);
#pragma unroll
    for (std::uint32_t i = 0; i < kWidth; ++i) {
      if (i < count) packed.words[i / 2] |= std::uint32_t{elements[i]} << (i % 2 * 16);
    }
  }
  return packed;
}

// What is added to kWidth neighbouring features of a row; zeros where there is nothing.
template <typename T, int kWidth>
struct Addends {
  Vec<T, kWidth> bias = {}, up_bias = {}, addend = {};
  Vec<T, kWidth> next_weight = {};  // of the norm behind, whose first half is done here

  // They depend on no kernel before this one.
  __device__ __forceinline__ void load_biases(const Params& params, std::uint32_t number, std::uint32_t feature) {
    const Linear &linear = params.linears[number], &up = params.linears[1];
    const std::uint32_t count = linear.features - feature;
    if (linear.bias != nullptr) {
      bias = load_results<T, kWidth>(static_cast<const T*>(linear.bias) + feature, linear.is_wide, count);
    }
    if (params.activation != Activation::kNone && up.bias != nullptr) {
      up_bias = load_results<T, kWidth>(static_cast<const T*>(up.bias) + feature, up.is_wide, count);
    }
    if (params.split_norm.scaled != nullptr && params.norm.weight != nullptr) {
      next_weight = load_results<T, kWidth>(static_cast<const T*>(params.norm.weight) + feature, true, count);
    }
  }

  __device__ __forceinline__ void load_addend(const Params& params, std::uint32_t number, std::uint32_t row,
                                              std::uint32_t feature) {
    if (params.addend == nullptr || number != 0) return;
    const Linear& linear = params.linears[0];
    const T* source = static_cast<const T*>(params.addend) + row * params.addend_stride + feature;
    addend = load_results<T, kWidth>(source, linear.is_wide, linear.features - feature);
  }
};

template <typename T, int kWidth>
__device__ __forceinline__ void add_packed(const Vec<T, kWidth>& packed, float (&sums)[kWidth]) {
  float values[kWidth];
  unpack(packed, values);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sums[i] += values[i];
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

// The first half of the norm behind: rounded results times its weight, and the sum of their squares.
template <typename T, int kWidth>
__device__ __forceinline__ void store_scaled(const Params& params, std::uint32_t row, std::uint32_t feature,
                                             const Vec<T, kWidth>& next_weight, const float (&results)[kWidth]) {
  static_assert(kWidth == kSquaresWidth);
  float values[kWidth], weights[kWidth], squares = 0.0f;
  unpack(pack<T>(results), values);
  unpack(next_weight, weights);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    squares = fmaf(values[i], values[i], squares);
    values[i] *= weights[i] + params.norm.weight_offset;
  }
  const std::size_t place = std::size_t{row} * params.linears[0].features + feature;
  store(static_cast<T*>(params.split_norm.scaled) + place, pack<T>(values));
  params.split_norm.squares_out[place / kSquaresWidth] = squares;
}

// Finishes features [feature, feature + kWidth) of a row of linear `number`. sums: of the linear, or of the gate; up: if
// there is an activation.
template <typename T, int kWidth>
__device__ __forceinline__ void store_results(const Params& params, std::uint32_t number, std::uint32_t row,
                                              std::uint32_t feature, const Addends<T, kWidth>& addends,
                                              float (&sums)[kWidth], float (&up)[kWidth]) {
  add_packed(addends.bias, sums);
  if (params.activation != Activation::kNone) {
    add_packed(addends.up_bias, up);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sums[i] = activate(params.activation, sums[i]) * up[i];
  }
  add_packed(addends.addend, sums);
  if constexpr (kWidth == kSquaresWidth) {
    if (params.split_norm.scaled != nullptr) store_scaled(params, row, feature, addends.next_weight, sums);
  }
  store_rounded<T>(params.linears[number], row, feature, sums);
}

// The same, with what is added loaded here.
template <typename T, int kWidth>
__device__ __forceinline__ void store_results(const Params& params, std::uint32_t number, std::uint32_t row,
                                              std::uint32_t feature, float (&sums)[kWidth], float (&up)[kWidth]) {
  Addends<T, kWidth> addends;
  addends.load_biases(params, number, feature);
  addends.load_addend(params, number, row, feature);
  store_results(params, number, row, feature, addends, sums, up);
}

}  // namespace infuse::skinny_linear
