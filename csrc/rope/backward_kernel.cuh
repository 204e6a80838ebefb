// The gradients of rows that were normalised and then rotated, and of the norm's weight:
//
//   g = rotation^T(dy)                                                    the same factors, turned the other way
//   dx = rstd * (g * w - n * mean(g * w * n)), n = x * rstd, w = weight_offset + weight
//   dweight = sum over rows of g * n
//
// Nothing is rounded but the results. dy and x are read once and dx is written once; rstd is computed again, from x,
// which lies in registers. A CTA walks over rows of all parts and leaves one partial sum of dweight for each part, in an
// order that only depends on the size of the grid: the same input gives the same bits.
#pragma once

#include <cstdint>

#include "infuse/overlap.cuh"
#include "rope/kernel.cuh"

namespace infuse::rope {

constexpr int kBackwardWarps = kBackwardThreads / kWarpLanes;

// Rows of one lane: dy and x of its two vectors.
template <typename X, int kElems>
struct Gradients {
  Vec<X, kElems> dy[2], x[2];

  __device__ __forceinline__ void load(const X* dy_row, const X* x_row, const Slot& slot, bool valid) {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      dy[v] = infuse::load<Reuse::kOnce, X, kElems>(dy_row + slot.offset[v], slot.valid[v] && valid);
      x[v] = infuse::load<Reuse::kOnce, X, kElems>(x_row + slot.offset[v], slot.valid[v] && valid);
    }
  }
};

// What the loop over a part's rows keeps in registers. weight: in fp32, ones where there is none.
template <typename X, int kElems>
struct WeightGradient {
  float weight[2][kElems], sum[2][kElems];

  __device__ __forceinline__ void load(const Params& params, const Part& part, const Slot& slot) {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const bool valid = slot.valid[v] && part.weight != nullptr;
      const std::uint32_t first = slot.offset[v];
      if (params.wide_weight) {
        unpack(infuse::load<Reuse::kShared, float, kElems>(static_cast<const float*>(part.weight) + first, valid),
               weight[v]);
      } else {
        unpack(infuse::load<Reuse::kShared, X, kElems>(static_cast<const X*>(part.weight) + first, valid), weight[v]);
      }
#pragma unroll
      for (int i = 0; i < kElems; ++i) {
        weight[v][i] = valid ? params.weight_offset + weight[v][i] : 1.0f;
        sum[v][i] = 0.0f;
      }
    }
  }

  // The sums over the CTA's groups of lanes. Every thread must call this.
  __device__ __forceinline__ void store(const Params& params, const Part& part) {
    __shared__ float warp_sums[kBackwardWarps][kWarpLanes * 2 * kElems];
    const std::uint32_t thread = threadIdx.y * blockDim.x + threadIdx.x;
    const std::uint32_t warp = thread / kWarpLanes, place = threadIdx.x * 2 * kElems;
#pragma unroll
    for (int v = 0; v < 2; ++v) {
#pragma unroll
      for (int i = 0; i < kElems; ++i) {
        for (unsigned offset = blockDim.x; offset < kWarpLanes; offset *= 2) {
          sum[v][i] += __shfl_xor_sync(kFullMask, sum[v][i], static_cast<int>(offset));
        }
        if (thread % kWarpLanes < blockDim.x) warp_sums[warp][place + v * kElems + i] = sum[v][i];
      }
    }
    __syncthreads();
    for (std::uint32_t at = thread; at < blockDim.x * 2 * kElems; at += kBackwardThreads) {
      const Slot owner = slot_of_lane<kElems>(params, part, at / (2 * kElems), true);
      // No index that is known at run time only: it would move both to local memory.
      const bool is_first = at / kElems % 2 == 0;
      const bool valid = is_first ? owner.valid[0] : owner.valid[1];
      const std::uint32_t offset = is_first ? owner.offset[0] : owner.offset[1];
      float total = 0.0f;
#pragma unroll
      for (int i = 0; i < kBackwardWarps; ++i) total += warp_sums[i][at];
      if (valid) part.weight_parts[blockIdx.x * params.dim + offset + at % kElems] = total;
    }
    __syncthreads();
  }
};

// g, in fp32: what `rotate` computes, not rounded.
template <bool kInterleaved, typename X, typename Factor, int kElems>
__device__ __forceinline__ void rotate_wide(const Vec<X, kElems> (&dy)[2], const Vec<Factor, kElems> (&cos)[2],
                                            const Vec<Factor, kElems> (&sin)[2], float (&g)[2][kElems]) {
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    float other[kElems], c[kElems], s[kElems];
    unpack(dy[v], g[v]);
    unpack(kInterleaved ? swap_neighbours(dy[v]) : dy[1 - v], other);
    unpack(cos[v], c);
    unpack(sin[v], s);
#pragma unroll
    for (int i = 0; i < kElems; ++i) g[v][i] = fmaf(g[v][i], c[i], other[i] * s[i]);
  }
}

