// The first kernel: what the scores' gradient needs of each row, and the zeros that sums start from.
//
//   delta = sum over dim_v of dout * out        lse in powers of two
#pragma once

#include <cstdint>

#include "attention_backward/params.h"
#include "infuse/memory.cuh"
#include "infuse/overlap.cuh"
#include "infuse/reduce.cuh"

namespace infuse::attention_backward {

constexpr int kFirstThreads = 256;
constexpr float kInfinity = __builtin_huge_valf();

// Below, a row has seen nothing, or only keys that a mask has filled with its dtype's lowest number: of such numbers
// the sum of exponentials cannot be told from the largest one.
constexpr float kLowestLse = -1e30f;

// Lanes that share a row: as many as it has pieces of 16 bytes.
__host__ __device__ __forceinline__ std::uint32_t lanes_of_row(std::uint32_t dim_v) {
  return dim_v <= 64 ? 8 : dim_v <= 128 ? 16 : 32;
}

template <typename T>
__device__ __forceinline__ float product_of_pieces(const Params& params, std::uint32_t of_all, std::uint32_t query,
                                                   std::uint32_t piece, bool valid) {
  const std::uint32_t batch = params.head_divisor.divide(of_all), head = of_all - batch * params.heads;
  const auto at = [&](const void* tensor, const Strides& stride) {
    return static_cast<const T*>(tensor) + batch * stride.batch + head * stride.head + query * stride.row + piece * 8;
  };
  const auto dout = load<Reuse::kOnce, T, 8>(at(params.dout, params.dout_stride), valid);
  const auto out = load<Reuse::kOnce, T, 8>(at(params.out, params.out_stride), valid);
  float a[8], b[8], sum = 0.0f;
  unpack(dout, a);
  unpack(out, b);
#pragma unroll
  for (int i = 0; i < 8; ++i) sum += a[i] * b[i];
  return sum;
}

// One row for `lanes_of_row` threads.
template <typename T>
__global__ void __launch_bounds__(kFirstThreads) first_kernel(const __grid_constant__ Params params) {
  constexpr float kLog2e = 1.4426950408889634f;
  const std::uint32_t lanes = lanes_of_row(params.dim_v), lane = threadIdx.x % lanes;
  const std::uint32_t row = blockIdx.x * (kFirstThreads / lanes) + threadIdx.x / lanes;
  const std::uint32_t of_all = params.padded_query_divisor.divide(row);
  const std::uint32_t query = row - of_all * params.padded_queries;
  const bool valid = query < params.queries;
  wait_for_previous_kernel();
  const float lse = valid ? params.lse[static_cast<std::int64_t>(of_all) * params.queries + query] : -kInfinity;
  float sum = product_of_pieces<T>(params, of_all, query, lane, valid && lane * 8 < params.dim_v);
  float4* zeros = reinterpret_cast<float4*>(params.dq_sum + static_cast<std::int64_t>(row) * params.padded_dim);
  for (std::uint32_t i = lane; i < params.padded_dim / 4; i += lanes) zeros[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (params.turns != nullptr) {
    const std::uint32_t thread = blockIdx.x * kFirstThreads + threadIdx.x;
    if (thread <= params.batch * params.heads * params.query_blocks) params.turns[thread] = 0;
  }
  sum = group_sum(sum, static_cast<int>(lanes));
  if (lane != 0) return;
  const bool has_gradient = !(lse < kLowestLse);
  params.lse_log2[row] = has_gradient ? lse * kLog2e : kInfinity;
  params.delta[row] = has_gradient ? sum : 0.0f;  // of a row that sees nothing, out may be NaN
}

}  // namespace infuse::attention_backward
