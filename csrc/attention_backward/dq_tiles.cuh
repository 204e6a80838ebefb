// The order of the sums of dq in the workspace: tensor-core tiles of 16 rows by 8 columns one behind the other, 128
// numbers each, so that a warp adds to neighbouring addresses what its lanes hold.
#pragma once

#include <cstdint>

namespace infuse::attention_backward {

constexpr std::uint32_t kTileRows = 16, kTileColumns = 8, kTileFloats = kTileRows * kTileColumns;

// Numbers before tile (row_tile, column_tile) of all heads' padded rows.
__device__ __forceinline__ std::int64_t dq_tile_offset(std::uint32_t row_tile, std::uint32_t column_tile,
                                                       std::uint32_t padded_dim) {
  return (static_cast<std::int64_t>(row_tile) * (padded_dim / kTileColumns) + column_tile) * kTileFloats;
}

// A lane's four numbers. From 9.0 on they are added in one piece and lie together; earlier the lanes of a warp add
// their first numbers, then their second ones, and those lie together. As all kernels of a library file are compiled
// for the same devices, they agree.
__device__ __forceinline__ void add_to_dq_tile(float* tile, std::uint32_t lane, const float (&values)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(tile + 4 * lane), "f"(values[0]),
               "f"(values[1]), "f"(values[2]), "f"(values[3])
               : "memory");
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(tile + 32 * i + lane), "f"(values[i]) : "memory");
  }
#endif
}

// The eight numbers of row `row` of a tile.
__device__ __forceinline__ void load_dq_row(const float* tile, std::uint32_t row, float (&values)[8]) {
  const std::uint32_t lane = row % 8 * 4, half = row / 8 * 2;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = *reinterpret_cast<const float2*>(tile + (lane + i) * 4 + half);
    values[2 * i] = pair.x;
    values[2 * i + 1] = pair.y;
  }
#else
  const float4 even = *reinterpret_cast<const float4*>(tile + half * 32 + lane);
  const float4 odd = *reinterpret_cast<const float4*>(tile + (half + 1) * 32 + lane);
  values[0] = even.x, values[2] = even.y, values[4] = even.z, values[6] = even.w;
  values[1] = odd.x, values[3] = odd.y, values[5] = odd.z, values[7] = odd.w;
#endif
}

}  // namespace infuse::attention_backward
