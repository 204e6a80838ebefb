// What the CTAs of the kernel for sm_90a share out and hand on: the ring of stages that TMA fills with weights and, unless
// it is kept, with x, and the sums of a tile.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "infuse/cluster.cuh"
#include "infuse/mbarrier.cuh"
#include "infuse/overlap.cuh"
#include "infuse/tma.cuh"
#include "skinny_linear/plan.h"
#include "skinny_linear/result.cuh"

namespace infuse::skinny_linear {

constexpr int kWarpgroup = 128;

struct RingParams {
  CUtensorMap weights[kMaxWeights], x;
  Params base;
  bool keeps_x;
  bool copies_blocks;  // all of a stage in one copy
};

// kColumns: of a product, at least the rows of x. kGated: tiles have as many features of the up projection beside those
// of the gate. kTiles: of 16 features, that products by warps have room for.
template <typename T_, int kColumns_, bool kGated_, int kTiles_ = 0>
struct RingTraits {
  using T = T_;
  static constexpr int kColumns = kColumns_;
  static constexpr bool kGated = kGated_;
  static constexpr int kTiles = kTiles_;
  static constexpr int kOperands = kGated ? 2 : 1;
  static constexpr bool kByWarps = kColumns <= kMaxKeptRows;  // or else by warpgroups
  static constexpr int kMostGroups = kByWarps ? kRingWarps : kMaxGroups;  // that share columns
  static constexpr int kWidth = kByWarps ? 2 : 4;  // neighbouring features that a thread finishes
};

// The CTA's stages [first, end) of weights, and where its ring lies.
struct Ring {
  SharedAddress start, barriers;
  std::uint32_t first, end;

  __device__ __forceinline__ SharedAddress full(std::uint32_t stage) const { return barriers + stage * kBarrierBytes; }
  __device__ __forceinline__ SharedAddress empty(std::uint32_t stage) const {
    return barriers + (kMaxStages + stage) * kBarrierBytes;
  }
};

// Brings a stage's blocks of a matrix, from row `row` on, to `shared`.
__device__ __forceinline__ void load_blocks(const RingParams& params, const CUtensorMap& map, SharedAddress shared,
                                            std::uint32_t block_bytes, SharedAddress barrier, L2 keep, std::int32_t row,
                                            std::uint32_t iteration) {
  const auto first = static_cast<std::int32_t>(iteration * params.base.blocks);
  if (params.copies_blocks) {
    load_box(shared, map, barrier, keep, 0, row, first, 0);
    return;
  }
#pragma unroll 1
  for (std::uint32_t block = 0; block < params.base.blocks; ++block) {
    const std::int32_t column = (first + static_cast<std::int32_t>(block)) * kBlockColumns;
    load_box(shared + block * block_bytes, map, barrier, keep, column, row, 0, 0);
  }
}

// A stage: the tile's rows of each weight, block by block; then those of x.
template <typename Traits>
__device__ __forceinline__ void load_weights(const RingParams& params, const Tile& tile, SharedAddress stage,
                                             SharedAddress barrier, std::uint32_t iteration) {
  const std::uint32_t block_bytes = params.base.tile_rows * kBlockRowBytes;
  const auto row = static_cast<std::int32_t>(tile.feature);
  load_blocks(params, params.weights[tile.linear], stage, block_bytes, barrier, L2::kEvictFirst, row, iteration);
  if constexpr (Traits::kGated) {
    stage += params.base.blocks * block_bytes;
    load_blocks(params, params.weights[1], stage, block_bytes, barrier, L2::kEvictFirst, row, iteration);
  }
}

template <typename Traits>
__device__ __forceinline__ void load_x(const RingParams& params, SharedAddress stage, SharedAddress barrier,
                                       std::uint32_t iteration) {
  if (params.keeps_x) return;
  constexpr std::uint32_t kBlockBytes = Traits::kColumns * kBlockRowBytes;
  load_blocks(params, params.x, stage + params.base.x_offset, kBlockBytes, barrier, L2::kEvictLast, 0, iteration);
}

// By one thread.
template <typename Traits>
__device__ __forceinline__ void produce(const RingParams& params, const Tile& tile, const Ring& ring) {
  const Params& base = params.base;
  const std::uint32_t count = ring.end - ring.first, ahead = count < base.stages ? count : base.stages;
#pragma unroll 1
  for (std::uint32_t i = 0; i < ahead; ++i) {
    arrive_expecting(ring.full(i), base.stage_bytes);
    load_weights<Traits>(params, tile, ring.start + i * base.stage_bytes, ring.full(i), ring.first + i);
  }
  if (count == ahead) let_next_kernel_start();
  wait_for_previous_kernel();
#pragma unroll 1
  for (std::uint32_t i = 0; i < ahead; ++i) {
    load_x<Traits>(params, ring.start + i * base.stage_bytes, ring.full(i), ring.first + i);
  }
  std::uint32_t stage = 0, parity = 0;
#pragma unroll 1
  for (std::uint32_t i = ahead; i < count; ++i) {
    const SharedAddress place = ring.start + stage * base.stage_bytes;
    wait(ring.empty(stage), parity);
    arrive_expecting(ring.full(stage), base.stage_bytes);
    load_weights<Traits>(params, tile, place, ring.full(stage), ring.first + i);
    load_x<Traits>(params, place, ring.full(stage), ring.first + i);
    if (++stage == base.stages) {
      stage = 0;
      parity ^= 1;
    }
  }
  let_next_kernel_start();
}

// Of fp32, with a gap that keeps the lanes' stores in different banks.
template <typename Traits>
__device__ __forceinline__ std::uint32_t sums_pitch(const Params& base) {
  return Traits::kOperands * base.tile_rows + 4;
}

template <int kWidth>
__device__ __forceinline__ void add_sums(SharedAddress place, float (&sums)[kWidth]) {
  if constexpr (kWidth == 2) {
    const float2 values = load_pair_from_cluster(place);
    sums[0] += values.x;
    sums[1] += values.y;
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; i += 4) {
      const float4 values = load_from_cluster(place + i * 4);
      sums[i] += values.x;
      sums[i + 1] += values.y;
      sums[i + 2] += values.z;
      sums[i + 3] += values.w;
    }
  }
}

