// Linears of up to 64 rows, whose time is that of reading the weights (sm_90a).
//
// One thread keeps a ring of stages full with copies of the weights, which depend on no kernel before this one: the ring
// is full before that kernel has ended. A CTA takes so little shared memory that one of the next kernel has room beside
// it. The columns of a tile may be shared by the CTAs of a cluster, which send each other their sums in the end.
#pragma once

#include <cstdint>

#include "skinny_linear/group_products.cuh"
#include "skinny_linear/kept_x.cuh"
#include "skinny_linear/ring.cuh"
#include "skinny_linear/split_norm.cuh"
#include "skinny_linear/warp_products.cuh"

namespace infuse::skinny_linear {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The tile's sums over the CTA's columns, into the ring's place. By the threads that multiply.
template <typename Traits>
__device__ __forceinline__ void multiply_tile(const RingParams& params, const Ring& ring, SharedAddress kept_x,
                                              std::uint32_t threads) {
  const Params& base = params.base;
  const auto sync = [&] { sync_group(0, static_cast<int>(threads)); };
  if constexpr (Traits::kByWarps) {
    float sums[Traits::kOperands][Traits::kTiles][4];
    multiply_by_warps<Traits>(params, ring, kept_x, sums);
    sync();
    put_warp_products<Traits>(base, ring.start, sums);
  } else {
    const std::uint32_t warpgroup = __shfl_sync(kFullMask, threadIdx.x / kWarpgroup, 0);
    const std::uint32_t column_group = base.column_groups > 1 ? warpgroup : 0, group = warpgroup - column_group;
    float sums[Traits::kOperands][Traits::kColumns / 2];
    multiply_stages<Traits>(base, ring, group, column_group, sums);
    sync();
    put_sums<Traits>(base, ring.start + column_group * base.rows * sums_pitch<Traits>(base) * 4, group, sums);
  }
  sync();
}

#endif

// blockIdx.x: the tile, times the CTAs that share it. The last warp loads, the others multiply.
template <typename Traits>
__global__ void __launch_bounds__(kMaxGroups* kWarpgroup + kWarpSize, 2)
    ring_kernel(const __grid_constant__ RingParams params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __shared__ KeptSums storage;
  __shared__ float row_factors[kMaxRows];
  const Params& base = params.base;
  const SharedAddress shared = (dynamic_shared_memory() + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
  const std::uint32_t rank = blockIdx.x % base.splits, threads = blockDim.x - kWarpSize;
  const Tile tile = tile_of(base, blockIdx.x / base.splits);
  const Ring ring{shared, shared + base.barrier_offset, base.iterations * rank / base.splits,
                  base.iterations * (rank + 1) / base.splits};
  const Inbox inbox = make_inbox<Traits>(base, shared, rank);
  if (threadIdx.x == threads) {
    prefetch_map(params.weights[tile.linear]);
    if (Traits::kGated) prefetch_map(params.weights[1]);
    if (!params.keeps_x) prefetch_map(params.x);
#pragma unroll 1
    for (std::uint32_t stage = 0; stage < base.stages; ++stage) {
      init_barrier(ring.full(stage), 1);
      init_barrier(ring.empty(stage), Traits::kByWarps ? threads / kWarpSize : threads / base.column_groups / kWarpSize);
    }
    if (base.splits > 1) open_inbox<Traits>(inbox);
    publish_barriers();
  }
  __syncthreads();
  if (base.splits > 1) tell_cluster();
  // Whether x was only scaled by the kernel before, so that its norm ends here.
  const bool is_split = !Traits::kByWarps && base.split_norm.squares != nullptr;
  Item item{};
  Addends<typename Traits::T, Traits::kWidth> addends;
  if (threadIdx.x >= threads) {
    if (threadIdx.x == threads) produce<Traits>(params, tile, ring);
    __syncwarp();
  } else {
    touch(base);
    if constexpr (Traits::kAddsEarly) item = item_of<Traits>(base, tile, inbox, threadIdx.x);
    if (item.exists) addends.load_biases(base, tile.linear, tile.feature + item.feature);
    const SharedAddress kept_x = shared + base.kept_x_offset;
    if (Traits::kByWarps && params.keeps_x) {
      keep_x<typename Traits::T>(base, shared, storage, threads);
    } else {
      wait_for_previous_kernel();
    }
    if (item.exists) addends.load_addend(base, tile.linear, item.row, tile.feature + item.feature);
    if (is_split) put_row_factors<Traits::kColumns>(base, threads, row_factors);
    multiply_tile<Traits>(params, ring, kept_x, threads);
  }
  if (base.splits > 1) wait_for_cluster();
  if (threadIdx.x < threads) {
    if (base.splits > 1) send_sums<Traits>(base, shared, inbox, threads);
    finish_tile<Traits>(base, tile, shared, inbox, threads, item, addends, is_split ? row_factors : nullptr);
  }
#endif
}

}  // namespace infuse::skinny_linear
