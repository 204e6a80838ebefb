// The kernel for rows that do not fit in registers, or whose addresses allow one element at a time only: it reads them
// twice, the second time from L2 as long as the rows under way fit in it.
#pragma once

#include <cstdint>

#include "infuse/overlap.cuh"
#include "infuse/reduce.cuh"
#include "norm/row.cuh"
#include "norm/traits.h"

namespace infuse::norm {

// Count, mean and sum of squared deviations of a part of a row, extended chunk by chunk (Chan, Golub and LeVeque 1983):
// a sum of squares less the square of the sum would cancel in a row with an offset.
struct RunningMoments {
  float count = 0.0f, mean = 0.0f, squares = 0.0f;

  __device__ __forceinline__ void add(float chunk_count, float chunk_mean, float chunk_squares) {
    const float total = count + chunk_count, delta = chunk_mean - mean;
    if (chunk_count == 0.0f) return;
    mean += delta * (chunk_count / total);
    squares += chunk_squares + delta * (delta * (count * (chunk_count / total)));  // in this order 0 * inf can't arise
    count = total;
  }
};

template <typename Traits>
__global__ __launch_bounds__(Traits::kMaxThreads) void two_pass_kernel(const __grid_constant__ Params params) {
  using Vectors = Row<typename Traits::Types, Traits::kVecElems>;
  constexpr int kUnroll = Traits::kUnroll;
  constexpr int kElems = Traits::kVecElems;
  __shared__ RowSumsStorage<2> storage;

  const Vectors row(params, std::uint64_t{blockIdx.x} * blockDim.y + threadIdx.y);
  typename Vectors::XVec x[kUnroll], operand[kUnroll] = {};
  const auto load_chunk = [&](auto reuse, std::uint32_t first) {
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      x[i] = row.template load_x<decltype(reuse)::value>(first + i * blockDim.x);
      if constexpr (Vectors::kHasOperand) {
        operand[i] = row.template load_operand<decltype(reuse)::value>(first + i * blockDim.x);
      }
    }
  };
  if (params.starts_early) wait_for_previous_kernel();

  RunningMoments moments;
  float squares[2] = {0.0f, 0.0f};
  for (std::uint32_t first = threadIdx.x; row.holds(first); first += kUnroll * blockDim.x) {
    load_chunk(std::integral_constant<Reuse, Reuse::kShared>{}, first);
    int vecs = 0;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      float h[kElems];
      row.combine(x[i], operand[i], h);
      if constexpr (Vectors::kHasResidual) {
        x[i] = pack<typename Vectors::X>(h);
        row.store_sum(first + i * blockDim.x, x[i]);
      }
      vecs += row.holds(first + i * blockDim.x);
#pragma unroll
      for (int j = 0; j < kElems; ++j) {
        sum = fmaf(h[j], params.inv_dim, sum);
        squares[j % 2] = fmaf(h[j], h[j], squares[j % 2]);
      }
    }
    if (!params.center) continue;
    const float count = static_cast<float>(vecs * kElems);
    const float mean = sum * (static_cast<float>(params.dim) / count);
    float deviations = 0.0f;
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      float h[kElems];  // anew: kept, it would take twice the registers of x
      if constexpr (Vectors::kHasResidual) {
        unpack(x[i], h);
      } else {
        row.combine(x[i], operand[i], h);
      }
      const float subtracted = row.holds(first + i * blockDim.x) ? mean : 0.0f;
#pragma unroll
      for (int j = 0; j < kElems; ++j) deviations = fmaf(h[j] - subtracted, h[j] - subtracted, deviations);
    }
    moments.add(count, mean, deviations);
  }
  if (params.starts_early) let_next_kernel_start();

  Statistics statistics{};
  if (params.center) {
    const float share = moments.count * params.inv_dim;
    float mean[1] = {moments.mean * share};
    row_sums(mean, storage, 0);
    const float delta = moments.mean - mean[0];
    float sums[2] = {fmaf(delta * moments.count, delta, moments.squares), delta * share};
    row_sums(sums, storage, 1);
    statistics.mean = mean[0] + sums[1];
    statistics.rstd = row.reciprocal_std(fmaf(sums[0], params.inv_dim, -sums[1] * sums[1]));
  } else {
    float sum[1] = {squares[0] + squares[1]};
    row_sums(sum, storage, 0);
    statistics.rstd = row.reciprocal_std(sum[0] * params.inv_dim);
  }
  if (threadIdx.x == 0) row.store_statistics(statistics);

  for (std::uint32_t first = threadIdx.x; row.holds(first); first += kUnroll * blockDim.x) {
    load_chunk(std::integral_constant<Reuse, Reuse::kOnce>{}, first);
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const std::uint32_t vec = first + i * blockDim.x;
      float h[kElems];
      row.combine(x[i], operand[i], h);
      row.finish(h, statistics, row.load_weight(params.weight, vec), row.load_weight(params.bias, vec), operand[i]);
      row.store_out(vec, h);
    }
  }
}

}  // namespace infuse::norm
