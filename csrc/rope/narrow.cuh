// The same for rows of odd sizes, rows that are not aligned, and tables of any dtype: one warp a row, one element at a
// time. A row that is normalised is read twice.
#pragma once

#include <cstdint>

#include "infuse/overlap.cuh"
#include "rope/params.h"
#include "rope/rows.cuh"

namespace infuse::rope {

template <typename T>
__device__ __forceinline__ float load_one(const void* row, std::int64_t at) {
  float value[1];
  unpack(load<Reuse::kShared, T, 1>(static_cast<const T*>(row) + at, true), value);
  return value[0];
}

__device__ __forceinline__ float factor(const Table& table, DType dtype, Place place, std::uint32_t at) {
  const std::int64_t offset = place.outer * table.outer_stride + place.inner * table.inner_stride + at * table.step;
  if (dtype == DType::kFloat32) return load_one<float>(table.data, offset);
  if (dtype == DType::kFloat16) return load_one<__half>(table.data, offset);
  return load_one<__nv_bfloat16>(table.data, offset);
}

template <typename X>
__device__ __forceinline__ float rounded(float value, bool rounds) {
  float values[1] = {value};
  if (rounds) round_through<X>(values);
  return values[0];
}

template <typename X>
__device__ __forceinline__ float narrow_value(const Params& params, const Part& part, const X* row, std::uint32_t at,
                                              float rstd) {
  Vec<X, 1> x = load<Reuse::kShared, X, 1>(row + at, true);
  if (part.has_norm) {
    Scale<X, 1> scale;
    scale.load(params, part, at, true);
    scale.finish(params, part);
    x = scale.is_packed(params) ? scale.template normalize<true>(x, rstd) : scale.template normalize<false>(x, rstd);
  }
  float value[1];
  unpack(x, value);
  return value[0];
}

template <typename X>
__device__ __forceinline__ void narrow_store(X* row, std::uint32_t at, float value) {
  const float values[1] = {value};
  store(row + at, pack<X>(values));
}

template <typename X>
__global__ __launch_bounds__(kNarrowThreads) void narrow_kernel(const __grid_constant__ Params params) {
  const Part& part = part_of_cta(params);
  const std::uint32_t item = (blockIdx.x - part.first_cta) * blockDim.y + threadIdx.y;
  const bool has_item = item < part.items;
  const Place place = place_of_item(part, has_item ? item : 0);
  const X* row = row_at<const X>(part.x, part.x_stride, place, place.block);
  wait_for_previous_kernel();
  X* out = static_cast<X*>(part.out) + out_offset(part, place) + place.block * part.out_stride[2];
  const std::uint32_t dim = has_item ? params.dim : 0;
  const std::uint32_t rotated = has_item && part.rotates ? params.rotary_dim : 0, half = rotated / 2;

  float rstd[1] = {};
  for (std::uint32_t i = threadIdx.x; part.has_norm && i < dim; i += blockDim.x) {
    const float value = load_one<X>(row, i);
    rstd[0] = fmaf(value, value, rstd[0]);
  }
  sum_over_lanes(rstd);
  rstd[0] = reciprocal_std(params, rstd[0]);

  for (std::uint32_t i = threadIdx.x; i < half; i += blockDim.x) {
    const std::uint32_t at[2] = {params.interleaved ? 2 * i : i, params.interleaved ? 2 * i + 1 : i + half};
    const float n[2] = {narrow_value<X>(params, part, row, at[0], rstd[0]),
                        narrow_value<X>(params, part, row, at[1], rstd[0])};
    for (int v = 0; v < 2; ++v) {
      const std::uint32_t own = params.per_pair ? i : at[v], other = params.per_pair ? i : at[1 - v];
      const float cos = factor(part.cos, params.cos_dtype, place, own);
      const float sin = factor(part.sin, params.sin_dtype, place, params.sin_of_partner ? other : own);
      const float turned = (v == 0) != params.inverse ? -n[1 - v] : n[1 - v];
      const bool rounds = params.rounds_products;
      narrow_store(out, at[v], rounded<X>(n[v] * cos, rounds) + rounded<X>(turned * sin, rounds));
    }
  }
  for (std::uint32_t i = rotated + threadIdx.x; i < dim; i += blockDim.x) {
    narrow_store(out, i, narrow_value<X>(params, part, row, i, rstd[0]));
  }
}

}  // namespace infuse::rope
