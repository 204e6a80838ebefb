// The tiles of keys that one group of warps reads. All groups of a K/V head's splits take turns with the tiles, so a share
// is fair wherever the valid keys lie, and a group looks at no more of the mask than its own tiles: a lane at one, 32 at
// once.
#pragma once

#include <cstdint>

#include "attention_decode/tiles.cuh"

namespace infuse::attention_decode {

constexpr std::uint32_t kNoTile = 0xffffffff;   // there are no more
constexpr std::uint32_t kChanged = 0x80000000;  // beside a tile's number: the mask must be applied
constexpr std::uint32_t kUnseen = 0x40000000;   // fetched before the mask was known, and masked out
constexpr std::uint32_t kNumber = 0x3fffffff;

// What a mask says of tile `tile`, for the rows of `mask`: any kind, aligned or not. Out of line, for the instruction
// cache's sake.
template <typename Element, int kTile>
__device__ __noinline__ Seen look_at_rows(const Params& params, Rows rows, MaskRows mask, std::uint32_t tile) {
  Seen seen{false, true};
  const std::uint32_t first = tile * kTile;
  const bool whole = params.mask_is_aligned && first + kTile <= params.keys;
#pragma unroll 1
  for (std::uint32_t slot = 0; slot < mask.count; ++slot) {
    const Element* row = mask_row<Element>(params, rows, mask.row_of(params, slot));
    if (whole) {
      const Seen found = look_at_tile<Element, kTile>(row, tile, kFilled);
      seen.any |= found.any;
      seen.all &= found.all;
    } else {
#pragma unroll 1
      for (std::uint32_t key = first; key < first + kTile && key < params.keys; ++key) seen.any |= sees(row[key], kFilled);
      seen.all = false;
    }
  }
  return seen;
}

template <typename Traits>
__device__ __forceinline__ Seen look_at_mask(const Params& params, const Rows& rows, const MaskRows& mask,
                                             std::uint32_t tile) {
  if (params.mask_kind == Mask::kBool) return look_at_rows<std::uint8_t, Traits::kTile>(params, rows, mask, tile);
  if (params.mask_kind == Mask::kFloat32) return look_at_rows<float, Traits::kTile>(params, rows, mask, tile);
  return look_at_rows<typename Traits::T, Traits::kTile>(params, rows, mask, tile);
}

// Number i of the group's tiles is first + i * step, i < count.
template <typename Traits>
struct OwnTiles {
  std::uint32_t first, step, count;
  std::uint32_t base;           // number of the first of the 32 tiles looked at
  std::uint32_t seen, changed;  // bits of those that are left

  // Looks at 32 tiles from number `from` on. All warps of the group; `mask` has the rows of this one.
  __device__ __forceinline__ void look(const Params& params, const Rows& rows, const MaskRows& mask,
                                       std::uint32_t from) {
    const std::uint32_t number = from + threadIdx.x % kWarpSize;
    Seen found{number < count, true};
    if (params.mask_kind != Mask::kNone && found.any) {
      found = look_at_mask<Traits>(params, rows, mask, first + number * step);
    }
    base = from;
    seen = __ballot_sync(kFullMask, found.any);
    changed = __ballot_sync(kFullMask, !found.all);
    if constexpr (Traits::kRowWarps > 1) unite();
  }

  // What any warp of the group found. Two places in turn: a warp may still read from one when another is at the next.
  __device__ __forceinline__ void unite() {
    __shared__ uint2 found[2][Traits::kMaxGroups][Traits::kRowWarps];
    const std::uint32_t warp = threadIdx.x / kWarpSize, group = warp / Traits::kRowWarps;
    auto& place = found[base / kWarpSize % 2][group];
    if (threadIdx.x % kWarpSize == 0) place[warp % Traits::kRowWarps] = make_uint2(seen, changed);
    sync_group(static_cast<int>(group), Traits::kThreads);
    seen = changed = 0;
#pragma unroll
    for (int warp = 0; warp < Traits::kRowWarps; ++warp) {
      seen |= place[warp].x;
      changed |= place[warp].y;
    }
  }

  // The next tile, with kChanged, or kNoTile.
  __device__ __forceinline__ std::uint32_t next(const Params& params, const Rows& rows, const MaskRows& mask) {
    while (seen == 0) {
      if (base + kWarpSize >= count) return kNoTile;
      look(params, rows, mask, base + kWarpSize);
    }
    const std::uint32_t bit = __ffs(static_cast<int>(seen)) - 1;
    seen &= seen - 1;
    return first + (base + bit) * step + ((changed >> bit & 1) != 0 ? kChanged : 0);
  }
};

// Of `groups` groups that take turns, number `group`'s tiles. is_causal ends at the last query's.
template <typename Traits>
__device__ __forceinline__ OwnTiles<Traits> own_tiles(const Params& params, const Rows& rows, std::uint32_t group,
                                                      std::uint32_t groups) {
  std::uint32_t needed = params.tiles;
  if (params.is_causal) {
    const std::uint32_t last = params.group.divide(rows.first + rows.count - 1) / Traits::kTile + 1;
    needed = last < needed ? last : needed;
  }
  return {group, groups, needed > group ? (needed - group + groups - 1) / groups : 0, 0, 0, 0};
}

}  // namespace infuse::attention_decode
