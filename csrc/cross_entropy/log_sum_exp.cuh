// The logarithm of a sum of exponentials, extended value by value (Milakov and Gimelshein 2018, arXiv:1805.02867).
#pragma once

#include <cstdint>

#include "infuse/reduce.cuh"

namespace infuse::cross_entropy {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// sum = sum of 2^(x log2(e) - base) over what was added, base = most log2(e) with the largest x that was added. All
// terms have exactly the same base, so its rounding cancels. -inf adds nothing; NaN and +inf make the sum NaN.
struct LogSumExp {
  float most = -INFINITY, base = 0.0f, sum = 0.0f;

  // The largest of values that are to be added next.
  __device__ __forceinline__ void expect(float largest) {
    if (largest > most) {
      const float new_base = largest * kLog2e;
      sum *= exp2_approx(fmaf(most, kLog2e, -new_base));
      most = largest;
      base = new_base;
    }
  }

  __device__ __forceinline__ void add(float x) { sum += exp2_approx(fmaf(x, kLog2e, -base)); }

  // Takes in the sum of other values.
  __device__ __forceinline__ void merge(float other_most, float other_sum) {
    expect(other_most);
    sum += other_sum * (other_most == -INFINITY ? 1.0f : exp2_approx(fmaf(other_most, kLog2e, -base)));
  }

  __device__ __forceinline__ void merge_lanes() {
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
      const float other_most = __shfl_xor_sync(kFullMask, most, offset);
      merge(other_most, __shfl_xor_sync(kFullMask, sum, offset));
    }
  }
};

}  // namespace infuse::cross_entropy
