// Norms over the last dimension, forward, with fp32 statistics:
//
//   h = x                         alone
//   h = round_to_x_dtype(x + residual)   with a residual; h is written too
//   h = x * act(gate)             with a gate in front, not rounded
//   n = (h - mean(h)) * rsqrt(mean((h - mean(h))^2) + eps)    without the means in an RMS norm
//   y = n * (weight_offset + weight) + bias                   and * act(gate) with a gate behind
//
// The flags of Params say where the formula rounds. A CTA is (threads of a row, rows). Thread t of a row holds the
// vectors t, t + threads, t + 2 threads, .. of it, so that neighbouring threads read neighbouring 16 bytes.
// Memory-bound: each tensor is read or written once, and what matters is the number of bytes in flight on each SM.
#pragma once

#include <cstdint>

#include "infuse/overlap.cuh"
#include "infuse/reduce.cuh"
#include "norm/row.cuh"
#include "norm/traits.h"

namespace infuse::norm {

template <typename Traits>
__global__ __launch_bounds__(Traits::kMaxThreads, Traits::kMinCtas) void register_kernel(
    const __grid_constant__ Params params) {
  using Vectors = Row<typename Traits::Types, Traits::kVecElems>;
  using XVec = typename Vectors::XVec;
  constexpr int kVecs = Traits::kVecsPerThread;
  constexpr int kElems = Traits::kVecElems;
  constexpr int kChunk = Traits::kChunk;
  __shared__ RowSumsStorage<2> storage;

  const Vectors row(params, std::uint64_t{blockIdx.x} * blockDim.y + threadIdx.y);
  const auto vec_of = [&](int i) { return threadIdx.x + i * blockDim.x; };
  // A vector beyond the row is all zeros; its threads still take part in shuffles and barriers.
  XVec x[kVecs];
  XVec operand[kVecs] = {};  // takes no registers in a kernel without one
  typename Vectors::WVec weight[kChunk], bias[kChunk] = {};
  const auto load_weights = [&](int first) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      weight[i] = row.load_weight(vec_of(first + i));
      if constexpr (Vectors::kCenter) bias[i] = row.load_bias(vec_of(first + i));
    }
  };
  wait_for_previous_kernel();
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    x[i] = row.template load_x<Reuse::kOnce>(vec_of(i));
    if constexpr (Vectors::kHasOperand) operand[i] = row.template load_operand<Reuse::kOnce>(vec_of(i));
  }
  if constexpr (!Traits::kLateWeights) load_weights(0);
  if (params.lets_next_start) let_next_kernel_start();

  // From here on x holds h, in fp32 where it was multiplied by the gate: then the gate's registers are free.
  if constexpr (Vectors::kHasResidual || Vectors::kGateFirst) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      float h[kElems];
      row.combine(x[i], operand[i], h);
      if constexpr (Vectors::kGateFirst) {
        put_fp32(h, x[i], operand[i]);
      } else {
        x[i] = pack<typename Vectors::X>(h);
        row.store_sum(vec_of(i), x[i]);
      }
    }
  }
  const auto get = [&](int i, float(&h)[kElems]) {
    if constexpr (Vectors::kGateFirst) {
      get_fp32(x[i], operand[i], h);
    } else {
      unpack(x[i], h);
    }
  };
  // Without this rows and weights stay widened to fp32 across a barrier, in twice the registers.
  const auto keep_rows_packed = [&] {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      if constexpr (!Vectors::kGateFirst) keep_packed(x[i], params.zero);
      if constexpr (Vectors::kGateLast) keep_packed(operand[i], params.zero);
    }
  };

  Statistics statistics{};
  if constexpr (Vectors::kCenter) {
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      float h[kElems];
      get(i, h);
#pragma unroll
      for (int j = 0; j < kElems; ++j) sums[j % 4] = fmaf(h[j], params.sum_scale, sums[j % 4]);
    }
    float sum[1] = {(sums[0] + sums[1]) + (sums[2] + sums[3])};
    row_sums(sum, storage, 0);
    const float mean = row.mean_of(sum[0]);
    keep_rows_packed();
    // The mean of the deviations is what rounding left of it: it corrects the mean and the mean of squares.
    float squares[4] = {0.0f, 0.0f, 0.0f, 0.0f}, rests[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      float h[kElems];
      get(i, h);
      const float subtracted = vec_of(i) < row.num_vecs ? mean : 0.0f;
#pragma unroll
      for (int j = 0; j < kElems; ++j) {
        const float deviation = h[j] - subtracted;
        squares[j % 4] = fmaf(deviation, deviation, squares[j % 4]);
        if constexpr (Vectors::kCorrectsMean) rests[j % 4] = fmaf(deviation, params.inv_dim, rests[j % 4]);
      }
    }
    float both[Vectors::kCorrectsMean ? 2 : 1] = {(squares[0] + squares[1]) + (squares[2] + squares[3])};
    if constexpr (Vectors::kCorrectsMean) both[1] = (rests[0] + rests[1]) + (rests[2] + rests[3]);
    row_sums(both, storage, 1);
    const float rest = Vectors::kCorrectsMean ? both[sizeof(both) / sizeof(float) - 1] : 0.0f;
    statistics = {mean + rest, row.reciprocal_std(both[0] * params.inv_dim, rest)};
  } else {
    float squares[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // one sum alone would be a long chain of dependent additions
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      float h[kElems];
      get(i, h);
#pragma unroll
      for (int j = 0; j < kElems; ++j) squares[j % 4] = fmaf(h[j], h[j], squares[j % 4]);
    }
    float sum[1] = {(squares[0] + squares[1]) + (squares[2] + squares[3])};
    row_sums(sum, storage, 0);
    statistics.rstd = row.reciprocal_std(sum[0] * params.inv_dim);
  }
  keep_rows_packed();
  if (threadIdx.x == 0) row.store_statistics(statistics);

  // One loop for each answer, for a branch in it would separate its loads.
  const auto write = [&](auto scale) {
#pragma unroll
    for (int first = 0; first < kVecs; first += kChunk) {
      if (Traits::kLateWeights || first > 0) load_weights(first);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        keep_packed(weight[i], params.zero);
        if constexpr (Vectors::kCenter) keep_packed(bias[i], params.zero);
      }
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        float h[kElems];
        get(first + i, h);
        row.template finish<decltype(scale)::value>(h, statistics, weight[i], bias[i], operand[first + i]);
        row.store_out(vec_of(first + i), h);
      }
    }
  };
  dispatch_scale<typename Vectors::X>(params, write);
}

}  // namespace infuse::norm
