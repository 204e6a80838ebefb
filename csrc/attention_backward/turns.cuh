// The order in which CTAs add to dq, for the same bits at every run: by their blocks of keys, the last one first. A CTA
// draws the number of its work, so that those before it have begun and, as the first waits for none, all come to their
// turns.
#pragma once

#include <cstdint>

#include "attention_backward/visits.cuh"

namespace infuse::attention_backward {

// The number of a CTA's work. One thread.
__device__ __forceinline__ std::uint32_t draw_item(const Params& params) {
  if (params.turns == nullptr) return blockIdx.x;
  return atomicAdd(params.turns + params.batch * params.heads * params.query_blocks, 1u);
}

__device__ __forceinline__ std::uint32_t* turn_of(const Params& params, const Place& place, const Visit& visit) {
  return params.turns + (place.work.batch * params.heads + visit.head) * params.query_blocks + visit.block();
}

// How many CTAs add to the block before this one: those of later keys, which come to it earlier if attention is causal.
// All lanes of a warp.
template <int kKeys>
__device__ __forceinline__ std::uint32_t rank_of(const Params& params, const Place& place, const Visit& visit) {
  if (params.map.data == nullptr) {
    const std::uint32_t seen = (visit.block() * kQueryBlock + kQueryBlock - 1) / kKeys;
    const std::uint32_t last = params.is_causal && seen < params.key_blocks ? seen : params.key_blocks - 1;
    return last - place.work.key_block;
  }
  std::uint32_t rank = 0;
  for (std::uint32_t first = place.work.key_block + 1; first < params.key_blocks; first += kWarpSize) {
    const std::uint32_t key_block = first + place.lane;
    const bool adds = key_block < params.key_blocks &&
                      states_of_block<kKeys>(params, place.work.batch, visit.head, key_block, visit.block()) != 0;
    rank += static_cast<std::uint32_t>(__popc(__ballot_sync(kFullMask, adds)));
  }
  return rank;
}

// Returns when all CTAs before this one have added to the block. One warp; a barrier must follow for the others.
template <int kKeys>
__device__ __forceinline__ void wait_for_turn(const Params& params, const Place& place, const Visit& visit) {
  const std::uint32_t rank = rank_of<kKeys>(params, place, visit);
  if (place.lane != 0) return;
  const std::uint32_t* turn = turn_of(params, place, visit);
  std::uint32_t passed = 0;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(passed) : "l"(turn) : "memory");
  } while (passed != rank);
}

// What the CTA has added to a block is there for the next one. One thread, after a barrier behind the additions.
__device__ __forceinline__ void pass_turn(std::uint32_t* turn) {
  __threadfence();
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(turn) : "memory");
}

}  // namespace infuse::attention_backward
