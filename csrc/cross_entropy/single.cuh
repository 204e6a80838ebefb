// Single elements, for what is left of a row behind its last whole vector.
#pragma once

#include <cstdint>

#include "infuse/vec.cuh"

namespace infuse::cross_entropy {

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T narrow(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else {
    const std::uint32_t word = Cast<T>::pack(x, 0.0f);
    return reinterpret_cast<const T*>(&word)[0];
  }
}

}  // namespace infuse::cross_entropy
