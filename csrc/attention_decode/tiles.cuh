// Which tiles of keys a CTA reads: those in which the mask lets any of its rows see anything, dealt out to the splits.
#pragma once

#include <cstdint>

#include "attention_decode/state.cuh"

namespace infuse::attention_decode {

// The mask of one row, at key 0.
template <typename Element>
__device__ __forceinline__ const Element* mask_row(const Params& params, const Rows& rows, std::uint32_t row) {
  const std::uint32_t query = params.group.divide(row), head = row - query * params.group.divisor;
  return static_cast<const Element*>(params.mask) + rows.batch * params.mask_stride.batch +
         (rows.kv_head * params.group.divisor + head) * params.mask_stride.head + query * params.mask_stride.row;
}

// The different rows of the mask among neighbouring rows of a K/V head: one a query where heads share the mask.
struct MaskRows {
  std::uint32_t first_row, first_query, count;
  bool per_head;

  // A row that has the mask's row number `slot`.
  __device__ __forceinline__ std::uint32_t row_of(const Params& params, std::uint32_t slot) const {
    return per_head ? first_row + slot : (first_query + slot) * params.group.divisor;
  }

  // The number of the mask's row that row `row` has.
  __device__ __forceinline__ std::uint32_t slot_of(const Params& params, std::uint32_t row) const {
    const std::uint32_t slot = per_head ? row - first_row : params.group.divide(row) - first_query;
    return slot < count ? slot : 0;
  }
};

// count: rows, some perhaps beyond the head's last.
__device__ __forceinline__ MaskRows mask_rows(const Params& params, std::uint32_t first_row, std::uint32_t count) {
  MaskRows mask{first_row, params.group.divide(first_row), 0, params.mask_stride.head != 0};
  if (first_row >= params.rows) return mask;
  const std::uint32_t end = first_row + count < params.rows ? first_row + count : params.rows;
  mask.count = mask.per_head ? end - first_row : params.group.divide(end - 1) - mask.first_query + 1;
  return mask;
}

// What a tile's part of the mask says: whether any key is seen, and whether the mask changes nothing.
struct Seen {
  bool any, all;
};

__device__ __forceinline__ bool sees(std::uint8_t element, float) { return element != 0; }
template <typename Float>
__device__ __forceinline__ bool sees(Float element, float floor) {
  return !(static_cast<float>(element) <= floor);
}

__device__ __forceinline__ bool changes(std::uint8_t element) { return element == 0; }
template <typename Float>
__device__ __forceinline__ bool changes(Float element) {
  return static_cast<float>(element) != 0.0f;
}

// One row of the mask over tile `tile`, of which all keys exist; 16-byte loads.
template <typename Element, int kTile>
__device__ __forceinline__ Seen look_at_tile(const Element* row, std::uint32_t tile, float floor) {
  constexpr int kVecs = kTile * static_cast<int>(sizeof(Element)) / kVectorBytes;
  constexpr int kElems = kVectorBytes / static_cast<int>(sizeof(Element));
  Seen seen{false, true};
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const uint4 vec = __ldg(reinterpret_cast<const uint4*>(row + tile * kTile) + i);
    if constexpr (sizeof(Element) == 1) {
      constexpr std::uint32_t kAllTrue = 0x01010101;
      seen.any |= (vec.x | vec.y | vec.z | vec.w) != 0;
      seen.all &= (vec.x & vec.y & vec.z & vec.w) == kAllTrue;
    } else {
      const Element* elements = reinterpret_cast<const Element*>(&vec);
#pragma unroll
      for (int e = 0; e < kElems; ++e) {
        seen.any |= sees(elements[e], floor);
        seen.all &= !changes(elements[e]);
      }
    }
  }
  return seen;
}

// Additive masks are often filled with the smallest number of their dtype instead of minus infinity. Beside a key that a
// row sees, such a key's weight is zero in fp32 all the same.
constexpr float kFilled = -1e30f;

// Bits of the tiles: `seen`, where a row of the CTA sees a key above `floor`, and `changed`, where the mask must be applied.
struct Bits {
  std::uint32_t* seen;
  std::uint32_t* changed;
};

