// Sums of partial sums over [num_parts, dim], in a fixed order, rounded to the gradient's dtype.
#pragma once

#include <cstdint>

#include "infuse/memory.cuh"
#include "infuse/overlap.cuh"
#include "norm_backward/params.h"

namespace infuse::norm_backward {

constexpr int kSumColumns = 32;
constexpr int kSumSlices = 16;

template <typename T>
__device__ __forceinline__ void store_rounded(void* out, std::uint32_t column, float value) {
  const float values[1] = {value};
  store(static_cast<T*>(out) + column, pack<T>(values));
}

// A CTA is (columns, slices of the parts); blockIdx.y chooses between dweight and dbias.
template <int kColumns>
__global__ __launch_bounds__(kColumns * kSumSlices) void sum_parts_kernel(
    const __grid_constant__ SumPartsParams params) {
  __shared__ float sums[kSumSlices][kColumns];
  wait_for_previous_kernel();
  const std::uint32_t column = blockIdx.x * kColumns + threadIdx.x;
  const float* parts = params.parts[blockIdx.y];
  float sum = 0.0f;
  if (column < params.dim) {
#pragma unroll 8
    for (std::uint32_t part = threadIdx.y; part < params.num_parts; part += kSumSlices) {
      sum += parts[std::size_t{part} * params.dim + column];
    }
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  let_next_kernel_start();
  __syncthreads();
  if (threadIdx.y != 0 || column >= params.dim) return;
#pragma unroll
  for (int slice = 1; slice < kSumSlices; ++slice) sum += sums[slice][threadIdx.x];
  void* out = params.out[blockIdx.y];
  switch (params.dtype[blockIdx.y]) {
    case DType::kBFloat16: return store_rounded<__nv_bfloat16>(out, column, sum);
    case DType::kFloat16: return store_rounded<__half>(out, column, sum);
    default: return store_rounded<float>(out, column, sum);
  }
}

}  // namespace infuse::norm_backward