// dx in the place of x, and the row's share of dweight.
template <typename X, typename Factor, int kElems>
__device__ __forceinline__ void differentiate(const Params& params, const Slot& slot, bool valid,
                                              const Vec<Factor, kElems> (&cos)[2], const Vec<Factor, kElems> (&sin)[2],
                                              Gradients<X, kElems>& row, WeightGradient<X, kElems>& weight) {
  float g[2][kElems], x[2][kElems];
  if (!slot.rotates) {
    unpack(row.dy[0], g[0]);
    unpack(row.dy[1], g[1]);
  } else if (params.interleaved) {
    rotate_wide<true>(row.dy, cos, sin, g);
  } else {
    rotate_wide<false>(row.dy, cos, sin, g);
  }
  float sums[2] = {};  // of x * x, and of g * w * x
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    unpack(row.x[v], x[v]);
#pragma unroll
    for (int i = 0; i < kElems; ++i) {
      sums[0] = fmaf(x[v][i], x[v][i], sums[0]);
      sums[1] = fmaf(g[v][i] * weight.weight[v][i], x[v][i], sums[1]);
    }
  }
  sum_over_lanes(sums);
  const float rstd = valid ? reciprocal_std(params, sums[0]) : 0.0f;
  const float along = rstd * rstd * sums[1] * params.inv_dim;
#pragma unroll
  for (int v = 0; v < 2; ++v) {
#pragma unroll
    for (int i = 0; i < kElems; ++i) {
      const float n = x[v][i] * rstd;
      weight.sum[v][i] = fmaf(g[v][i], n, weight.sum[v][i]);
      x[v][i] = fmaf(g[v][i] * weight.weight[v][i], rstd, -n * along);
    }
    row.x[v] = pack<X>(x[v]);
  }
}

template <typename X, typename Factor>
__global__ __launch_bounds__(kBackwardThreads, kBackwardCtasPerSm) void norm_backward_kernel(
    const __grid_constant__ Params params) {
  constexpr int kElems = kVectorBytes / static_cast<int>(sizeof(X));
  // The next row is loaded while this one is worked on, unless wide factors take the registers for it.
  constexpr bool kAhead = sizeof(Factor) == sizeof(X);
  wait_for_previous_kernel();
#pragma unroll 1
  for (std::uint32_t p = 0; p < params.num_parts; ++p) {
    const Part& part = params.parts[p];
    const Slot slot = slot_of_lane<kElems>(params, part, threadIdx.x, true);
    WeightGradient<X, kElems> weight;
    weight.load(params, part, slot);
#pragma unroll 1
    for (std::uint32_t first = blockIdx.x * blockDim.y; first < part.items; first += gridDim.x * blockDim.y) {
      const bool has_item = first + threadIdx.y < part.items;
      const Place place = place_of_item(part, has_item ? first + threadIdx.y : 0);
      const std::uint32_t head = place.block * params.batches, heads = has_item ? part.heads - head : 0;
      const X* dy_row = row_at<const X>(part.x, part.x_stride, place, head);
      const X* x_row = row_at<const X>(part.saved, part.saved_stride, place, head);
      X* dx_row = row_at<X>(part.out, part.out_stride, place, head);
      Gradients<X, kElems> row, next;
      row.load(dy_row, x_row, slot, heads > 0);
      Vec<Factor, kElems> cos[2], sin[2];
      load_tables(params, part, place, slot, cos, sin);
      finish_tables(params, sin);
#pragma unroll 1
      for (std::uint32_t h = 0; h < params.batches; ++h) {
        dy_row += part.x_stride[2];
        x_row += part.saved_stride[2];
        const bool has_next = h + 1 < params.batches && h + 1 < heads;
        if constexpr (kAhead) next.load(dy_row, x_row, slot, has_next);
        differentiate(params, slot, h < heads, cos, sin, row, weight);
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          if (slot.valid[v] && h < heads) store(dx_row + slot.offset[v], row.x[v]);
        }
        dx_row += part.out_stride[2];
        if constexpr (!kAhead) next.load(dy_row, x_row, slot, has_next);
        row = next;
      }
    }
    if (part.weight_parts != nullptr) weight.store(params, part);
  }
  let_next_kernel_start();
}

}  // namespace infuse::rope
