// The backward for rows that are too long for the ring, or not aligned: one kernel for the two means of each row, and
// one that goes down the columns, writes dx and sums up the gradients of weight and bias. x and dy are read twice.
// RMSNorm is LayerNorm with means of 0 here: the kernels are bound by memory, and half as many of them is enough.
#pragma once

#include <cstdint>

#include "infuse/memory.cuh"
#include "infuse/overlap.cuh"
#include "norm_backward/formula.cuh"
#include "norm_backward/row_sums.cuh"
#include "norm_backward/traits.h"

namespace infuse::norm_backward {

template <typename Traits>
struct TwoPassAccess {
  using X = typename Traits::X;
  using XVec = Vec<X, Traits::kVecElems>;
  static constexpr int kElems = Traits::kVecElems;

  static __device__ __forceinline__ XVec load_row(const Rows& rows, std::uint32_t row, std::uint32_t vec, bool valid) {
    const std::int64_t offset = valid ? rows.map.offset(row) + std::int64_t{vec} * kElems : 0;
    return load<Reuse::kOnce, X, kElems>(static_cast<const X*>(rows.data) + offset, valid);
  }

  static __device__ __forceinline__ void store_row(const Params& params, void* tensor, std::uint32_t row,
                                                   std::uint32_t vec, const float (&values)[kElems]) {
    store(static_cast<X*>(tensor) + std::size_t{row} * params.dim + std::size_t{vec} * kElems, pack<X>(values));
  }

  // The further terms of dy are loaded one after the other, behind those that are in flight together.
  static __device__ __forceinline__ void add_terms(const Params& params, std::uint32_t row, std::uint32_t vec,
                                                   float (&dy)[kElems]) {
    for (std::uint32_t tensor = params.more_dy; tensor < params.dsum; ++tensor) {
      float term[kElems];
      unpack(load_row(params.tensors[tensor], row, vec, true), term);
      add(term, dy);
    }
  }

  // n and dy, as far as the row's sums go.
  static __device__ __forceinline__ void terms_of(const Params& params, std::uint32_t row, std::uint32_t vec,
                                                  const XVec& x, const XVec& gate, const RowStats& stats,
                                                  float (&n)[kElems], float (&dy)[kElems]) {
    normalize<true>(x, stats, n);
    add_terms(params, row, vec, dy);
    if (params.dgate == nullptr) return;
    float act[kElems], slope[kElems];
    activate(params, gate, act, slope);
    apply_gate(params, act, n, dy);
  }

  static __device__ __forceinline__ void load_scale(const Params& params, std::uint32_t vec, bool valid,
                                                    float (&scale)[kElems]) {
    const bool there = valid && params.weight != nullptr;
    const std::size_t first = there ? std::size_t{vec} * kElems : 0;
    if (params.weight_dtype == DType::kFloat32) {
      const auto* weight = static_cast<const float*>(params.weight) + first;
      scale_of(params, load<Reuse::kShared, float, kElems>(weight, there), scale);
    } else {
      const auto* weight = static_cast<const X*>(params.weight) + first;
      scale_of(params, load<Reuse::kShared, X, kElems>(weight, there), scale);
    }
  }

