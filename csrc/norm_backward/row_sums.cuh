// The sums of two values over the threads of one row, with one barrier. The order of additions is fixed.
#pragma once

#include "infuse/barrier.cuh"
#include "infuse/reduce.cuh"

namespace infuse::norm_backward {

// Two buffers taken in turns, as in RowSumStorage.
struct PairSumStorage {
  float2 warp_sums[2][kMaxWarps];
};

// The CTA is blockDim = (threads of a row, rows); a row is 8, 16 or a multiple of 32 threads, at most 512 if more than
// 32, and one group of sync_group.
class RowSum {
 public:
  __device__ __forceinline__ explicit RowSum(PairSumStorage& storage) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    warps_ = static_cast<int>(blockDim.x) / kWarpSize;
    sums_ = storage.warp_sums[0] + static_cast<int>(threadIdx.y) * warps_;
    mine_ = lane == 0 ? sums_ + warp : nullptr;
    // Lanes beyond the warps add zeros.
    const int source = lane % 16;
    theirs_ = source < warps_ ? sums_ + source : nullptr;
  }

  // Every thread of a row must call this, with `turn` 0, 1, 2, .., and gets the sums of `first` and, if kBoth, of
  // `second` over its row.
  template <bool kBoth>
  __device__ __forceinline__ void add_up(float& first, float& second, int turn) const {
    const int threads = static_cast<int>(blockDim.x);
    const int width = threads < kWarpSize ? threads : kWarpSize;
    first = group_sum(first, width);
    if constexpr (kBoth) second = group_sum(second, width);
    if (threads <= kWarpSize) return;
    const int buffer = (turn & 1) * kMaxWarps;
    if (mine_ != nullptr) mine_[buffer] = make_float2(first, second);
    sync_group(static_cast<int>(threadIdx.y), threads);
    const float2 read = theirs_ != nullptr ? theirs_[buffer] : make_float2(0.0f, 0.0f);
    first = group_sum(read.x, 16);
    if constexpr (kBoth) second = group_sum(read.y, 16);
  }

 private:
  int warps_;
  float2* sums_;
  float2* mine_;
  const float2* theirs_;
};

}  // namespace infuse::norm_backward