// Sets the bits of the tiles that can be read 16 bytes at a time; the words of both are zero before. Returns a bit for
// each of the mask's rows that sees any.
template <typename Element, int kTile>
__device__ __forceinline__ std::uint64_t mark_full_tiles(const Params& params, const Rows& rows, const MaskRows& mask,
                                                         const Bits& bits, std::uint32_t full, float floor) {
  constexpr int kBatch = 16 * kVectorBytes / (kTile * static_cast<int>(sizeof(Element)));  // loads that are under way
  const std::uint32_t lane = threadIdx.x % kWarpSize;
  const std::uint32_t padded = (params.tiles + kWarpSize - 1) / kWarpSize * kWarpSize;  // so that a warp has one row
  std::uint64_t seen = 0;
#pragma unroll 1
  for (std::uint32_t of_warp = threadIdx.x - lane; of_warp < mask.count * padded; of_warp += kBatch * kThreads) {
    Seen found[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const std::uint32_t item = of_warp + i * kThreads, slot = item / padded, tile = item - slot * padded + lane;
      found[i] = {false, true};
      if (slot < mask.count && tile < full) {
        const Element* row = mask_row<Element>(params, rows, mask.row_of(params, slot));
        found[i] = look_at_tile<Element, kTile>(row, tile, floor);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const std::uint32_t item = of_warp + i * kThreads, slot = item / padded;
      if (slot >= mask.count) break;
      const std::uint32_t word = (item - slot * padded) / kWarpSize;
      const unsigned seen_word = __ballot_sync(kFullMask, found[i].any);
      const unsigned changed_word = __ballot_sync(kFullMask, !found[i].all || word * kWarpSize + lane >= full);
      if (lane == 0) {
        atomicOr(&bits.seen[word], seen_word);
        atomicOr(&bits.changed[word], changed_word);
      }
      if (seen_word != 0) seen |= std::uint64_t{1} << slot;
    }
  }
  return seen;
}

// The same for the other tiles, element by element: the last one, or all where the mask is not aligned.
template <typename Element, int kTile>
__device__ __forceinline__ std::uint64_t mark_other_tiles(const Params& params, const Rows& rows, const MaskRows& mask,
                                                          const Bits& bits, std::uint32_t full, float floor) {
  std::uint64_t seen = 0;
#pragma unroll 1
  for (std::uint32_t key = full * kTile + threadIdx.x; key < params.keys; key += kThreads) {
#pragma unroll 1
    for (std::uint32_t slot = 0; slot < mask.count; ++slot) {
      if (!sees(mask_row<Element>(params, rows, mask.row_of(params, slot))[key], floor)) continue;
      const std::uint32_t tile = key / kTile;
      atomicOr(&bits.seen[tile / kWarpSize], 1u << tile % kWarpSize);
      seen |= std::uint64_t{1} << slot;
    }
  }
  return seen;
}

// Marks all tiles. seen: gets a bit for each of the mask's rows that sees any key. All threads; a barrier must follow.
template <typename Element, int kTile>
__device__ __noinline__ void mark_tiles(const Params& params, Rows rows, MaskRows mask,
                                        Bits bits, std::uint64_t* seen, float floor) {
  const std::uint32_t full = params.mask_is_aligned ? params.keys / kTile : 0;
  for (std::uint32_t word = threadIdx.x; word * kWarpSize < params.tiles; word += kThreads) {
    bits.seen[word] = bits.changed[word] = 0;
  }
  __syncthreads();
  std::uint64_t mine = mark_full_tiles<Element, kTile>(params, rows, mask, bits, full, floor);
  mine |= mark_other_tiles<Element, kTile>(params, rows, mask, bits, full, floor);
  if constexpr (sizeof(Element) != 1) {
    if (mine != 0) atomicOr(reinterpret_cast<unsigned long long*>(seen), static_cast<unsigned long long>(mine));
  }
}

// The tiles of one split, for one of the groups of warps that take turns with them.
struct Tiles {
  const std::uint32_t* bits;     // null: every tile
  const std::uint32_t* changed;  // where the mask must be applied
  std::uint32_t word;         // of the current tile
  std::uint32_t rest;         // bits of that word from the current tile on
  std::uint32_t count;        // that this group will read

  __device__ __forceinline__ std::uint32_t current() const {
    return bits == nullptr ? word : word * kWarpSize + __ffs(static_cast<int>(rest)) - 1;
  }

  __device__ __forceinline__ bool is_changed() const {
    return bits != nullptr && (changed[word] & rest & -rest) != 0;
  }

  // Must not go beyond the last tile of the split by more than the caller's count.
  __device__ __forceinline__ void advance(std::uint32_t steps, std::uint32_t num_words) {
    if (bits == nullptr) {
      word += steps;
      return;
    }
    for (std::uint32_t i = 0; i < steps; ++i) {
      rest &= rest - 1;
      while (rest == 0 && ++word < num_words) rest = bits[word];
      if (word >= num_words) return;
    }
  }
};

// Share `split` of `total` tiles; group g of `groups` takes every groups-th of them from the g-th on.
__device__ __forceinline__ void share(std::uint32_t total, const Params& params, std::uint32_t group,
                                      std::uint32_t groups, std::uint32_t* first, std::uint32_t* count) {
  const std::uint32_t split = blockIdx.x;
  const std::uint32_t begin = static_cast<std::uint32_t>(static_cast<std::uint64_t>(total) * split / params.splits);
  const std::uint32_t end = static_cast<std::uint32_t>(static_cast<std::uint64_t>(total) * (split + 1) / params.splits);
  *first = begin + group;
  *count = end > *first ? (end - *first + groups - 1) / groups : 0;
}

// Every tile; is_causal ends at the last query's.
template <int kTile>
__device__ __forceinline__ Tiles all_tiles(const Params& params, const Rows& rows, std::uint32_t group,
                                           std::uint32_t groups) {
  std::uint32_t total = params.tiles;
  if (params.is_causal) {
    const std::uint32_t last_query = params.group.divide(rows.first + rows.count - 1);
    const std::uint32_t needed = last_query / kTile + 1;
    total = needed < total ? needed : total;
  }
  Tiles tiles{};
  share(total, params, group, groups, &tiles.word, &tiles.count);
  return tiles;
}

// The marked tiles. All lanes of a warp, after the barrier that follows mark_tiles.
__device__ __forceinline__ Tiles marked_tiles(const Params& params, const Bits& marked, std::uint32_t group,
                                              std::uint32_t groups) {
  const std::uint32_t* bits = marked.seen;
  const std::uint32_t lane = threadIdx.x % kWarpSize;
  const std::uint32_t num_words = (params.tiles + kWarpSize - 1) / kWarpSize;
  const std::uint32_t per_lane = (num_words + kWarpSize - 1) / kWarpSize;
  std::uint32_t own = 0;
  for (std::uint32_t i = 0; i < per_lane; ++i) {
    const std::uint32_t word = lane * per_lane + i;
    own += word < num_words ? __popc(bits[word]) : 0;
  }
  std::uint32_t through = own;  // tiles up to and with this lane's words
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const std::uint32_t before = __shfl_up_sync(kFullMask, through, offset);
    if (lane >= static_cast<std::uint32_t>(offset)) through += before;
  }
  Tiles tiles{};
  tiles.bits = bits;
  tiles.changed = marked.changed;
  std::uint32_t first = 0;
  share(__shfl_sync(kFullMask, through, kWarpSize - 1), params, group, groups, &first, &tiles.count);
  if (tiles.count == 0) return tiles;
  const int owner = __ffs(static_cast<int>(__ballot_sync(kFullMask, through > first))) - 1;
  std::uint32_t skipped = __shfl_sync(kFullMask, through - own, owner);
  tiles.word = static_cast<std::uint32_t>(owner) * per_lane;
  while (skipped + __popc(bits[tiles.word]) <= first) skipped += __popc(bits[tiles.word++]);
  tiles.rest = bits[tiles.word];
  for (; skipped < first; ++skipped) tiles.rest &= tiles.rest - 1;
  return tiles;
}

}  // namespace infuse::attention_decode
