// GEMMs on Hopper's tensor cores that hand their results over: a CTA has tiles of 128 x 256; one warp loads a and b by
// TMA, and two warpgroups multiply 64 rows each, round their sums to T, leave them in shared memory and go on. Three
// more warps finish them while the next tile is multiplied. So whatever is done with a result, and the memory traffic
// of that, takes none of the tensor cores' time; what it still costs on an H200 is power, and with it clock rate.
// Clusters of two CTAs that share b were 1% slower there.
//
// A Finisher is a type with
//   Params      what it is given
//   static void finish<T>(const Params&, const Shared&, const TilePlace&, std::uint32_t round)
// which all three warps call, the threads from threadIdx.x 32 on. It waits for the tile, by wait(shared.result_full(),
// round % 2), and each thread that reads it no more arrives at shared.result_empty().
#pragma once

#include <cstdint>

#include "handed_gemm/params.h"
#include "handed_gemm/traits.cuh"
#include "infuse/mma.cuh"
#include "infuse/overlap.cuh"
#include "infuse/tma.cuh"
#include "infuse/vec.cuh"

namespace infuse::handed_gemm {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// By one thread.
template <typename Finisher>
__device__ __forceinline__ void load_tiles(const Params<Finisher>& params, const Shared& shared) {
  RingPlace<kStages> place;
  for (std::uint32_t number = blockIdx.x; number < params.order.tiles; number += gridDim.x) {
    const TilePlace tile = place_of_tile(params.order, number);
    for (int pair = 0; pair < 2; ++pair) {
      for (std::uint32_t step = 0; step < params.steps[pair]; ++step) {
        wait(shared.empty(place.stage), place.parity ^ 1);
        const SharedAddress full = shared.full(place.stage);
        arrive_expecting(full, kStageBytes);
        const std::int32_t depth = static_cast<std::int32_t>(step * kDepth);
        load_box(shared.a(place.stage), params.a[pair], full, L2::kNormal, depth, static_cast<std::int32_t>(tile.row),
                 0, 0);
#pragma unroll
        for (int block = 0; block < kColumnBlocks; ++block) {
          load_box(shared.b(place.stage) + block * kBBlockBytes, params.b[pair], full, L2::kNormal,
                   static_cast<std::int32_t>(tile.column + block * kSwizzledColumns), depth, 0, 0);
        }
        place.advance();
      }
    }
  }
}

// A warpgroup that multiplies 64 rows of each tile.
template <typename T>
struct Multiplier {
  const Shared shared;
  const std::uint32_t group;
  RingPlace<kStages> place{};
  float sums[kTileColumns / 2];

  __device__ __forceinline__ void release(std::uint32_t stage) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(shared.empty(stage));
  }

  __device__ __forceinline__ void multiply_stage(bool is_first) {
    const std::uint64_t a = matrix_by_rows(shared.a(place.stage) + group * 64 * kSwizzledRowBytes);
    const std::uint64_t b = matrix_by_columns(shared.b(place.stage), kBBlockBytes);
    fence_products();
#pragma unroll
    for (int i = 0; i < kDepth / 16; ++i) {
      multiply<T, kTileColumns, false, true>(sums, moved(a, 32 * i), moved(b, 16 * i * kSwizzledRowBytes),
                                             !is_first || i > 0);
    }
    end_products();
  }

  __device__ __forceinline__ void multiply_tile(std::uint32_t steps) {
    std::uint32_t last = 0;
    for (std::uint32_t step = 0; step < steps; ++step) {
      wait(shared.full(place.stage), place.parity);
      multiply_stage(step == 0);
      wait_for_products<1>();
      if (step > 0) release(last);
      last = place.stage;
      place.advance();
    }
    wait_for_products<0>();
    release(last);
    pin(sums);
  }

  // Rounds the sums and leaves them for the warps that finish them.
  __device__ __forceinline__ void hand_over(std::uint32_t round) const {
    wait(shared.result_empty(), round % 2 ^ 1);
    const std::uint32_t lane = threadIdx.x % 32, row = group * 64 + threadIdx.x % kWarpgroup / 32 * 16 + lane % 16;
#pragma unroll
    for (int n = 0; n < kTileColumns / 8; n += 2) {
      std::uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = Cast<T>::pack(sums[4 * n + 2 * i], sums[4 * n + 2 * i + 1]);
      store_matrices(shared.piece(row, n + lane / 16), words);
    }
    fence_shared_for_async();
    arrive(shared.result_full());
  }

  __device__ __forceinline__ void run(std::uint32_t steps, std::uint32_t tiles) {
    std::uint32_t round = 0;
    for (std::uint32_t number = blockIdx.x; number < tiles; number += gridDim.x, ++round) {
      multiply_tile(steps);
      hand_over(round);
    }
  }
};

__device__ __forceinline__ void init_barriers(const Shared& shared) {
  for (int i = 0; i < kStages; ++i) {
    init_barrier(shared.full(i), 1);
    init_barrier(shared.empty(i), kMultipliers * 4);
  }
  init_barrier(shared.result_full(), kMultipliers * kWarpgroup);
  init_barrier(shared.result_empty(), kFinishers * 32);
  publish_barriers();
}

#endif

template <typename T, typename Finisher>
__global__ void __launch_bounds__(threads_of_kernel(), 1)
    handed_gemm_kernel(const __grid_constant__ Params<typename Finisher::Params> params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const Shared shared{(dynamic_shared_memory() + 1023) & ~1023u};
  if (threadIdx.x == 0) init_barriers(shared);
  __syncthreads();
  const std::uint32_t group = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0);
  if (group == 0) {
    give_up_registers<kOtherRegisters>();
    wait_for_previous_kernel();
    if (threadIdx.x >= 32) {
      std::uint32_t round = 0;
      for (std::uint32_t number = blockIdx.x; number < params.order.tiles; number += gridDim.x, ++round) {
        Finisher::template finish<T>(params.finisher, shared, place_of_tile(params.order, number), round);
      }
    } else if (threadIdx.x == 0) {
      load_tiles(params, shared);
      let_next_kernel_start();
    }
  } else {
    take_registers<kMultiplierRegisters>();
    Multiplier<T> multiplier{shared, group - 1};
    multiplier.run(params.steps[0] + params.steps[1], params.order.tiles);
  }
#endif
}

}  // namespace infuse::handed_gemm
