// What both rotary kernels share: which rows a group of lanes works on, and the norm of a row.
#pragma once

#include <cstdint>

#include "infuse/memory.cuh"
#include "infuse/reduce.cuh"
#include "infuse/vec.cuh"
#include "rope/packed.cuh"
#include "rope/params.h"

namespace infuse::rope {

// Where an item lies: a position [outer, inner] and a block of neighbouring heads.
struct Place {
  std::uint32_t outer, inner, block;
};

__device__ __forceinline__ const Part& part_of_cta(const Params& params) {
  static_assert(kMaxParts == 3);
  return params.parts[blockIdx.x >= params.parts[2].first_cta ? 2 : blockIdx.x >= params.parts[1].first_cta ? 1 : 0];
}

__device__ __forceinline__ Place place_of_item(const Part& part, std::uint32_t item) {
  const std::uint32_t row = part.head_blocks.divide(item);
  const std::uint32_t outer = part.inner.divide(row);
  return {outer, row - outer * part.inner.divisor, item - row * part.head_blocks.divisor};
}

// A row of a tensor [outer, inner, heads, dim].
template <typename T, typename Data>
__device__ __forceinline__ T* row_at(Data* data, const std::int64_t (&stride)[3], Place place, std::uint32_t head) {
  return static_cast<T*>(data) + place.outer * stride[0] + place.inner * stride[1] + head * stride[2];
}

// Offset in out of the first head at a place. A position counts from the end if it is negative, as an index does; one
// outside of out stops the kernel with an error, as torch's own index kernels do.
__device__ __forceinline__ std::int64_t out_offset(const Part& part, Place place) {
  std::int64_t inner = place.inner;
  if (part.positions != nullptr) {
    const std::int64_t at = place.inner * part.position_stride;
    inner = part.wide_positions ? __ldg(static_cast<const long long*>(part.positions) + at)
                                : __ldg(static_cast<const int*>(part.positions) + at);
    if (inner < 0) inner += part.num_positions;
    if (inner < 0 || inner >= part.num_positions) __trap();
  }
  return place.outer * part.out_stride[0] + inner * part.out_stride[1];
}

// Every lane of a row gets the sums over them. The order is fixed: the same input gives the same bits.
template <int kCount>
__device__ __forceinline__ void sum_over_lanes(float (&values)[kCount]) {
  for (unsigned offset = blockDim.x / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] += __shfl_xor_sync(kFullMask, values[i], static_cast<int>(offset));
  }
}

__device__ __forceinline__ float reciprocal_std(const Params& params, float sum_of_squares) {
  return rsqrtf(fmaf(sum_of_squares, params.inv_dim, params.eps));
}

// What a row is multiplied with: weight_offset + weight in fp32, or, with cast_before_weight and a narrow X, the weight
// in X, two to a word. Ones where there is no weight.
template <typename X, int kElems>
struct Scale {
  std::uint32_t words[kElems];

  static __device__ __forceinline__ bool is_packed(const Params& params) {
    return sizeof(X) == 2 && params.cast_before_weight;
  }

  // The weights as they lie in memory.
  __device__ __forceinline__ void load(const Params& params, const Part& part, std::uint32_t first, bool valid) {
    valid = valid && part.weight != nullptr;
    if (params.wide_weight) {
      keep(infuse::load<Reuse::kShared, float, kElems>(static_cast<const float*>(part.weight) + first, valid));
    } else {
      keep(infuse::load<Reuse::kShared, X, kElems>(static_cast<const X*>(part.weight) + first, valid));
    }
  }

  // Apart from the loads, so that others can be issued before it waits for them.
  __device__ __forceinline__ void finish(const Params& params, const Part& part) {
    float values[kElems];
    const bool has_weight = part.weight != nullptr;
    if (is_packed(params)) {
      if (has_weight) return;
#pragma unroll
      for (int i = 0; i < kElems; ++i) values[i] = 1.0f;
      keep(pack<X>(values));
      return;
    }
    if (!params.wide_weight) {
      unpack(packed(), values);
#pragma unroll
      for (int i = 0; i < kElems; ++i) words[i] = __float_as_uint(values[i]);
    }
#pragma unroll
    for (int i = 0; i < kElems; ++i) {
      words[i] = __float_as_uint(has_weight ? params.weight_offset + __uint_as_float(words[i]) : 1.0f);
    }
  }

  // The values that infuse::rms_norm would store. kPacked: is_packed.
  template <bool kPacked>
  __device__ __forceinline__ Vec<X, kElems> normalize(const Vec<X, kElems>& x, float rstd) const {
    float values[kElems];
    unpack(x, values);
#pragma unroll
    for (int i = 0; i < kElems; ++i) values[i] *= rstd;
    if constexpr (kPacked) {
      return multiply(pack<X>(values), packed());
    } else {
#pragma unroll
      for (int i = 0; i < kElems; ++i) values[i] *= __uint_as_float(words[i]);
      return pack<X>(values);
    }
  }

 private:
  template <typename T>
  __device__ __forceinline__ void keep(const Vec<T, kElems>& vec) {
#pragma unroll
    for (int i = 0; i < Vec<T, kElems>::kWords; ++i) words[i] = vec.words[i];
  }

  __device__ __forceinline__ Vec<X, kElems> packed() const {
    Vec<X, kElems> vec;
#pragma unroll
    for (int i = 0; i < Vec<X, kElems>::kWords; ++i) vec.words[i] = words[i];
    return vec;
  }
};

}  // namespace infuse::rope
