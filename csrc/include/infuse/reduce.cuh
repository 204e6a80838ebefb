// Sums over the threads of one row: 8, 16 or any multiple of 32 threads a row. The order of additions is fixed, so the
// same input gives the same bits.
#pragma once

namespace infuse {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kMaxWarps = 32;  // in a CTA

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

// Where rows of more than one warp exchange their warps' sums, of up to kValues values at once. Two buffers taken in
// turns: a warp that is already at the next sum can't overwrite what a slower warp still reads, so one barrier a sum is
// enough.
template <int kValues>
struct RowSumsStorage {
  float warp_sums[2][kValues][kMaxWarps];
};

// The CTA is blockDim = (threads of a row, rows); every thread of the CTA must call this, with the same `turn`, the next
// time with another one modulo 2. Every thread gets the sums of its row in `values`.
template <int kCount, int kValues>
__device__ __forceinline__ void row_sums(float (&values)[kCount], RowSumsStorage<kValues>& storage, int turn) {
  static_assert(kCount <= kValues);
  const int threads_per_row = static_cast<int>(blockDim.x);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = group_sum(values[i], threads_per_row < kWarpSize ? threads_per_row : kWarpSize);
  }
  if (threads_per_row <= kWarpSize) return;

  const int warps_per_row = threads_per_row / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int first_warp = static_cast<int>(threadIdx.y) * warps_per_row;
  auto& warp_sums = storage.warp_sums[turn & 1];
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) warp_sums[i][first_warp + static_cast<int>(threadIdx.x) / kWarpSize] = values[i];
  }
  __syncthreads();
  // The next power of two of the warps' number; what is beyond the last warp counts as zero.
  const int width = warps_per_row > 1 ? 1 << (32 - __clz(warps_per_row - 1)) : 1;
  const int warp = lane & (width - 1);
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = warp < warps_per_row ? warp_sums[i][first_warp + warp] : 0.0f;
  for (int offset = width / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] += __shfl_xor_sync(kFullMask, values[i], offset);
  }
}

}  // namespace infuse
