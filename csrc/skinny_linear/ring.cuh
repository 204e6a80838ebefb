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
  bool makes_way;      // the next kernel may start when the ring is full
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
  static constexpr bool kAddsEarly = !kByWarps;  // loads what is added to results while x comes, if registers are left
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

// Brings the parameters into the cache of constants: what is first read when x is there would be waited for.
__device__ __forceinline__ void touch(const Params& params) {
  const auto* words = reinterpret_cast<const std::uint32_t*>(&params);
#pragma unroll
  for (std::size_t i = 0; i < sizeof(params) / 4; i += 16) asm volatile("" ::"r"(words[i]));
}

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
  if (count == ahead || params.makes_way) let_next_kernel_start();
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

// What the CTAs of a cluster send each other: a CTA finishes every `splits`-th piece of kWidth results of the tile, and
// gets the others' sums of them, and its own, as floats [rank][place][operand][kWidth]. Nobody reads another CTA's shared
// memory, so that nobody has to stay until it was read.
struct Inbox {
  SharedAddress sums, barrier;
  std::uint32_t rank, splits, share, own;  // pieces of any CTA, and of this one
};

template <typename Traits>
__device__ __forceinline__ Inbox make_inbox(const Params& base, SharedAddress shared, std::uint32_t rank) {
  const std::uint32_t pieces = base.rows * base.tile_rows / Traits::kWidth;
  const SharedAddress barrier = shared + base.barrier_offset + kBytesOfBarriers - kInboxBarrierBytes;
  return {barrier + kInboxBarrierBytes, barrier, rank, base.splits, (pieces + base.splits - 1) / base.splits,
          (pieces + base.splits - 1 - rank) / base.splits};
}

// By one thread, before the cluster is told that this CTA is ready.
template <typename Traits>
__device__ __forceinline__ void open_inbox(const Inbox& inbox) {
  init_barrier(inbox.barrier, 1);
  publish_barriers();
  arrive_expecting(inbox.barrier, inbox.own * inbox.splits * Traits::kOperands * Traits::kWidth * 4);
}

template <int kWidth>
__device__ __forceinline__ void add_sums(SharedAddress place, float (&sums)[kWidth]) {
  float values[kWidth];
  if constexpr (kWidth == 2) {
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(values[0]), "=f"(values[1]) : "r"(place) : "memory");
  } else {
    unpack(load_shared<float, kWidth>(place), values);
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sums[i] += values[i];
}

// kWidth neighbouring sums: of the CTA's groups of columns, in their order.
template <typename Traits>
__device__ __forceinline__ void add_groups(const Params& base, SharedAddress place, std::uint32_t group_bytes,
                                           float (&sums)[Traits::kWidth]) {
#pragma unroll
  for (float& sum : sums) sum = 0.0f;
#pragma unroll
  for (int group = 0; group < Traits::kMostGroups; ++group) {
    if (Traits::kByWarps || group < base.column_groups) add_sums(place + group * group_bytes, sums);
  }
}

// Sends the CTA's sums of the tile to those that finish them.
template <typename Traits>
__device__ __forceinline__ void send_sums(const Params& base, SharedAddress place, const Inbox& inbox,
                                          std::uint32_t threads) {
  constexpr int kWidth = Traits::kWidth, kPieceBytes = kWidth * 4;
  const std::uint32_t pieces = base.tile_rows / kWidth, pitch = sums_pitch<Traits>(base);
  for (std::uint32_t item = threadIdx.x; item < base.rows * pieces; item += threads) {
    const std::uint32_t row = item / pieces, feature = item % pieces * kWidth;
    const std::uint32_t owner = item % inbox.splits, slot = inbox.rank * inbox.share + item / inbox.splits;
    const SharedAddress barrier = shared_of_cta(inbox.barrier, owner);
#pragma unroll
    for (int operand = 0; operand < Traits::kOperands; ++operand) {
      float sums[kWidth];
      const SharedAddress own = place + (row * pitch + operand * base.tile_rows + feature) * 4;
      add_groups<Traits>(base, own, base.rows * pitch * 4, sums);
      const SharedAddress target = inbox.sums + (slot * Traits::kOperands + operand) * kPieceBytes;
      if constexpr (kWidth == 2) {
        store_to_cluster(shared_of_cta(target, owner), barrier, make_float2(sums[0], sums[1]));
      } else {
        store_to_cluster(shared_of_cta(target, owner), barrier, make_float4(sums[0], sums[1], sums[2], sums[3]));
      }
    }
  }
}

