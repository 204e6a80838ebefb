// Which blocks of queries a CTA works on: of each of its heads, from the first that sees any of its keys to the last.
// All warps find the same by themselves, 32 blocks at a time.
#pragma once

#include <cstdint>

#include "attention/tile_map.h"
#include "attention_backward/state.cuh"

namespace infuse::attention_backward {

// What the mask does to the tiles of 64 keys of a block of queries: two bits each, see TileState.
using TileStates = std::uint32_t;

// stage: where its rows lie in shared memory. In two registers, as they are scarce.
struct Visit {
  std::uint32_t head, packed;
  __device__ __forceinline__ std::uint32_t block() const { return packed >> 5; }
  __device__ __forceinline__ std::uint32_t stage() const { return packed >> 4 & 1; }
  __device__ __forceinline__ TileStates states() const { return packed & 15; }
};

template <int kKeys>
__device__ __forceinline__ TileStates states_of_block(const Params& params, std::uint32_t batch, std::uint32_t head,
                                                      std::uint32_t key_block, std::uint32_t block) {
  constexpr std::uint32_t kTiles = kKeys / attention::kMapTile;
  static_assert(kTiles == 1 || kTiles == 2);
  if (params.map.data == nullptr) {
    const TileStates state = params.mask_kind == Mask::kNone ? attention::kOpen : attention::kMasked;
    return kTiles == 2 ? state | state << 2 : state;
  }
  const std::uint8_t* row = params.map.data + batch * params.map.batch + head * params.map.head +
                            static_cast<std::int64_t>(block) * params.map.columns;
  TileStates states = 0;
#pragma unroll
  for (std::uint32_t i = 0; i < kTiles; ++i) {
    const std::uint32_t column = key_block * kTiles + i;
    if (column < params.map.columns) states |= static_cast<TileStates>(__ldg(row + column)) << (2 * i);
  }
  return states;
}

template <int kKeys>
class Visits {
 public:
  __device__ __forceinline__ Visits(const Params& params, const Place& place)
      : chunk_(first_chunk(params, place) - 1) {
    const std::uint32_t group = params.group.divisor;
    head_ = place.work.kv_head * group + group * place.work.split / params.splits;
  }

  // Goes to the next visit; false after the last one. All lanes of a warp.
  __device__ __forceinline__ bool next(const Params& params, const Place& place) {
    while (bits_ == 0) {
      if (++chunk_ * kWarpSize >= params.query_blocks) {
        chunk_ = first_chunk(params, place);
        if (++head_ >= end_head(params, place) || chunk_ * kWarpSize >= params.query_blocks) return false;
      }
      const std::uint32_t block = chunk_ * kWarpSize + place.lane;
      const bool inside = block >= first_block(params, place) && block < params.query_blocks;
      states_ = inside ? states_of_block<kKeys>(params, place.work.batch, head_, place.work.key_block, block) : 0;
      bits_ = __ballot_sync(kFullMask, states_ != 0);
    }
    const int lane = __ffs(static_cast<int>(bits_)) - 1;
    bits_ &= bits_ - 1;
    const std::uint32_t stage = (packed_ ^ (params.stages - 1) << 4) & 16;
    packed_ = (chunk_ * kWarpSize + lane) << 5 | stage | __shfl_sync(kFullMask, states_, lane);
    return true;
  }

  __device__ __forceinline__ Visit current() const { return {head_, packed_}; }

 private:
  static __device__ __forceinline__ std::uint32_t first_block(const Params& params, const Place& place) {
    return params.is_causal ? place.work.key_block * (kKeys / kQueryBlock) : 0;
  }
  static __device__ __forceinline__ std::uint32_t first_chunk(const Params& params, const Place& place) {
    return first_block(params, place) / kWarpSize;
  }

  static __device__ __forceinline__ std::uint32_t end_head(const Params& params, const Place& place) {
    const std::uint32_t group = params.group.divisor;
    return place.work.kv_head * group + group * (place.work.split + 1) / params.splits;
  }

  std::uint32_t chunk_, head_, packed_ = 0;
  std::uint32_t bits_ = 0;    // of the chunk's blocks that are still to come
  TileStates states_ = 0;  // of block `lane` of the chunk
};

}  // namespace infuse::attention_backward
