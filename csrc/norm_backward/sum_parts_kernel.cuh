// Sums of partial sums over [num_parts, dim], in a fixed order, rounded to the gradient's dtype.
#pragma once

#include <cstdint>

#include "infuse/memory.cuh"
#include "infuse/overlap.cuh"
#include "norm_backward/params.h"

namespace infuse::norm_backward {

constexpr int kSumColumns = 32;
constexpr int kSumSlices = 16;
constexpr int kSumBatch = 12;  // loads in flight: all of a thread's on up to 192 SMs

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
  for (std::uint32_t first = threadIdx.y; first < params.num_parts; first += kSumBatch * kSumSlices) {
    float loaded[kSumBatch][1];
#pragma unroll
    for (int i = 0; i < kSumBatch; ++i) {
      const std::uint32_t part = first + i * kSumSlices;
      const bool valid = part < params.num_parts && column < params.dim;
      const float* source = parts + (valid ? std::size_t{part} * params.dim + column : 0);
      unpack(load<Reuse::kOnce, float, 1>(source, valid), loaded[i]);
    }
#pragma unroll
    for (int i = 0; i < kSumBatch; ++i) sum += loaded[i][0];
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
