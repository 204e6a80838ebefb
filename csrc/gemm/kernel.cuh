// Matrix products on Hopper's tensor cores, result = epilogue(A B^T): persistent CTAs, alone or in clusters of two that
// share loads; one warp loads by TMA into a ring of stages, two warpgroups of 64 rows each multiply by wgmma.
// The tensor cores do not stop between tiles: an epilogue takes what it needs of a tile's sums, rounded, into registers
// of its own and does its work in steps beside the first products of the next tile. The second warpgroup begins each
// tile behind the first, so that one multiplies while the other gives its sums away. On an H200 a tile takes 1% longer
// than its products alone, and the clock that the power allows is the limit.
//
// An epilogue is a type with
//   Params                           what it is given: a member `epilogue` of the kernel's parameters
//   Epilogue(params, shared, group)  made by every thread of warpgroup 0 or 1; shared: half of Traits::kEpilogueBytes
//   take(tile, rows, sums)           rows: where the warpgroup's begin in the tile; sums [64, kN] as in wgmma.cuh
//   kSteps, step<0 .. kSteps - 1>()  the rest of the work on what was taken
//   finish()                         before the kernel ends
// All of these may wait at the named barrier kEpilogueBarrier + group for the warpgroup's 128 threads.
#pragma once

#include <cstdint>
#include <utility>

#include "gemm/loader.cuh"
#include "gemm/traits.cuh"
#include "infuse/cluster.cuh"
#include "infuse/overlap.cuh"
#include "infuse/reduce.cuh"

namespace infuse::gemm {

template <typename Epilogue>
struct KernelParams {
  GemmParams gemm;
  typename Epilogue::Params epilogue;
};

// Named barriers: kBeginBarrier lets the second warpgroup begin a tile, kEpilogueBarrier + group is the epilogue's.
constexpr int kBeginBarrier = 1, kEpilogueBarrier = 2;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <typename Traits>
struct Multiplier {
  using T = typename Traits::T;

  const GemmParams& params;
  GemmShared<Traits> shared;
  std::uint32_t group;
  SharedAddress empty_of_cta;  // the first empty barrier of the cluster's CTA that has the number of this lane
  bool is_releasing;           // this lane has such a CTA
  RingPlace<Traits::kStages> ring{};

  // This warp needs a stage no more; all CTAs that write into it are told.
  __device__ __forceinline__ void release(std::uint32_t stage) const {
    __syncwarp();
    if (is_releasing) arrive_in_cluster(empty_of_cta + stage * kBarrierBytes);
  }

  __device__ __forceinline__ void start_chunk(float (&sums)[Traits::kN / 2], bool accumulate) const {
    const std::uint64_t a = matrix_by_rows(shared.a(ring.stage) + group * (kGroupRows * kSwizzledRowBytes));
    const std::uint64_t b = Traits::kByColumns ? matrix_by_columns(shared.b(ring.stage), kChunk * kSwizzledRowBytes)
                                               : matrix_by_rows(shared.b(ring.stage));
#pragma unroll
    for (int step = 0; step < kChunk / 16; ++step) {
      multiply<T, Traits::kN, false, Traits::kByColumns>(
          sums, moved(a, step * 32), moved(b, step * (Traits::kByColumns ? 16 * kSwizzledRowBytes : 32)),
          accumulate || step != 0);
    }
    end_products();
  }

  // The products of one more chunk are issued, those of the one before are done.
  __device__ __forceinline__ void next_chunk(float (&sums)[Traits::kN / 2]) {
    const std::uint32_t before = ring.stage;
    ring.advance();
    wait(shared.full(ring.stage), ring.parity);
    fence_products();
    start_chunk(sums, true);
    wait_for_products<1>();
    release(before);
  }

  template <typename Epilogue, int... kSteps>
  __device__ __forceinline__ void work_beside(float (&sums)[Traits::kN / 2], Epilogue& epilogue,
                                              std::integer_sequence<int, kSteps...>) {
    ((epilogue.template step<kSteps>(), next_chunk(sums)), ...);
  }

