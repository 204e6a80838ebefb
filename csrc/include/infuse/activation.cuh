// Activation functions of fp32 values.
#pragma once

namespace infuse {

// Through the fast exponential and the fast division where the result is rounded to two bytes (X's size); they deviate
// by 2^-21 and flush what is below fp32's smallest normal number.
template <typename X>
__device__ __forceinline__ float sigmoid(float value) {
  if constexpr (sizeof(X) == 4) return 1.0f / (1.0f + expf(-value));
  return __fdividef(1.0f, 1.0f + __expf(-value));
}

}  // namespace infuse
