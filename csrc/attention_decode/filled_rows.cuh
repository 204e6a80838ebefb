// Rows whose additive mask is filled with the smallest number of its dtype, or nearly that, from end to end. Beside such
// numbers the scores are lost in fp32, so the softmax is that of the mask alone: equal parts of the keys at its largest.
#pragma once

#include <cstdint>

#include "attention_decode/tiles.cuh"

namespace infuse::attention_decode {

template <typename Element>
__device__ __noinline__ float largest_of_mask(const Element* mask, std::uint32_t keys) {
  float largest = kMinusInfinity;
  for (std::uint32_t key = 0; key < keys; ++key) largest = fmaxf(largest, static_cast<float>(mask[key]));
  return largest;
}

// The mean of four columns of V over the keys whose mask is `largest`. values: at key 0; stride: from key to key.
template <typename T, typename Element>
__device__ __noinline__ float4 mean_of_filled(const Element* mask, std::uint32_t keys, float largest, const T* values,
                                              std::int64_t stride) {
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  float count = 0.0f;
  for (std::uint32_t key = 0; key < keys; ++key, values += stride) {
    if (static_cast<float>(mask[key]) != largest) continue;
    sum.x += static_cast<float>(values[0]);
    sum.y += static_cast<float>(values[1]);
    sum.z += static_cast<float>(values[2]);
    sum.w += static_cast<float>(values[3]);
    count += 1.0f;
  }
  return make_float4(sum.x / count, sum.y / count, sum.z / count, sum.w / count);
}

// Whether a row whose largest score, in powers of two, is `largest` saw nothing but what kernels skip as filled.
__device__ __forceinline__ bool may_be_filled(const Params& params, float largest) {
  return params.skips_filled && params.sinks == nullptr && largest < kFilled;
}

}  // namespace infuse::attention_decode