  // All chunks of a tile. is_pending: the epilogue of the tile before has its steps to do. meanwhile: called once.
  template <typename Epilogue, typename Meanwhile>
  __device__ __forceinline__ void run(float (&sums)[Traits::kN / 2], Epilogue& epilogue, bool is_pending,
                                      const Meanwhile& meanwhile) {
    wait(shared.full(ring.stage), ring.parity);
    if (group == 1) wait_at_named(kBeginBarrier, 2 * kWarpgroup);
    fence_products();
    start_chunk(sums, false);
    if (group == 0) arrive_at_named(kBeginBarrier, 2 * kWarpgroup);
    meanwhile();
    std::uint32_t chunk = 1;
    if (is_pending) {
      work_beside(sums, epilogue, std::make_integer_sequence<int, Epilogue::kSteps>());
      chunk += Epilogue::kSteps;
    }
    for (; chunk < params.chunks_of_tile; ++chunk) next_chunk(sums);
    wait_for_products<0>();
    pin(sums);
    release(ring.stage);
    ring.advance();
  }
};

template <typename Epilogue, int... kSteps>
__device__ __forceinline__ void work_alone(Epilogue& epilogue, std::integer_sequence<int, kSteps...>) {
  (epilogue.template step<kSteps>(), ...);
}

template <typename Traits>
__device__ __forceinline__ void init_barriers(const GemmShared<Traits>& shared, std::uint32_t cluster) {
  for (int i = 0; i < Traits::kStages; ++i) {
    init_barrier(shared.full(i), 1);
    init_barrier(shared.empty(i), kGroups * 4 * cluster);  // warps
  }
  publish_barriers();
}

// The warpgroups that multiply.
template <typename Traits, typename Epilogue>
__device__ __forceinline__ void multiply_tiles(const KernelParams<Epilogue>& params, const GemmShared<Traits>& shared,
                                               std::uint32_t group, TileWalk walk) {
  const TileOrder& order = params.gemm.order;
  const std::uint32_t lane = threadIdx.x % kWarpSize;
  const bool is_writer = lane < order.cluster_rows * order.cluster_columns;
  Multiplier<Traits> multiplier{params.gemm, shared, group, shared_of_cta(shared.empty(0), is_writer ? lane : 0),
                                is_writer};
  Epilogue epilogue(params.epilogue, shared.epilogue() + group * (Traits::kEpilogueBytes / kGroups), group);
  constexpr std::make_integer_sequence<int, Epilogue::kSteps> kSteps{};
  const bool overlaps = params.gemm.chunks_of_tile > Epilogue::kSteps;  // the next tile is long enough
  bool is_pending = false;
  Tile tile, next;
  for (bool more = walk.next(tile); more; tile = next) {
    float sums[Traits::kN / 2];
    multiplier.run(sums, epilogue, is_pending, [&] { more = walk.next(next); });
    epilogue.take(tile, group * kGroupRows, sums);
    is_pending = overlaps && more;
    if (!is_pending) work_alone(epilogue, kSteps);
  }
  epilogue.finish();
}

#endif

// Code for other devices than 9.0a is empty and says so by the threads it takes, which the host can ask for.
constexpr int threads_of_kernel() {
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
  return kWarpSize;
#else
  return kThreads;
#endif
}

template <typename Traits, typename Epilogue>
__global__ void __launch_bounds__(threads_of_kernel(), 1)
    gemm_kernel(const __grid_constant__ KernelParams<Epilogue> params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char gemm_shared[];
  const GemmShared<Traits> shared{static_cast<SharedAddress>(__cvta_generic_to_shared(gemm_shared))};
  const TileOrder& order = params.gemm.order;
  const std::uint32_t cluster = order.cluster_rows * order.cluster_columns, rank = rank_in_cluster();
  if (threadIdx.x == 0) init_barriers(shared, cluster);
  sync_cluster();
  const std::uint32_t warpgroup = __shfl_sync(kFullMask, threadIdx.x / kWarpgroup, 0);
  // A cluster has one or two CTAs. Made in both branches: what lives in both takes a register too many of the loader.
  const auto walk = [&] { return TileWalk{order, rank, blockIdx.x >> (cluster - 1)}; };
  if (warpgroup == 0) {
    give_up_registers<Traits::kLoaderRegisters>();
    if (threadIdx.x < kWarpSize) {
      Loader<Traits> loader{params.gemm, shared, rank, threadIdx.x == 0};
      loader.prefetch_maps();
      wait_for_previous_kernel();
      loader.run(walk());
      let_next_kernel_start();
    }
  } else {
    take_registers<Traits::kGroupRegisters>();
    wait_for_previous_kernel();
    multiply_tiles<Traits, Epilogue>(params, shared, warpgroup - 1, walk());
  }
  sync_cluster();  // others may still tell this CTA's barriers
#endif
}

}  // namespace infuse::gemm
