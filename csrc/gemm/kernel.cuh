// Matrix products on Hopper's tensor cores, result = epilogue(A B^T): persistent CTAs, alone or in clusters of two or
// four that share loads; one warp loads by TMA into a ring of stages, two warpgroups of 64 rows each multiply by wgmma
// and then run the epilogue, while the loads of the next tile are under way. The second warpgroup stays `lead` chunks behind the
// first, so that the epilogue of one runs beside the products of the other.
//
// An epilogue is a type with
//   Params                    a member `epilogue` of the kernel's parameters
//   kBytes                    of shared memory, for both warpgroups together, aligned to 1024 bytes
//   Epilogue(params, shared)  made by every thread of a warpgroup; shared: the warpgroup's half of those bytes
//   operator()(tile, rows, sums)  rows: where the warpgroup's begin in the tile, 0 or 64; sums [64, kN] as in wgmma.cuh
//   finish()                  before the kernel ends
#pragma once

#include <cstdint>

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

// Named barriers: 1 tells the second warpgroup to begin, kEpilogueBarrier + group is the epilogue's.
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

  // All chunks of a tile.
  __device__ __forceinline__ void run(float (&sums)[Traits::kN / 2], std::uint32_t begin_other) {
    const std::uint32_t chunks = params.chunks * (Traits::kOperands == Operands::kInSequence ? 2 : 1);
    wait(shared.full(ring.stage), ring.parity);
    fence_products();
    start_chunk(sums, false);
    for (std::uint32_t chunk = 1; chunk < chunks; ++chunk) {
      const std::uint32_t before = ring.stage;
      ring.advance();
      wait(shared.full(ring.stage), ring.parity);
      fence_products();
      start_chunk(sums, true);
      wait_for_products<1>();
      release(before);
      if (chunk == begin_other) arrive_at_named(kBeginBarrier, 2 * kWarpgroup);
    }
    wait_for_products<0>();
    pin(sums);
    release(ring.stage);
    ring.advance();
  }
};

// writers: CTAs that write into the shared memory of one.
template <typename Traits>
__device__ __forceinline__ void init_barriers(const GemmShared<Traits>& shared, std::uint32_t writers) {
  for (int i = 0; i < Traits::kStages; ++i) {
    init_barrier(shared.full(i), 1);
    init_barrier(shared.empty(i), kGroups * 4 * writers);  // warps
  }
  publish_barriers();
}

// The warpgroups that multiply.
template <typename Traits, typename Epilogue>
__device__ __forceinline__ void multiply_tiles(const KernelParams<Epilogue>& params, const GemmShared<Traits>& shared,
                                               std::uint32_t group, TileWalk walk) {
  constexpr std::uint32_t kNever = ~0u;
  const TileOrder& order = params.gemm.order;
  const std::uint32_t lane = threadIdx.x % kWarpSize;
  const bool is_cta = lane < order.cluster_rows * order.cluster_columns;
  const bool is_writer = is_cta && (order.row_of(lane) == order.row_of(walk.rank) ||
                                    order.column_of(lane) == order.column_of(walk.rank));
  Multiplier<Traits> multiplier{params.gemm, shared, group, shared_of_cta(shared.empty(0), is_cta ? lane : 0),
                                is_writer};
  Epilogue epilogue(params.epilogue, shared.epilogue() + group * (Traits::kEpilogueBytes / kGroups), group);
  const bool waits = params.gemm.lead != 0 && params.gemm.lead < params.gemm.chunks;
  bool is_first = true;
  for (Tile tile; walk.next(tile); is_first = false) {
    float sums[Traits::kN / 2];
    if (waits && is_first && group == 1) wait_at_named(kBeginBarrier, 2 * kWarpgroup);
    multiplier.run(sums, waits && is_first && group == 0 ? params.gemm.lead : kNever);
    epilogue(tile, group * kGroupRows, sums);
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
  if (threadIdx.x == 0) init_barriers(shared, order.cluster_rows + order.cluster_columns - 1);
  sync_cluster();
  const std::uint32_t warpgroup = __shfl_sync(kFullMask, threadIdx.x / kWarpgroup, 0);
  // A cluster has one, two or four CTAs. Made in both branches: what lives in both takes a register too many of the loader.
  const auto walk = [&] { return TileWalk{order, rank, blockIdx.x >> cluster / 2}; };
  if (warpgroup == 0) {
    give_up_registers<Traits::kLoaderRegisters>();
    if (threadIdx.x < kWarpSize) {
      wait_for_previous_kernel();
      Loader<Traits>{params.gemm, shared, rank, threadIdx.x == 0}.run(walk());
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
