// RMSNorm forward:  n = x * rsqrt(mean(x^2) + eps)  in fp32, then
//   y = n * (weight_offset + weight), rounded once to x's dtype;            n alone without a weight
//   y = weight * round_to_x_dtype(n), rounded to the wider of both dtypes;  with cast_before_weight
//
// A CTA is (threads of a row, rows). Thread t of a row holds the vectors t, t + threads, t + 2 threads, .. of it, so
// that neighbouring threads read neighbouring 16 bytes. Memory-bound: x is read once, out is written once, and what
// matters is the number of bytes in flight on each SM.
#pragma once

#include <cstdint>

#include "infuse/memory.cuh"
#include "infuse/reduce.cuh"
#include "infuse/vec.cuh"
#include "rms_norm/params.h"
#include "rms_norm/traits.h"

namespace infuse::rms_norm {

template <typename Types, int kVecElems>
struct Accessor {
  using X = typename Types::x_type;
  using W = typename Types::weight_type;
  using Out = typename Types::out_type;
  using XVec = Vec<X, kVecElems>;
  using WVec = Vec<W, kVecElems>;
  using OutVec = Vec<Out, kVecElems>;

  template <Reuse kReuse>
  static __device__ __forceinline__ XVec load_x(const X* row, std::uint32_t vec, bool valid) {
    return load<kReuse, X, kVecElems>(row + std::size_t{vec} * kVecElems, valid);
  }

  static __device__ __forceinline__ WVec load_weight(const Params& params, std::uint32_t vec, bool valid) {
    return load<Reuse::kShared, W, kVecElems>(static_cast<const W*>(params.weight) + std::size_t{vec} * kVecElems,
                                              valid && params.weight != nullptr);
  }

  // Adds the squares of a vector to four partial sums: one alone would be a long chain of dependent additions.
  static __device__ __forceinline__ void add_squares(const XVec& x, float (&sums)[4]) {
    float h[kVecElems];
    unpack(x, h);
#pragma unroll
    for (int i = 0; i < kVecElems; ++i) sums[i % 4] = fmaf(h[i], h[i], sums[i % 4]);
  }

  static __device__ __forceinline__ OutVec normalize(const Params& params, const XVec& x, const WVec& weight,
                                                     float rstd) {
    float y[kVecElems];
    unpack(x, y);
#pragma unroll
    for (int i = 0; i < kVecElems; ++i) y[i] *= rstd;
    if (params.weight != nullptr) {
      float w[kVecElems];
      unpack(weight, w);
      if (params.cast_before_weight) {
        round_through<X>(y);
#pragma unroll
        for (int i = 0; i < kVecElems; ++i) y[i] *= w[i];
      } else {
#pragma unroll
        for (int i = 0; i < kVecElems; ++i) y[i] *= params.weight_offset + w[i];
      }
    }
    return pack<Out>(y);
  }