  static __device__ __forceinline__ RowStats stats(const Params& params, std::uint32_t row, bool valid) {
    return {valid && params.mean != nullptr ? params.mean[row] : 0.0f, valid ? params.rstd[row] : 0.0f};
  }
};

// A CTA is one row. Writes [mean(g), mean(g * n)] of it, the first one 0 for RMSNorm. The minimum of one CTA keeps
// ptxas from spilling for the sake of more.
template <typename Traits>
__global__ __launch_bounds__(kRowThreads, 1) void row_means_kernel(const __grid_constant__ Params params) {
  using Access = TwoPassAccess<Traits>;
  constexpr int kElems = Traits::kVecElems, kUnroll = Traits::kUnroll;
  __shared__ PairSumStorage storage;

  wait_for_previous_kernel();
  const std::uint32_t row = blockIdx.x;
  const RowStats stats = Access::stats(params, row, true);
  RowMeans means = {0.0f, 0.0f};
  for (std::uint32_t first = threadIdx.x; first < params.row_vecs; first += kUnroll * blockDim.x) {
    typename Access::XVec x[kUnroll], dy[kUnroll], gate[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const std::uint32_t vec = first + i * blockDim.x;
      x[i] = Access::load_row(params.tensors[kX], row, vec, vec < params.row_vecs);
      dy[i] = Access::load_row(params.tensors[kDy], row, vec, vec < params.row_vecs);
      gate[i] = Access::load_row(params.tensors[kGate], row, vec, vec < params.row_vecs && params.dgate != nullptr);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const std::uint32_t vec = first + i * blockDim.x;
      if (vec >= params.row_vecs) continue;
      float n[kElems], wide_dy[kElems], scale[kElems], g[kElems];
      unpack(dy[i], wide_dy);
      Access::terms_of(params, row, vec, x[i], gate[i], stats, n, wide_dy);
      Access::load_scale(params, vec, true, scale);
      weigh<true>(wide_dy, scale, n, g, means);
    }
  }
  let_next_kernel_start();
  RowSum(storage).add_up<true>(means.gn, means.g, 0);
  if (threadIdx.x == 0) {
    params.row_means[2 * std::size_t{row}] = params.mean != nullptr ? means.g * params.inv_dim : 0.0f;
    params.row_means[2 * std::size_t{row} + 1] = stats.rstd < params.constant_rstd ? means.gn * params.inv_dim : 0.0f;
  }
}

// A CTA is (block of columns, part): it takes the rows part, part + parts, ..
template <typename Traits>
__global__ __launch_bounds__(kColumnThreads) void columns_kernel(const __grid_constant__ Params params) {
  using Access = TwoPassAccess<Traits>;
  using XVec = typename Access::XVec;
  constexpr int kElems = Traits::kVecElems, kUnroll = Traits::kUnroll;

  wait_for_previous_kernel();
  const std::uint32_t vec = blockIdx.x * blockDim.x + threadIdx.x;
  const bool has_vec = vec < params.row_vecs, has_dsum = params.dsum < params.num_tensors;
  float scale[kElems], dweight[kElems] = {}, dbias[kElems] = {};
  Access::load_scale(params, vec, has_vec, scale);
  for (std::uint32_t first = blockIdx.y; first < params.rows; first += kUnroll * gridDim.y) {
    XVec x[kUnroll], dy[kUnroll], gate[kUnroll], dsum[kUnroll];
    RowStats stats[kUnroll];
    RowMeans means[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const std::uint32_t row = first + i * gridDim.y;
      const bool has_row = row < params.rows, reads = has_row && has_vec;
      x[i] = Access::load_row(params.tensors[kX], row, vec, reads);
      dy[i] = Access::load_row(params.tensors[kDy], row, vec, reads);
      gate[i] = Access::load_row(params.tensors[kGate], row, vec, reads && params.dgate != nullptr);
      dsum[i] = Access::load_row(params.tensors[has_dsum ? params.dsum : kX], row, vec, reads && has_dsum);
      stats[i] = Access::stats(params, row, has_row);
      means[i].g = has_row ? params.row_means[2 * std::size_t{row}] : 0.0f;
      means[i].gn = has_row ? params.row_means[2 * std::size_t{row} + 1] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const std::uint32_t row = first + i * gridDim.y;
      if (row >= params.rows || !has_vec) continue;
      float n[kElems], wide_dy[kElems], wide_dsum[kElems], g[kElems], dx[kElems];
      unpack(dy[i], wide_dy);
      unpack(dsum[i], wide_dsum);
      Access::terms_of(params, row, vec, x[i], gate[i], stats[i], n, wide_dy);
      RowMeans unused = {0.0f, 0.0f};
      weigh<true>(wide_dy, scale, n, g, unused);
      input_gradient<true>(g, n, means[i], stats[i].rstd, dx);
      if (params.dgate != nullptr) {
        float wide_x[kElems], ungated_dy[kElems], dgate[kElems];
        unpack(x[i], wide_x);
        unpack(dy[i], ungated_dy);
        Access::add_terms(params, row, vec, ungated_dy);
        float act[kElems], slope[kElems];
        activate(params, gate[i], act, slope);
        gate_gradient(params, act, slope, wide_x, ungated_dy, scale, n, dx, dgate);
        Access::store_row(params, params.dgate, row, vec, dgate);
      }
      add(wide_dsum, dx);
      Access::store_row(params, params.dx, row, vec, dx);
      add_products(wide_dy, n, dweight);
      add(wide_dy, dbias);
    }
  }
  let_next_kernel_start();
  if (!has_vec) return;
  const std::size_t place = std::size_t{blockIdx.y} * params.dim + std::size_t{vec} * kElems;
#pragma unroll
  for (int k = 0; k < kElems; ++k) {
    if (params.weight_parts != nullptr) params.weight_parts[place + k] = dweight[k];
    if (params.bias_parts != nullptr) params.bias_parts[place + k] = dbias[k];
  }
}

}  // namespace infuse::norm_backward