// kWidth sums of one operand of this CTA's piece `place`, of all CTAs in their order.
template <typename Traits>
__device__ __forceinline__ void add_sent(const Inbox& inbox, std::uint32_t place, int operand,
                                         float (&sums)[Traits::kWidth]) {
  constexpr int kPieceBytes = Traits::kWidth * 4;
#pragma unroll
  for (float& sum : sums) sum = 0.0f;
#pragma unroll 4
  for (std::uint32_t rank = 0; rank < inbox.splits; ++rank) {
    const std::uint32_t slot = (rank * inbox.share + place) * Traits::kOperands + operand;
    add_sums(inbox.sums + slot * kPieceBytes, sums);
  }
}

// Where in the tile the kWidth neighbouring results lie that a thread finishes as its i-th; the tile may end before.
struct Item {
  std::uint32_t row, feature;
  bool exists;
};

template <typename Traits>
__device__ __forceinline__ Item item_of(const Params& base, const Tile& tile, const Inbox& inbox, std::uint32_t i) {
  const std::uint32_t pieces = base.tile_rows / Traits::kWidth, item = i * inbox.splits + inbox.rank;
  const std::uint32_t feature = item % pieces * Traits::kWidth;
  return {item / pieces, feature, i < inbox.own && tile.feature + feature < base.linears[tile.linear].features};
}

// This CTA's share of the tile's results. item, addends: of the thread's first ones, if they were loaded early. factors:
// that the sums of each row are multiplied by, or null.
template <typename Traits>
__device__ __forceinline__ void finish_tile(const Params& base, const Tile& tile, SharedAddress place,
                                            const Inbox& inbox, std::uint32_t threads, Item item,
                                            Addends<typename Traits::T, Traits::kWidth> addends,
                                            const float* factors) {
  constexpr int kWidth = Traits::kWidth;
  const std::uint32_t pitch = sums_pitch<Traits>(base);
  if (inbox.splits > 1 && inbox.own > 0) wait(inbox.barrier, 0);
  for (std::uint32_t i = threadIdx.x; i < inbox.own; i += threads) {
    if (!Traits::kAddsEarly || i != threadIdx.x) {
      item = item_of<Traits>(base, tile, inbox, i);
      addends = {};
      if (item.exists) {
        addends.load_biases(base, tile.linear, tile.feature + item.feature);
        addends.load_addend(base, tile.linear, item.row, tile.feature + item.feature);
      }
    }
    if (!item.exists) continue;
    float sums[Traits::kOperands][kWidth];
#pragma unroll
    for (int operand = 0; operand < Traits::kOperands; ++operand) {
      if (inbox.splits > 1) {
        add_sent<Traits>(inbox, i, operand, sums[operand]);
      } else {
        const SharedAddress own = place + (item.row * pitch + operand * base.tile_rows + item.feature) * 4;
        add_groups<Traits>(base, own, base.rows * pitch * 4, sums[operand]);
      }
      if (factors == nullptr) continue;
#pragma unroll
      for (float& sum : sums[operand]) sum *= factors[item.row];
    }
    store_results(base, tile.linear, item.row, tile.feature + item.feature, addends, sums[0],
                  sums[Traits::kOperands - 1]);
  }
}

}  // namespace infuse::skinny_linear
