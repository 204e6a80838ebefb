// Attention on Hopper's tensor cores: one warp loads tiles of K and V by TMA, and warpgroups of 64 query rows each
// multiply them by wgmma. A warpgroup issues the product of the queries and the next tile of keys together with that of
// this tile's powers and values, which then still runs beside the next tile's softmax; and warpgroups take turns, so
// that one's softmax runs beside another's products (Shah et al. 2024, FlashAttention-3). CTAs stay and take tile after
// tile, without a gap between them.
//
// The softmax of a tile needs no largest score as long as powers relative to an earlier one stay far from overflow.
// That leaves exponentials, sums and roundings, and is what made the tensor cores the limit: 84% busy without a mask at
// 16384 keys and head_dim 128 on an H200, whose clock then falls with its power.
#pragma once

#include <cstdint>

#include "attention_forward/wgmma_load.cuh"
#include "attention_forward/wgmma_scores.cuh"
#include "attention_forward/wgmma_store.cuh"
#include "infuse/overlap.cuh"

namespace infuse::attention_forward {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A warpgroup that multiplies.
template <typename Traits>
struct Multiplier {
  using T = typename Traits::T;
  static constexpr int kScores = Traits::kKeys / 2;  // of a thread
  static constexpr int kSums = Traits::kDim / 2, kSteps = Traits::kKeys / 16;

  const WgmmaParams& params;
  WgmmaShared<Traits> shared;
  std::uint32_t group;
  bool is_first_lane;
  std::uint32_t round = 0;  // number of the CTA's tile
  RingPlace<Traits::kStages> ring{};

  __device__ __forceinline__ void release(SharedAddress barrier) const {
    __syncwarp();
    if (is_first_lane) arrive(barrier);
  }

  // Turns at the tensor cores.
  __device__ __forceinline__ void wait_for_turn() const {
    wait_at_named(1 + static_cast<int>(group), 2 * kWarpgroup);
  }
  __device__ __forceinline__ void end_turn() const {
    arrive_at_named(group + 1 == Traits::kGroups ? 1 : 2 + static_cast<int>(group), 2 * kWarpgroup);
  }

  __device__ __forceinline__ void start_scores(float (&scores)[kScores]) const {
    SharedAddress own = shared.queries(round % Traits::kQueryStages) + group * (kGroupRows * kSwizzledRowBytes);
    asm volatile("" : "+r"(own));  // or the matrices of all steps are kept in registers, where there is one stage
    const std::uint64_t queries = matrix_by_rows(own);
    const std::uint64_t keys = matrix_by_rows(shared.keys(ring.stage));
#pragma unroll
    for (int step = 0; step < Traits::kDim / 16; ++step) {
      const int block = step / 4, within = step % 4 * 32;
      multiply<T, Traits::kKeys>(scores, moved(queries, block * Traits::kQueryBlockBytes + within),
                                 moved(keys, block * Traits::kKeyBlockBytes + within), step != 0);
    }
    end_products();
  }

  __device__ __forceinline__ void start_sums(const Powers<kScores>& powers, float (&out)[kSums]) const {
    const std::uint64_t values = matrix_by_columns(shared.values(ring.stage), Traits::kKeyBlockBytes);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      multiply<T, Traits::kDim, true>(out, powers[step], moved(values, step * 16 * kSwizzledRowBytes), true);
    }
    end_products();
  }

  // The next tile; false if there is none.
  __device__ __forceinline__ bool take_tile(GroupRows& rows) {
    const RingPlace<kTilesAhead> slot = place_in_ring<kTilesAhead>(round);
    wait(shared.tile_full(slot.stage), slot.parity);
    const std::uint32_t row_block = load_uniform(shared.tile(slot.stage));
    rows = {row_block * Traits::kRows + group * kGroupRows, load_uniform(shared.tile(slot.stage) + 4)};
    release(shared.tile_empty(slot.stage));
    return row_block != kNoTile;
  }

  __device__ __forceinline__ void wait_for_queries() const {
    const RingPlace<Traits::kQueryStages> place = place_in_ring<Traits::kQueryStages>(round);
    wait(shared.queries_full(place.stage), place.parity);
  }

