// Products of at most 8 rows by single warps: each of the eight takes one of the four steps of 16 columns, in every second
// block of 64, for all features of the tile. No rows of weights are filled up as for a warpgroup's product, and a tile
// that has arrived as a whole before x is known is worked through by all warps at once.
#pragma once

#include <cstdint>

#include "infuse/mbarrier.cuh"
#include "infuse/mma.cuh"
#include "skinny_linear/kept_x.cuh"
#include "skinny_linear/ring.cuh"

namespace infuse::skinny_linear {

// sums[operand][tile]: of the gate or the only weight, and of the up projection.
template <typename Traits>
__device__ __forceinline__ void multiply_by_warps(const RingParams& params, const Ring& ring, SharedAddress kept_x,
                                                  float (&sums)[Traits::kOperands][Traits::kTiles][4]) {
  using T = typename Traits::T;
  constexpr int kTilesAhead = Traits::kTiles <= 4 ? Traits::kTiles : 2;  // whose weights are loaded before they are used
  const Params& base = params.base;
  const std::uint32_t warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const std::uint32_t step = warp % 4, turn = warp / 4;
  const std::uint32_t operand_bytes = base.tile_rows * kBlockRowBytes;
  const std::uint32_t weights_place = lane % 16 * kBlockRowBytes + ((step * 2 + lane / 16) ^ (lane % 8)) * 16;
  // Lanes 16 and up repeat the addresses of the others: only two of the four matrices are needed.
  const std::uint32_t half = lane / 8 % 2, row = lane % 8;
  const std::uint32_t kept_row = row < base.rows ? row : base.rows - 1;
  const std::uint32_t x_place = params.keeps_x ? ((step * 2 + half) * base.rows + kept_row) * 16
                                               : row * kBlockRowBytes + ((step * 2 + half) ^ row) * 16;
  const std::uint32_t x_block = params.keeps_x ? base.rows * kBlockRowBytes : Traits::kColumns * kBlockRowBytes;
#pragma unroll
  for (int operand = 0; operand < Traits::kOperands; ++operand) {
#pragma unroll
    for (int tile = 0; tile < Traits::kTiles; ++tile) {
#pragma unroll
      for (float& sum : sums[operand][tile]) sum = 0.0f;
    }
  }
  std::uint32_t stage = 0, parity = 0;
#pragma unroll 1
  for (std::uint32_t i = ring.first; i < ring.end; ++i) {
    const SharedAddress place = ring.start + stage * base.stage_bytes;
    wait(ring.full(stage), parity);
#pragma unroll 1
    for (std::uint32_t block = (i * base.blocks ^ turn) & 1; block < base.blocks; block += 2) {
      const SharedAddress x = params.keeps_x ? kept_x + i * base.blocks * x_block : place + base.x_offset;
      std::uint32_t columns[4];
      load_matrices(columns, x + block * x_block + x_place);
#pragma unroll
      for (int first = 0; first < Traits::kTiles; first += kTilesAhead) {
        if (first * 16 >= base.tile_rows) break;
        std::uint32_t words[Traits::kOperands][kTilesAhead][4];
#pragma unroll
        for (int operand = 0; operand < Traits::kOperands; ++operand) {
          const SharedAddress weights = place + (operand * base.blocks + block) * operand_bytes + weights_place;
#pragma unroll
          for (int t = 0; t < kTilesAhead; ++t) {
            if ((first + t) * 16 < base.tile_rows) {
              load_matrices(words[operand][t], weights + (first + t) * 16 * kBlockRowBytes);
            }
          }
        }
#pragma unroll
        for (int operand = 0; operand < Traits::kOperands; ++operand) {
#pragma unroll
          for (int t = 0; t < kTilesAhead; ++t) {
            if ((first + t) * 16 < base.tile_rows) {
              mma_16x8x16<T>(sums[operand][first + t], words[operand][t], columns[0], columns[1]);
            }
          }
        }
      }
    }
    __syncwarp();
    if (lane == 0) arrive(ring.empty(stage));
    if (++stage == base.stages) {
      stage = 0;
      parity ^= 1;
    }
  }
}

// As put_sums, of one warp.
template <typename Traits>
__device__ __forceinline__ void put_warp_products(const Params& base, SharedAddress place,
                                                  const float (&sums)[Traits::kOperands][Traits::kTiles][4]) {
  const std::uint32_t lane = threadIdx.x % kWarpSize, pitch = sums_pitch<Traits>(base);
  place += threadIdx.x / kWarpSize * base.rows * pitch * 4;
#pragma unroll
  for (int operand = 0; operand < Traits::kOperands; ++operand) {
#pragma unroll
    for (int tile = 0; tile < Traits::kTiles; ++tile) {
      if (tile * 16 >= base.tile_rows) break;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const std::uint32_t feature = tile * 16 + lane / 4 + e / 2 * 8, row = 2 * (lane % 4) + e % 2;
        if (feature >= base.tile_rows || row >= base.rows) continue;
        const SharedAddress address = place + (row * pitch + operand * base.tile_rows + feature) * 4;
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(sums[operand][tile][e]) : "memory");
      }
    }
  }
}

}  // namespace infuse::skinny_linear
