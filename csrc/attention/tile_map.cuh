// The kernels that compute a tile map. The mask is read once, 16 bytes a lane and eight rows of each warp at a time.
//
// A CTA has 64 rows of the mask and the tiles that 512 bytes of a row cover. Whether a tile of an additive mask may be
// skipped depends on the whole rows, so a second kernel decides that from what the first found of each tile.
#pragma once

#include <cstdint>

#include "attention/softmax.cuh"
#include "attention/strides.h"
#include "attention/tile_map.h"
#include "infuse/access.h"
#include "infuse/overlap.cuh"

namespace infuse::attention {

constexpr int kMapWarps = 8, kMapThreads = kMapWarps * kWarpSize;
constexpr int kMapRowsOfWarp = kMapTile / kMapWarps;

// Additive masks are often filled with the smallest number of their dtype instead of minus infinity. Beside a key that
// a row sees, such a key's weight is zero in fp32 all the same.
constexpr float kFilled = -1e30f;

struct MapParams {
  const void* mask;
  std::uint8_t* map;         // [batch, heads, row_blocks, key_blocks] of the mask
  std::uint64_t* seen_rows;  // of an additive mask, the same shape: a bit for each row of the tile that sees a key
  Strides stride;
  std::uint32_t maps, heads;  // batch * heads, and heads, of the mask
  std::uint32_t queries, keys, row_blocks, key_blocks;
  bool is_aligned;
};

// What a lane's elements of the mask say: a key above kFilled, one above minus infinity, one that is not simply seen.
struct Found {
  bool high, any, changed;
};

__device__ __forceinline__ void look_at(std::uint8_t element, Found& found) {
  found.high |= element != 0;
  found.changed |= element == 0;
}

template <typename Float>
__device__ __forceinline__ void look_at(Float element, Found& found) {
  const float value = static_cast<float>(element);
  found.high |= !(value <= kFilled);
  found.any |= !(value <= kMinusInfinity);
  found.changed |= value != 0.0f;
}

template <typename Element>
constexpr int kMapElems = kVectorBytes / static_cast<int>(sizeof(Element));
template <typename Element>
constexpr int kMapLanes = kMapTile / kMapElems<Element>;  // of a tile
template <typename Element>
constexpr int kMapTiles = kWarpSize / kMapLanes<Element>;  // of a CTA

template <typename Element>
__device__ __forceinline__ Found look_at_vector(const uint4& vec) {
  Found found{false, false, false};
  if constexpr (sizeof(Element) == 1) {
    found.high = (vec.x | vec.y | vec.z | vec.w) != 0;
    found.changed = (vec.x & vec.y & vec.z & vec.w) != 0x01010101;
  } else {
    const Element* elements = reinterpret_cast<const Element*>(&vec);
#pragma unroll
    for (int e = 0; e < kMapElems<Element>; ++e) look_at(elements[e], found);
  }
  return found;
}

// Of the keys from `key` on, one by one.
template <typename Element>
__device__ __forceinline__ Found look_at_keys(const Element* row, std::uint32_t key, std::uint32_t keys) {
  Found found{false, false, false};
#pragma unroll 1
  for (std::uint32_t e = 0; e < static_cast<std::uint32_t>(kMapElems<Element>) && key + e < keys; ++e) {
    look_at(row[key + e], found);
  }
  return found;
}

// Rows that differ: one where the mask is broadcast over queries.
__device__ __forceinline__ std::uint32_t rows_of_block(const MapParams& params, std::uint32_t row_block) {
  const std::uint32_t left = params.queries - row_block * kMapTile;
  return params.stride.row == 0 ? 1 : left < kMapTile ? left : kMapTile;
}

// What all warps found of a CTA's tiles.
struct Tally {
  unsigned long long seen_rows;
  std::uint32_t any, changed;
};

// The warp's rows of the tiles. Row i of the warp is row warp + 8 i of the tile.
template <typename Element>
__device__ __forceinline__ void look_at_rows(const MapParams& params, const Element* first_row, std::uint32_t rows,
                                             std::uint32_t key, Tally* tallies) {
  constexpr int kElems = kMapElems<Element>, kLanes = kMapLanes<Element>;
  const std::uint32_t lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const bool in_vectors = params.is_aligned && key + kElems <= params.keys;
  uint4 vecs[kMapRowsOfWarp];
#pragma unroll
  for (int i = 0; i < kMapRowsOfWarp; ++i) {
    const std::uint32_t row = warp + i * kMapWarps;
    if (in_vectors && row < rows) {
      vecs[i] = __ldg(reinterpret_cast<const uint4*>(first_row + row * params.stride.row + key));
    }
  }
  std::uint64_t seen_rows = 0;
  bool any = false, changed = false;
#pragma unroll
  for (int i = 0; i < kMapRowsOfWarp; ++i) {
    const std::uint32_t row = warp + i * kMapWarps;
    Found found{false, false, false};
    if (row < rows) {
      found = in_vectors ? look_at_vector<Element>(vecs[i])
                         : look_at_keys(first_row + row * params.stride.row, key, params.keys);
    }
    const unsigned high = __ballot_sync(kFullMask, found.high);
    // Lane t keeps what is said of tile t; lanes beyond the last tile keep what nobody reads.
    const unsigned of_tile = high >> (lane * kLanes % kWarpSize) & (kFullMask >> (kWarpSize - kLanes));
    if (of_tile != 0) seen_rows |= std::uint64_t{1} << row;
    any |= found.any;
    changed |= found.changed;
  }
  const std::uint32_t tile = lane / kLanes;
  if (lane < kMapTiles<Element> && seen_rows != 0) atomicOr(&tallies[lane].seen_rows, seen_rows);
  if (any) atomicOr(&tallies[tile].any, 1u);
  if (changed) atomicOr(&tallies[tile].changed, 1u);
}

// Grid: strips of tiles, blocks of rows, masks of different batches and heads.
template <typename Element>
__global__ void __launch_bounds__(kMapThreads, 4) tile_map_kernel(const __grid_constant__ MapParams params) {
  constexpr std::uint32_t kTiles = kMapTiles<Element>;
  __shared__ Tally tallies[kTiles];
  const std::uint32_t lane = threadIdx.x % kWarpSize;
  const std::uint32_t row_block = blockIdx.y, rows = rows_of_block(params, row_block);
  wait_for_previous_kernel();
  for (std::uint32_t map = blockIdx.z; map < params.maps; map += gridDim.z) {
    if (threadIdx.x < kTiles) tallies[threadIdx.x] = {0, 0, 0};
    __syncthreads();
    const std::uint32_t batch = map / params.heads, head = map - batch * params.heads;
    const Element* first_row = static_cast<const Element*>(params.mask) + batch * params.stride.batch +
                               head * params.stride.head + std::int64_t{row_block} * kMapTile * params.stride.row;
    const std::uint32_t key = blockIdx.x * kTiles * kMapTile + lane * kMapElems<Element>;
    look_at_rows(params, first_row, rows, key, tallies);
    __syncthreads();
    const std::uint32_t tile = blockIdx.x * kTiles + threadIdx.x;
    if (threadIdx.x < kTiles && tile < params.key_blocks) {
      const Tally& tally = tallies[threadIdx.x];
      const std::uint64_t place = (std::uint64_t{map} * params.row_blocks + row_block) * params.key_blocks + tile;
      if constexpr (sizeof(Element) == 1) {
        params.map[place] = tally.seen_rows == 0 ? kHidden : tally.changed ? kMasked : kOpen;
      } else {
        params.seen_rows[place] = tally.seen_rows;
        params.map[place] = static_cast<std::uint8_t>(tally.any | tally.changed << 1);  // for the second kernel
      }
    }
    __syncthreads();
  }
  let_next_kernel_start();
}

// A warp a block of rows.
inline __global__ void __launch_bounds__(kMapThreads) finish_map_kernel(const __grid_constant__ MapParams params) {
  const std::uint32_t lane = threadIdx.x % kWarpSize;
  const std::uint64_t block = std::uint64_t{blockIdx.x} * kMapWarps + threadIdx.x / kWarpSize;
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (block >= std::uint64_t{params.maps} * params.row_blocks) return;
  const std::uint64_t first = block * params.key_blocks;
  const std::uint32_t rows = rows_of_block(params, static_cast<std::uint32_t>(block % params.row_blocks));
  std::uint64_t seen = 0;
  for (std::uint32_t tile = lane; tile < params.key_blocks; tile += kWarpSize) seen |= params.seen_rows[first + tile];
  const std::uint64_t every = ~std::uint64_t{0} >> (kMapTile - rows);
  const std::uint32_t low = __reduce_or_sync(kFullMask, static_cast<std::uint32_t>(seen));
  const std::uint32_t high = __reduce_or_sync(kFullMask, static_cast<std::uint32_t>(seen >> 32));
  const bool all_rows_see = (std::uint64_t{high} << 32 | low) == every;
  for (std::uint32_t tile = lane; tile < params.key_blocks; tile += kWarpSize) {
    const std::uint8_t bits = params.map[first + tile];
    const bool sees = all_rows_see ? params.seen_rows[first + tile] != 0 : (bits & 1) != 0;
    params.map[first + tile] = !sees ? kHidden : (bits & 2) != 0 ? kMasked : kOpen;
  }
}

}  // namespace infuse::attention