  static __device__ __forceinline__ void store_out(Out* row, std::uint32_t vec, const OutVec& y) {
    store(row + std::size_t{vec} * kVecElems, y);
  }
};

__device__ __forceinline__ float reciprocal_std(const Params& params, float sum_of_squares) {
  return rsqrtf(fmaf(sum_of_squares, params.inv_dim, params.eps));
}

template <typename Traits>
__global__ __launch_bounds__(Traits::kMaxThreads, Traits::kMinCtas) void register_kernel(
    const __grid_constant__ Params params) {
  using Access = Accessor<typename Traits::Types, Traits::kVecElems>;
  constexpr int kVecs = Traits::kVecsPerThread;
  constexpr int kChunk = Traits::kWeightChunk;
  __shared__ RowSumStorage storage;

  const std::uint32_t threads = blockDim.x;
  const std::uint32_t rows_per_cta = blockDim.y;

  typename Access::XVec x[kVecs];
  typename Access::WVec weight[kChunk];

  // A row beyond the last is all zeros; its threads still take part in shuffles and barriers.
  const auto load_row = [&](std::uint32_t row) {
    const bool has_row = row < params.rows;
    const auto* x_row = static_cast<const typename Access::X*>(params.x) + (has_row ? params.x_rows.offset(row) : 0);
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const std::uint32_t vec = threadIdx.x + i * threads;
      x[i] = Access::template load_x<Reuse::kOnce>(x_row, vec, has_row && vec < params.row_vecs);
    }
  };
  const auto load_weights = [&](int first) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const std::uint32_t vec = threadIdx.x + (first + i) * threads;
      weight[i] = Access::load_weight(params, vec, vec < params.row_vecs);
    }
  };

  // 64-bit, because the last step may pass 2^32.
  std::uint64_t first_row = std::uint64_t{blockIdx.x} * rows_per_cta;
  load_row(static_cast<std::uint32_t>(first_row) + threadIdx.y);
  load_weights(0);

  for (int turn = 0; first_row < params.rows; ++turn) {
    const std::uint32_t row = static_cast<std::uint32_t>(first_row) + threadIdx.y;
    first_row += std::uint64_t{gridDim.x} * rows_per_cta;

    typename Access::XVec current[kVecs];
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      current[i] = x[i];
      Access::add_squares(current[i], sums);
    }
    if constexpr (Traits::kPersistent) {
      if (first_row < params.rows) load_row(static_cast<std::uint32_t>(first_row) + threadIdx.y);
    }
    const float rstd = reciprocal_std(params, row_sum((sums[0] + sums[1]) + (sums[2] + sums[3]), storage, turn));

    // Without this (and below) row and weight stay widened to fp32 across the barrier, in twice the registers.
#pragma unroll
    for (int i = 0; i < kVecs; ++i) keep_packed(current[i], params.zero);

    const bool has_row = row < params.rows;
    auto* out_row = static_cast<typename Access::Out*>(params.out) + (has_row ? params.out_rows.offset(row) : 0);
#pragma unroll
    for (int first = 0; first < kVecs; first += kChunk) {
      if (first > 0) load_weights(first);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) keep_packed(weight[i], params.zero);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const std::uint32_t vec = threadIdx.x + (first + i) * threads;
        if (has_row && vec < params.row_vecs) {
          Access::store_out(out_row, vec, Access::normalize(params, current[first + i], weight[i], rstd));
        }
      }
    }
    if constexpr (!Traits::kPersistent) break;
    if constexpr (kChunk < kVecs) load_weights(0);
  }
}

template <typename Traits>
__global__ __launch_bounds__(Traits::kMaxThreads) void two_pass_kernel(const __grid_constant__ Params params) {
  using Access = Accessor<typename Traits::Types, Traits::kVecElems>;
  constexpr int kUnroll = Traits::kUnroll;
  __shared__ RowSumStorage storage;

  const std::uint32_t threads = blockDim.x;
  const std::uint64_t wide_row = std::uint64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const bool has_row = wide_row < params.rows;
  const std::uint32_t row = has_row ? static_cast<std::uint32_t>(wide_row) : 0;
  const std::uint32_t row_vecs = has_row ? params.row_vecs : 0;
  const auto* x_row = static_cast<const typename Access::X*>(params.x) + params.x_rows.offset(row);
  auto* out_row = static_cast<typename Access::Out*>(params.out) + params.out_rows.offset(row);

  // Kept in the caches, because the second pass reads the row again.
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (std::uint32_t first = threadIdx.x; first < row_vecs; first += kUnroll * threads) {
    typename Access::XVec x[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      x[i] = Access::template load_x<Reuse::kShared>(x_row, first + i * threads, first + i * threads < row_vecs);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) Access::add_squares(x[i], sums);
  }
  const float rstd = reciprocal_std(params, row_sum((sums[0] + sums[1]) + (sums[2] + sums[3]), storage, 0));

  for (std::uint32_t first = threadIdx.x; first < row_vecs; first += kUnroll * threads) {
    typename Access::XVec x[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      x[i] = Access::template load_x<Reuse::kOnce>(x_row, first + i * threads, first + i * threads < row_vecs);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const std::uint32_t vec = first + i * threads;
      const auto weight = Access::load_weight(params, vec, vec < row_vecs);
      if (vec < row_vecs) Access::store_out(out_row, vec, Access::normalize(params, x[i], weight, rstd));
    }
  }
}

}  // namespace infuse::rms_norm
