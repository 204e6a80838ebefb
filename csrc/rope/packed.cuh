// Arithmetic on elements as they are packed, two to a word: each operation rounds to the element's type once, as torch's
// own does in that type.
#pragma once

#include "infuse/vec.cuh"

namespace infuse::rope {

template <typename X>
struct PairOf;
template <>
struct PairOf<__nv_bfloat16> {
  using type = __nv_bfloat162;
};
template <>
struct PairOf<__half> {
  using type = __half2;
};

template <typename X, int kElems, typename Operation>
__device__ __forceinline__ Vec<X, kElems> pairwise(const Vec<X, kElems>& a, const Vec<X, kElems>& b,
                                                   Operation operation) {
  using Pair = typename PairOf<X>::type;
  Vec<X, kElems> result;
#pragma unroll
  for (int i = 0; i < Vec<X, kElems>::kWords; ++i) {
    const Pair value = operation(*reinterpret_cast<const Pair*>(&a.words[i]), *reinterpret_cast<const Pair*>(&b.words[i]));
    result.words[i] = *reinterpret_cast<const std::uint32_t*>(&value);
  }
  return result;
}

// The functions of CUDA with _rn are never contracted to an fma.
template <typename X, int kElems>
__device__ __forceinline__ Vec<X, kElems> multiply(const Vec<X, kElems>& a, const Vec<X, kElems>& b) {
  if constexpr (sizeof(X) == 4) {
    Vec<X, kElems> result;
#pragma unroll
    for (int i = 0; i < kElems; ++i) {
      result.words[i] = __float_as_uint(__uint_as_float(a.words[i]) * __uint_as_float(b.words[i]));
    }
    return result;
  } else {
    return pairwise(a, b, [](auto x, auto y) { return __hmul2_rn(x, y); });
  }
}

template <typename X, int kElems>
__device__ __forceinline__ Vec<X, kElems> add(const Vec<X, kElems>& a, const Vec<X, kElems>& b) {
  return pairwise(a, b, [](auto x, auto y) { return __hadd2_rn(x, y); });
}

// Each element's neighbour.
template <typename X, int kElems>
__device__ __forceinline__ Vec<X, kElems> swap_neighbours(const Vec<X, kElems>& a) {
  Vec<X, kElems> result;
#pragma unroll
  for (int i = 0; i < Vec<X, kElems>::kWords; ++i) {
    result.words[i] = sizeof(X) == 4 ? a.words[i ^ 1] : (a.words[i] << 16) | (a.words[i] >> 16);
  }
  return result;
}

// Negates the elements at even places, at odd ones, or both.
template <typename X, int kElems>
__device__ __forceinline__ void flip_signs(Vec<X, kElems>& a, bool even, bool odd) {
#pragma unroll
  for (int i = 0; i < Vec<X, kElems>::kWords; ++i) {
    const bool first = sizeof(X) == 4 && i % 2 == 1 ? odd : even;
    const bool second = sizeof(X) == 4 ? first : odd;
    a.words[i] ^= (second ? 0x80000000u : 0u) ^ (sizeof(X) == 2 && first ? 0x8000u : 0u);
  }
}

}  // namespace infuse::rope
