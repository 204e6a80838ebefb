// Sums over the threads of one row, for any power of two of threads a row. The order of additions is fixed, so the
// same input gives the same bits.
#pragma once

namespace infuse {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kMinThreadsPerRow = 8;  // a row's group of lanes inside a warp
constexpr int kMaxWarps = 32;         // in a CTA

// Every lane of a group of `width` neighbouring lanes gets the group's sum; 8 <= width <= 32. Straight-line code:
// the two conditions are the same for the whole launch.
__device__ __forceinline__ float group_sum(float value, int width) {
  if (width > 16) value += __shfl_xor_sync(kFullMask, value, 16);
  if (width > 8) value += __shfl_xor_sync(kFullMask, value, 8);
  value += __shfl_xor_sync(kFullMask, value, 4);
  value += __shfl_xor_sync(kFullMask, value, 2);
  value += __shfl_xor_sync(kFullMask, value, 1);
  return value;
}

// Where rows of more than one warp exchange their warps' sums. Two buffers taken in turns: a warp that is already at
// the next row's sum can't overwrite what a slower warp still reads, so one barrier a row is enough.
struct RowSumStorage {
  float warp_sums[2][kMaxWarps];
};

// The CTA is blockDim = (threads of a row, rows); every thread of the CTA must call this, with the same `turn`.
// Every thread gets the sum of its row.
__device__ __forceinline__ float row_sum(float value, RowSumStorage& storage, int turn) {
  const int threads_per_row = static_cast<int>(blockDim.x);
  if (threads_per_row <= kWarpSize) return group_sum(value, threads_per_row);

  const int warps_per_row = threads_per_row / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int first_warp = static_cast<int>(threadIdx.y) * warps_per_row;
  float* warp_sums = storage.warp_sums[turn & 1];
  value = group_sum(value, kWarpSize);
  if (lane == 0) warp_sums[first_warp + static_cast<int>(threadIdx.x) / kWarpSize] = value;
  __syncthreads();
  value = warp_sums[first_warp + (lane & (warps_per_row - 1))];
  for (int offset = warps_per_row / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullMask, value, offset);
  return value;
}

}  // namespace infuse
