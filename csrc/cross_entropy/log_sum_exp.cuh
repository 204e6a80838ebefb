// The logarithm of a sum of exponentials, extended value by value (Milakov and Gimelshein 2018, arXiv:1805.02867).
#pragma once

#include <cstdint>

#include "infuse/reduce.cuh"

namespace infuse::cross_entropy {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float exp2_approx(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return exp2f(x);  // where the kernel is run on the CPU, to be tested
#endif
}

// sum = sum of exp(x - base) over what was added; base is the largest x that was added. -inf adds nothing; NaN and +inf
// make the sum NaN.
struct LogSumExp {
  float most = -INFINITY;
  float base = 0.0f;  // most, but finite while nothing finite was added
  float sum = 0.0f;

  // The largest of values that are to be added next.
  __device__ __forceinline__ void expect(float largest) {
    if (largest > most) {
      sum *= exp2_approx((most - largest) * kLog2e);
      most = base = largest;
    }
  }

  __device__ __forceinline__ float exp(float x) const { return exp2_approx((x - base) * kLog2e); }
  __device__ __forceinline__ void add(float x) { sum += exp(x); }

  // Takes in the sum of other values.
  __device__ __forceinline__ void merge(float other_most, float other_sum) {
    expect(other_most);
    sum += other_most == -INFINITY ? other_sum : other_sum * exp(other_most);
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
