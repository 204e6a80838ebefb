// Arithmetic of a softmax in powers of two.
#pragma once

#include <cstdint>

#include "infuse/reduce.cuh"

namespace infuse::attention {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kMinusInfinity = -__builtin_huge_valf();

// 2^x to within two units in the last place; 0 for minus infinity.
__device__ __forceinline__ float power_of_two(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// tanh(x) to within 3e-7, which is as good for a score as tanhf is, and a third of the instructions.
__device__ __forceinline__ float tanh_of_score(float x) {
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(1.0f + power_of_two(2.0f * kLog2e * x)));
  return fmaf(-2.0f, reciprocal, 1.0f);
}

// Minus infinity stays; other numbers stay finite, the lowest of all too, which masks are filled with.
__device__ __forceinline__ float in_powers_of_two(float value) {
  constexpr float kLowest = -3e38f;
  return value == kMinusInfinity ? value : fmaxf(value * kLog2e, kLowest);
}

// What 2 is raised to in order to bring something relative to `largest` to `base`, the largest of all.
__device__ __forceinline__ float weight_of(float largest, float base) {
  return power_of_two(largest - (base == kMinusInfinity ? 0.0f : base));
}

// Over the four lanes that have a row of a tensor-core tile.
__device__ __forceinline__ float largest_of_row(float value) {
  value = fmaxf(value, __shfl_xor_sync(kFullMask, value, 1));
  return fmaxf(value, __shfl_xor_sync(kFullMask, value, 2));
}

__device__ __forceinline__ float sum_of_row(float value) {
  value += __shfl_xor_sync(kFullMask, value, 1);
  return value + __shfl_xor_sync(kFullMask, value, 2);
}

}  // namespace infuse::attention
