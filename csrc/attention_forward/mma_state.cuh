// What the parts of the mma.sync kernel hand to one another.
#pragma once

#include <cstdint>

#include "attention/softmax.cuh"
#include "attention_forward/params.h"
#include "attention_forward/plan.h"
#include "infuse/async_copy.cuh"

namespace infuse::attention_forward {

// kFull_: with masks, dropout and softcap. Without, the kernel needs fewer registers.
template <typename T_, int kDim_, bool kFull_>
struct Traits {
  using T = T_;
  static constexpr int kDim = kDim_;  // head_dim of q, k and v is at most this
  static constexpr bool kFull = kFull_;
  // Heads of up to 64: few registers for a third CTA of four warps on an SM.
  static constexpr int kMaxWarps = max_warps(kDim, kFull), kMinCtas = kMaxWarps == 4 ? 3 : 1;
  static constexpr int kWarpRows = warp_rows(kDim);
  static constexpr int kBlocks = kWarpRows / 16;  // tensor-core tiles of rows, of a warp
  static constexpr int kRowBytes = row_bytes(kDim);
  static constexpr int kTileBytes = kTile * kRowBytes;
  static constexpr int kSteps = kDim / 16;
};

// Of a warp's rows and a tile's keys. Lane l has rows l / 4 and l / 4 + 8 of each block; its keys are, of every 32, the
// eight from 8 (l % 4) on: scores[b][4 g + n][2 half + e] is that of key 32 g + 8 (l % 4) + 2 n + e.
template <typename Traits>
using Scores = float[Traits::kBlocks][kTile / 8][4];

// Where a key of a tile lies in shared memory so that the tensor cores give each lane those keys: bits 4, 3 and 2, 1 of
// its number are exchanged, in either direction.
__host__ __device__ constexpr std::uint32_t exchanged(std::uint32_t key) {
  return (key & ~30u) | (key & 24u) >> 2 | (key & 6u) << 2;
}

// A warp's rows, found so far: `out` without its denominator, and the denominator over the keys of this lane, both
// relative to 2^base; minus infinity as long as nothing was seen.
template <typename Traits>
struct Sums {
  float out[Traits::kBlocks][Traits::kDim / 8][4];
  float base[Traits::kBlocks][2], denominator[Traits::kBlocks][2];
};

// The number of the thread, read anew at each call: what is derived from it would otherwise be computed once, before
// the tiles, and kept in registers that the sums need. Likewise place_of.
__device__ __forceinline__ std::uint32_t read_thread() {
  std::uint32_t thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

__device__ __forceinline__ std::uint32_t read_lane() { return read_thread() % kWarpSize; }

// What a CTA works on: rows [first_row, last_row] of one head.
struct Place {
  std::uint32_t batch, head, kv_head;
  std::uint32_t first_row, last_row;
};

// blockIdx: head of all batches, block of rows (the last first: it sees most where the mask is causal), split.
template <typename Traits>
__device__ __forceinline__ Place place_of(const Params& params) {
  Place place{};
  std::uint32_t batch_head, row_block;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(batch_head));
  asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(row_block));
  place.batch = params.heads.divide(batch_head);
  place.head = batch_head - place.batch * params.heads.divisor;
  place.kv_head = params.group.divide(place.head);
  const std::uint32_t rows = blockDim.x / kWarpSize * Traits::kWarpRows;
  place.first_row = (params.row_blocks - 1 - row_block) * rows;
  place.last_row = (place.first_row + rows < params.queries ? place.first_row + rows : params.queries) - 1;
  return place;
}

template <typename Traits>
__device__ __forceinline__ std::uint32_t warp_row(const Place& place) {
  return place.first_row + read_thread() / kWarpSize * Traits::kWarpRows;
}

// In shared memory: the queries of all warps, then the tiles.
template <typename Traits>
__device__ __forceinline__ SharedAddress queries_of_warp() {
  return dynamic_shared_memory() + read_thread() / kWarpSize * Traits::kWarpRows * Traits::kRowBytes;
}

template <typename Traits>
__device__ __forceinline__ SharedAddress first_stage() {
  return dynamic_shared_memory() + blockDim.x / kWarpSize * Traits::kWarpRows * Traits::kRowBytes;
}

}  // namespace infuse::attention_forward