  // From the scores of a visit to its rounded powers; `out` is then relative to the same. The products of the visit
  // before, if there was one, end on the way.
  __device__ __forceinline__ void find_powers(const GroupRows& rows, std::uint32_t visit, bool is_first,
                                              RowState& state, const float (&found)[kScores], Powers<kScores>& powers,
                                              float (&out)[kSums]) {
    const float factor = params.base.scale_log2;
    bool done = (visit & kIsMasked) == 0 && !is_first;
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    std::uint32_t early[Traits::kEarly > 0 ? Traits::kEarly : 1][4];
    if (done) raise<T, 0, Traits::kEarly>(found, factor, state.largest, early, sums);
    wait_for_products<0>();
    pin(out);
    release(shared.empty(ring.stage));
    ring.advance();
    keep_until_here(powers, shared.start, state.sum[0]);
    if (done) {
#pragma unroll
      for (int i = 0; i < 4 * Traits::kEarly; ++i) powers[i / 4][i % 4] = early[i / 4][i % 4];
      raise<T, Traits::kEarly, kSteps>(found, factor, state.largest, powers, sums);
      done = __all_sync(kFullMask, are_small<T>(sums));
    }
    if (!done) raise_anew(rows, visit, state, found, powers, sums, out);
    state.sum[0] += sums[0] + sums[2];
    state.sum[1] += sums[1] + sums[3];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) pin(powers[step]);
  }

  // The same for a tile with a mask or with scores that are too large beside those so far.
  __device__ __forceinline__ void raise_anew(const GroupRows& rows, std::uint32_t visit, RowState& state,
                                             const float (&found)[kScores], Powers<kScores>& powers, float (&sums)[4],
                                             float (&out)[kSums]) const {
    float scores[kScores], rescale[2], factor = params.base.scale_log2;
#pragma unroll
    for (int i = 0; i < kScores; ++i) scores[i] = found[i];
    if ((visit & kIsMasked) != 0) {
      factor = finish_scores<Traits>(params, rows, visit & ~(kIsMasked | kIsLast), scores);
    }
    rebase(scores, factor, state, rescale);
#pragma unroll
    for (int i = 0; i < kSums; ++i) out[i] *= rescale[i / 2 % 2];
    float base[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      base[half] = state.largest[half] == kMinusInfinity ? 0.0f : state.largest[half];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] = 0.0f;
    raise<T, 0, kSteps>(scores, factor, base, powers, sums);
  }

  __device__ __forceinline__ void clear(RowState& state, float (&out)[kSums]) const {
    state = RowState{};
#pragma unroll
    for (int i = 0; i < kSums; ++i) out[i] = 0.0f;
  }

  // Visit after visit, without a gap between tiles: the scores of the next visit, whatever its tile, are found while
  // those of this one become powers.
  __device__ __forceinline__ void run() {
    if (group + 1 == Traits::kGroups) end_turn();
    GroupRows rows, next_rows;
    if (!take_tile(rows)) return;
    RowState state;
    float scores[kScores], out[kSums];
    Powers<kScores> powers = {};
    clear(state, out);
    wait_for_queries();
    wait(shared.full(ring.stage), ring.parity);
    fence_products();
    start_scores(scores);
    std::uint32_t visit = load_uniform(shared.visit(ring.stage));
    wait_for_products<0>();
    pin(scores);
    for (bool is_first = true;;) {
      const bool is_last = (visit & kIsLast) != 0;
      if (is_last) {
        release(shared.queries_empty(round % Traits::kQueryStages));
        ++round;
      }
      find_powers(rows, visit, is_first, state, scores, powers, out);
      if (is_last) {
        if (!take_tile(next_rows)) break;
        wait_for_queries();
      }
      wait(shared.full(ring.stage), ring.parity);
      wait_for_turn();
      pin(scores);
      pin(out);
      fence_products();
      start_scores(scores);
      start_sums(powers, out);
      end_turn();
      visit = load_uniform(shared.visit(ring.stage));
      is_first = is_last;
      if (is_last) {
        finish_tile(rows, state, out);
        rows = next_rows;
        clear(state, out);
      }
      wait_for_products<1>();
      pin(scores);
    }
    wait(shared.full(ring.stage), ring.parity);
    pin(out);
    fence_products();
    start_sums(powers, out);
    finish_tile(rows, state, out);
  }

  // After the last products of a tile.
  __device__ __forceinline__ void finish_tile(const GroupRows& rows, const RowState& state, float (&out)[kSums]) const {
    wait_for_products<0>();
    pin(out);
    store_rows<Traits>(params.base, rows, state, out);
  }
};

template <typename Traits>
__device__ __forceinline__ void init_barriers(const WgmmaShared<Traits>& shared) {
  constexpr std::uint32_t kReaders = Traits::kGroups * 4;  // warps
  for (int i = 0; i < Traits::kQueryStages; ++i) {
    init_barrier(shared.queries_full(i), 1);
    init_barrier(shared.queries_empty(i), kReaders);
  }
  for (int i = 0; i < Traits::kStages; ++i) {
    init_barrier(shared.full(i), 1);
    init_barrier(shared.empty(i), kReaders);
  }
  for (int i = 0; i < 2; ++i) {
    init_barrier(shared.tile_full(i), 1);
    init_barrier(shared.tile_empty(i), kReaders);
  }
  publish_barriers();
}

#endif

// Code for other devices than 9.0a is empty and says so by the threads it takes, which the host can ask for.
template <typename Traits>
constexpr int threads_of_kernel() {
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
  return kWarpSize;
#else
  return Traits::kThreads;
#endif
}

template <typename Traits>
__global__ void __launch_bounds__(threads_of_kernel<Traits>(), 1)
    wgmma_kernel(const __grid_constant__ WgmmaParams params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char wgmma_shared[];
  const WgmmaShared<Traits> shared{static_cast<SharedAddress>(__cvta_generic_to_shared(wgmma_shared))};
  if (threadIdx.x == 0) init_barriers(shared);
  __syncthreads();
  const std::uint32_t group = __shfl_sync(kFullMask, threadIdx.x / kWarpgroup, 0);
  if (group == 0) {
    give_up_registers<Traits::kLoaderRegisters>();
    if (threadIdx.x >= kWarpSize) return;
    wait_for_previous_kernel();
    Loader<Traits> loader{params, shared, threadIdx.x == 0};
    loader.run();
    let_next_kernel_start();
  } else {
    take_registers<Traits::kGroupRegisters>();
    wait_for_previous_kernel();
    Multiplier<Traits> multiplier{params, shared, group - 1, threadIdx.x % kWarpSize == 0};
    multiplier.run();
  }
#endif
}

}  // namespace infuse::attention_forward
