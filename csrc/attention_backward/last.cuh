// The last kernels: dq from its sums, and dk and dv from those of several splits, which are added in a fixed order.
#pragma once

#include <cstdint>

#include "attention_backward/dq_tiles.cuh"
#include "attention_backward/params.h"
#include "infuse/memory.cuh"
#include "infuse/overlap.cuh"

namespace infuse::attention_backward {

constexpr int kLastThreads = 256;

// Eight numbers of dq for each thread; blockIdx.x: 16 rows of all heads' padded ones.
template <typename T>
__global__ void __launch_bounds__(kLastThreads) dq_kernel(const __grid_constant__ Params params) {
  const std::uint32_t first = blockIdx.x * kTileRows, of_all = params.padded_query_divisor.divide(first);
  const std::uint32_t batch = params.head_divisor.divide(of_all), head = of_all - batch * params.heads;
  const std::uint32_t row = threadIdx.x % kTileRows, query = first - of_all * params.padded_queries + row;
  wait_for_previous_kernel();
  if (query >= params.queries) return;
  T* to = static_cast<T*>(params.dq) + batch * params.dq_stride.batch + head * params.dq_stride.head +
          query * params.dq_stride.row;
  for (std::uint32_t piece = threadIdx.x / kTileRows; piece * 8 < params.dim; piece += kLastThreads / kTileRows) {
    float values[8];
    load_dq_row(params.dq_sum + dq_tile_offset(blockIdx.x, piece, params.padded_dim), row, values);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] *= params.scale;
    store(to + piece * 8, pack<T>(values));
  }
}

// Eight numbers of a row: the sum of the splits.
template <typename T>
__device__ __forceinline__ void add_parts(const Params& params, const float* parts, std::uint32_t row,
                                          std::uint32_t piece, std::uint32_t dim, void* result,
                                          const Strides& stride) {
  if (piece * 8 >= dim) return;
  const std::int64_t rows = std::int64_t{params.batch} * params.kv_heads * params.keys;
  float values[8] = {};
  for (std::uint32_t split = 0; split < params.splits; ++split) {
    const auto part = load<Reuse::kOnce, float, 8>(parts + (split * rows + row) * dim + piece * 8, true);
    float more[8];
    unpack(part, more);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] += more[i];
  }
  const std::uint32_t of_all = row / params.keys, key = row - of_all * params.keys;
  const std::uint32_t batch = params.kv_head_divisor.divide(of_all), head = of_all - batch * params.kv_heads;
  store(static_cast<T*>(result) + batch * stride.batch + head * stride.head + key * stride.row + piece * 8,
        pack<T>(values));
}

// A row of dk and of dv for each warp.
template <typename T>
__global__ void __launch_bounds__(kLastThreads) add_parts_kernel(const __grid_constant__ Params params) {
  constexpr std::uint32_t kLanes = 32;
  const std::uint32_t row = blockIdx.x * (kLastThreads / kLanes) + threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  wait_for_previous_kernel();
  if (row >= params.batch * params.kv_heads * params.keys) return;
  add_parts<T>(params, params.dk_parts, row, lane, params.dim, params.dk, params.dk_stride);
  add_parts<T>(params, params.dv_parts, row, lane, params.dim_v, params.dv, params.dv_stride);
}

}  // namespace infuse::attention_backward
