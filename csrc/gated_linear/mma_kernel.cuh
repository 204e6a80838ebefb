// Gated linears with mma.sync, for every device: out = act(x Wg^T + bg) * (x Wu^T + bu) in one kernel.
//
// A CTA multiplies its rows of x with as many rows of both weights, so that a thread holds gate and up of the same
// places and the product is all that leaves it. Operands come by cp.async through a ring of stages; a warp loads the
// operands of a step while the tensor cores work on the one before.
#pragma once

#include <cstdint>

#include "gated_linear/mma_load.cuh"
#include "gated_linear/mma_products.cuh"
#include "gated_linear/mma_store.cuh"
#include "infuse/overlap.cuh"

namespace infuse::gated_linear {

constexpr std::uint32_t kBandRows = 16;  // tiles of rows that share the weights while those are in the L2

// CTAs go through bands of kBandRows tiles of rows, column by column. No rows where a group has none left.
template <typename Traits>
__device__ __forceinline__ MmaTile tile_of_cta(const MmaParams& params) {
  const std::uint32_t band_tiles = kBandRows * params.column_tiles, band = blockIdx.x / band_tiles;
  const std::uint32_t left = params.row_tiles - band * kBandRows;
  const std::uint32_t band_rows = left < kBandRows ? left : kBandRows, place = blockIdx.x % band_tiles;
  const std::uint32_t row_tile = band * kBandRows + place % band_rows;
  const std::uint32_t column = place / band_rows * Traits::kColumns;
  if (params.base.ends == nullptr) return {row_tile * Traits::kRows, params.base.rows, column, 0};
  std::uint32_t tiles = 0, begin = 0;
  for (std::uint32_t group = 0; group < params.base.groups; ++group) {
    const std::uint32_t end = min(static_cast<std::uint32_t>(max(params.base.ends[group], 0)), params.base.rows);
    if (end <= begin) continue;
    const std::uint32_t first = begin + (row_tile - tiles) * Traits::kRows;
    tiles += (end - begin + Traits::kRows - 1) / Traits::kRows;
    if (row_tile < tiles) return {first, end, column, group};
    begin = end;
  }
  return {0, 0, 0, 0};
}

// Until only the last stages but one that were asked for may be under way.
__device__ __forceinline__ void wait_for_stage(std::uint32_t stages) {
  if (stages == 4) {
    wait_for_copies<2>();
  } else {
    wait_for_copies<1>();
  }
  __syncthreads();
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSm)
    mma_kernel(const __grid_constant__ MmaParams params) {
  wait_for_previous_kernel();
  const MmaTile tile = tile_of_cta<Traits>(params);
  if (tile.row >= tile.row_end) return;
  const SharedAddress shared = dynamic_shared_memory();
  MmaLoader<Traits> loader(params.base, tile, shared);
  for (std::uint32_t i = 0; i + 1 < params.stages; ++i) loader.fetch(i);
  const MmaPlaces places = places_of_warp<Traits>(shared);
  MmaSums sums = {};
  MmaOperands operands[2];
  wait_for_stage(params.stages);
  load_operands<Traits>(places, 0, 0, operands[0]);
  const std::uint32_t steps = (params.base.dim + Traits::kDepth - 1) / Traits::kDepth;
  std::uint32_t stage = 0, filled = params.stages - 1;
#pragma unroll 1
  for (std::uint32_t step = 0; step < steps; ++step) {
    load_operands<Traits>(places, stage, 1, operands[1]);
    // The stage before this one, which no warp reads any more since the barrier below.
    loader.fetch(filled);
    multiply_step<typename Traits::T>(operands[0], sums);
    filled = stage;
    stage = stage + 1 == params.stages ? 0 : stage + 1;
    wait_for_stage(params.stages);
    load_operands<Traits>(places, stage, 0, operands[0]);
    multiply_step<typename Traits::T>(operands[1], sums);
  }
  wait_for_copies<0>();
  let_next_kernel_start();
  store_tile<Traits>(params.base, tile, sums);
}

}  // namespace infuse::gated_linear
