// The kernel for rows that do not fit in registers, or whose addresses allow one element at a time only: it reads them
// twice, the second time from L2 as long as the rows under way fit in it.
#pragma once

#include <cstdint>
#include <type_traits>

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
__global__ __launch_bounds__(Traits::kMaxThreads, Traits::kMinCtas) void two_pass_kernel(
    const __grid_constant__ Params params) {
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
  wait_for_previous_kernel();

  // Deviations of four-byte elements are taken from the median of three: a large offset is gone before anything is
  // rounded, and an outlier is none of it.
  float shift = 0.0f;
  if constexpr (Vectors::kCorrectsMean) {
    const auto first_of = [&](std::uint32_t vec) {
      float h[kElems];
      row.combine(row.template load_x<Reuse::kShared>(vec),
                  Vectors::kHasResidual ? row.template load_operand<Reuse::kShared>(vec) : operand[0], h);
      return h[0];
    };
    const float a = first_of(0), b = first_of(row.num_vecs / 2), c = first_of(row.num_vecs - 1);
    shift = fmaxf(fminf(a, b), fminf(fmaxf(a, b), c));
  }
  RunningMoments moments;
  float squares[2] = {0.0f, 0.0f};
  for (std::uint32_t first = threadIdx.x; first < row.num_vecs; first += kUnroll * blockDim.x) {
    load_chunk(std::integral_constant<Reuse, Reuse::kShared>{}, first);
    int vecs = 0;
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      float h[kElems];
      row.combine(x[i], operand[i], h);
      if constexpr (Vectors::kHasResidual) {
        x[i] = pack<typename Vectors::X>(h);
        row.store_sum(first + i * blockDim.x, x[i]);
      }
      const bool held = first + i * blockDim.x < row.num_vecs;
      vecs += held;
      const float base = held ? shift : 0.0f;  // what is beyond the row is zero and stays so
#pragma unroll
      for (int j = 0; j < kElems; ++j) {
        if constexpr (Vectors::kCenter) {
          sums[j % 4] = fmaf(Vectors::kCorrectsMean ? h[j] - base : h[j], params.sum_scale, sums[j % 4]);
        } else {
          squares[j % 2] = fmaf(h[j], h[j], squares[j % 2]);
        }
      }
    }
    if constexpr (Vectors::kCenter) {
      const float count = static_cast<float>(vecs * kElems);
      const float mean = __fdiv_rn((sums[0] + sums[1]) + (sums[2] + sums[3]), count * params.sum_scale);
      float deviations[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        float h[kElems];
        unpack(x[i], h);
        const bool held = first + i * blockDim.x < row.num_vecs;
        const float base = held ? shift : 0.0f, subtracted = held ? mean : 0.0f;
#pragma unroll
        for (int j = 0; j < kElems; ++j) {
          const float deviation = (Vectors::kCorrectsMean ? h[j] - base : h[j]) - subtracted;
          deviations[j % 4] = fmaf(deviation, deviation, deviations[j % 4]);
        }
      }
      moments.add(count, mean, (deviations[0] + deviations[1]) + (deviations[2] + deviations[3]));
    }
  }
  if (params.lets_next_start) let_next_kernel_start();

  Statistics statistics{};
  if constexpr (Vectors::kCenter) {
    const float share = moments.count * params.inv_dim;
    float mean[1] = {moments.mean * share};
    row_sums(mean, storage, 0);
    const float delta = moments.mean - mean[0];
    float sums[2] = {fmaf(delta * moments.count, delta, moments.squares), delta * share};
    row_sums(sums, storage, 1);
    statistics = {shift + (mean[0] + sums[1]), row.reciprocal_std(sums[0] * params.inv_dim, sums[1])};
  } else {
    float sum[1] = {squares[0] + squares[1]};
    row_sums(sum, storage, 0);
    statistics.rstd = row.reciprocal_std(sum[0] * params.inv_dim);
  }
  if (threadIdx.x == 0) row.store_statistics(statistics);

  const auto write = [&](auto scale) {
    for (std::uint32_t first = threadIdx.x; first < row.num_vecs; first += kUnroll * blockDim.x) {
      load_chunk(std::integral_constant<Reuse, Reuse::kOnce>{}, first);
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const std::uint32_t vec = first + i * blockDim.x;
        float h[kElems];
        row.combine(x[i], operand[i], h);
        row.template finish<decltype(scale)::value>(h, statistics, row.load_weight(vec),
                                                                 row.load_bias(vec), operand[i]);
        row.store_out(vec, h);
      }
    }
  };
  dispatch_scale<typename Vectors::X>(params, write);
}

}  // namespace infuse::norm
