// Vectors of elements: packed in registers, widened to fp32, rounded back.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "infuse/dtype.h"

namespace infuse {

template <DType kDType>
struct ElementOf;
template <>
struct ElementOf<DType::kBFloat16> {
  using type = __nv_bfloat16;
};
template <>
struct ElementOf<DType::kFloat16> {
  using type = __half;
};
template <>
struct ElementOf<DType::kFloat32> {
  using type = float;
};

// The C++ type of an element.
template <DType kDType>
using Element = typename ElementOf<kDType>::type;

// kElems elements of T as they lie in memory. Two-byte types sit two to a word, the first in the low half.
template <typename T, int kElems>
struct Vec {
  static constexpr int kBytes = kElems * static_cast<int>(sizeof(T));
  static constexpr int kWords = (kBytes + 3) / 4;  // a lone two-byte element uses the low half of its word
  static_assert(kBytes == 2 || kBytes == 4 || kBytes == 8 || kBytes % 16 == 0, "what load and store know");
  std::uint32_t words[kWords];
};

// ---- casts: each rounds to nearest even, once, like torch's .to() ----

template <typename T>
struct Cast;

template <>
struct Cast<__nv_bfloat16> {
  static __device__ __forceinline__ float low(std::uint32_t word) { return __uint_as_float(word << 16); }
  static __device__ __forceinline__ float high(std::uint32_t word) { return __uint_as_float(word & 0xffff0000u); }
  static __device__ __forceinline__ std::uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const std::uint32_t*>(&pair);
  }
};

template <>
struct Cast<__half> {
  static __device__ __forceinline__ float low(std::uint32_t word) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(word)));
  }
  static __device__ __forceinline__ float high(std::uint32_t word) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
  }
  static __device__ __forceinline__ std::uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const std::uint32_t*>(&pair);
  }
};

template <typename T, int kElems>
__device__ __forceinline__ void unpack(const Vec<T, kElems>& vec, float (&values)[kElems]) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < kElems; ++i) values[i] = __uint_as_float(vec.words[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kElems; ++i) {
      values[i] = i % 2 == 0 ? Cast<T>::low(vec.words[i / 2]) : Cast<T>::high(vec.words[i / 2]);
    }
  }
}

template <typename T, int kElems>
__device__ __forceinline__ Vec<T, kElems> pack(const float (&values)[kElems]) {
  Vec<T, kElems> vec;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < kElems; ++i) vec.words[i] = __float_as_uint(values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kElems; i += 2) {
      vec.words[i / 2] = Cast<T>::pack(values[i], i + 1 < kElems ? values[i + 1] : 0.0f);
    }
  }
  return vec;
}

// Rounds fp32 values to T and widens them again.
template <typename T, int kElems>
__device__ __forceinline__ void round_through(float (&values)[kElems]) {
  if constexpr (sizeof(T) != 4) unpack(pack<T>(values), values);
}

// Makes both compilers forget what they derived from the vector, so that they widen it anew instead of keeping the
// packed and the widened form alive across a barrier. `zero` is a kernel parameter that is always 0: an empty
// assembly statement is enough for nvcc, but ptxas sees through it and spills. fp32 has one form only.
template <typename T, int kElems>
__device__ __forceinline__ void keep_packed(Vec<T, kElems>& vec, std::uint32_t zero) {
  if constexpr (sizeof(T) != 4) {
#pragma unroll
    for (int i = 0; i < Vec<T, kElems>::kWords; ++i) vec.words[i] ^= zero;
  }
}

}  // namespace infuse