// kWidth neighbouring sums: of the CTA's groups of columns, in their order.
template <typename Traits>
__device__ __forceinline__ void add_groups(const Params& base, SharedAddress place, std::uint32_t group_bytes,
                                           float (&sums)[Traits::kWidth]) {
#pragma unroll
  for (int group = 0; group < Traits::kMostGroups; ++group) {
    if (Traits::kByWarps || group < base.column_groups) add_sums(place + group * group_bytes, sums);
  }
}

// Leaves the sums of all groups of columns in the first one's place, for the other CTAs of the cluster.
template <typename Traits>
__device__ __forceinline__ void join_groups(const Params& base, SharedAddress place, std::uint32_t threads) {
  const std::uint32_t pitch = sums_pitch<Traits>(base), group_bytes = base.rows * pitch * 4;
  for (std::uint32_t item = threadIdx.x; item < base.rows * pitch / Traits::kWidth; item += threads) {
    float sums[Traits::kWidth] = {};
    const SharedAddress own = place + item * Traits::kWidth * 4;
    add_groups<Traits>(base, own, group_bytes, sums);
#pragma unroll
    for (int i = 0; i < Traits::kWidth; ++i) {
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(own + i * 4), "f"(sums[i]) : "memory");
    }
  }
}

// kWidth neighbouring sums: of the CTAs of the cluster in their order, or of the groups of columns of the only one.
template <typename Traits>
__device__ __forceinline__ void add_up(const Params& base, SharedAddress place, std::uint32_t group_bytes,
                                       float (&sums)[Traits::kWidth]) {
#pragma unroll
  for (float& sum : sums) sum = 0.0f;
  if (base.splits == 1) {
    add_groups<Traits>(base, place, group_bytes, sums);
  } else {
#pragma unroll 4
    for (std::uint32_t rank = 0; rank < base.splits; ++rank) add_sums(shared_of_cta(place, rank), sums);
  }
}

// This CTA's share of the tile's results.
template <typename Traits>
__device__ __forceinline__ void finish_tile(const Params& base, const Tile& tile, SharedAddress place,
                                            std::uint32_t rank, std::uint32_t threads) {
  constexpr int kWidth = Traits::kWidth;
  const std::uint32_t pieces = base.tile_rows / kWidth, pitch = sums_pitch<Traits>(base);
  const std::uint32_t group_bytes = base.rows * pitch * 4;
  for (std::uint32_t item = rank * threads + threadIdx.x; item < base.rows * pieces; item += threads * base.splits) {
    const std::uint32_t row = item / pieces, feature = item % pieces * kWidth;
    if (tile.feature + feature >= base.linears[tile.linear].features) continue;
    float sums[kWidth], up[kWidth];
    const SharedAddress own = place + (row * pitch + feature) * 4;
    add_up<Traits>(base, own, group_bytes, sums);
    if constexpr (Traits::kGated) add_up<Traits>(base, own + base.tile_rows * 4, group_bytes, up);
    store_results<typename Traits::T>(base, tile.linear, row, tile.feature + feature, sums, up);
  }
}

}  // namespace infuse::skinny_linear
