// Which tiles of keys a CTA visits, and what each of its warps does there.
#pragma once

#include <cstdint>

#include "attention_forward/mma_state.cuh"

namespace infuse::attention_forward {

// A tile and what the warp does there, in one register.
struct Visit {
  std::uint32_t bits;

  __device__ __forceinline__ std::uint32_t tile() const { return bits >> 3; }
  __device__ __forceinline__ bool exists() const { return (bits & 4) != 0; }
  // By a row of the warp.
  __device__ __forceinline__ bool is_seen() const { return (bits & 1) != 0; }
  // The mask must be applied to the warp's rows.
  __device__ __forceinline__ bool is_masked() const { return (bits & 2) != 0; }
  __device__ __forceinline__ std::uint32_t tile_behind() const { return (bits + 8) >> 3; }
};

// What does not exist and has tile `tile` behind it.
__device__ __forceinline__ Visit no_visit_before(std::uint32_t tile) { return {(tile << 3) - 8}; }

// Finds the tiles before `end` in their order. All lanes of all warps of the CTA come to the same tiles.
template <typename Traits>
struct Visits {
  std::uint32_t end;
  // Of this lane's among the 32 tiles around the last one found. Bits: a row of the CTA sees it, a row of the warp
  // does, and the mask matters to the warp.
  std::uint32_t states;

  __device__ __forceinline__ void look_at(const Params& params, const Place& place, std::uint32_t window) {
    const std::uint32_t thread = read_thread(), lane = thread % kWarpSize;
    const std::uint32_t tile = window * kWarpSize + lane;
    const std::uint32_t first = place.first_row / attention::kMapTile, last = place.last_row / attention::kMapTile;
    const std::uint32_t own_row = (place.first_row + thread / kWarpSize * Traits::kWarpRows) / attention::kMapTile;
    const std::uint8_t* map = params.map.data + place.batch * params.map.batch + place.head * params.map.head + tile;
    states = 0;
    if (tile >= end) return;
    for (std::uint32_t row = first; row <= last; ++row) {
      const std::uint8_t state = __ldg(map + std::uint64_t{row} * params.map.columns);
      if (state == attention::kHidden) continue;
      states |= row != own_row ? 1 : state == attention::kMasked ? 7 : 3;
    }
  }

  // The first tile to visit behind `last`, the last that was found.
  __device__ __forceinline__ Visit find(const Params& params, const Place& place, Visit last) {
    std::uint32_t from = last.tile_behind();
    if (!Traits::kFull || params.map.data == nullptr) {
      return from < end ? Visit{from << 3 | (params.mask_kind != Mask::kNone ? 7u : 5u)} : Visit{0};
    }
    for (bool look = !last.exists() || from % kWarpSize == 0; from < end; look = true) {
      if (look) look_at(params, place, from / kWarpSize);
      const std::uint32_t rest = __ballot_sync(kFullMask, (states & 1) != 0) >> from % kWarpSize;
      if (rest != 0) {
        const std::uint32_t tile = from + __ffs(static_cast<int>(rest)) - 1;
        const std::uint32_t state = __shfl_sync(kFullMask, states, static_cast<int>(tile % kWarpSize));
        return {tile << 3 | 4 | state >> 1};
      }
      from = (from / kWarpSize + 1) * kWarpSize;
    }
    return {0};
  }

  __device__ __forceinline__ std::uint32_t count(const Params& params, const Place& place, std::uint32_t window) {
    look_at(params, place, window);
    return __popc(__ballot_sync(kFullMask, (states & 1) != 0));
  }

  // The tile before which there are `number` to visit.
  __device__ __forceinline__ std::uint32_t tile_after(const Params& params, const Place& place, std::uint32_t number) {
    for (std::uint32_t window = 0; window * kWarpSize < end; ++window) {
      const std::uint32_t here = count(params, place, window);
      if (number < here) {
        std::uint32_t bits = __ballot_sync(kFullMask, (states & 1) != 0);
        for (; number > 0; --number) bits &= bits - 1;
        return window * kWarpSize + __ffs(static_cast<int>(bits)) - 1;
      }
      number -= here;
    }
    return end;
  }

  // Leaves the share of one split. Returns the tile from which to look on.
  __device__ __forceinline__ std::uint32_t take_share(const Params& params, const Place& place, std::uint32_t split) {
    std::uint32_t total = end;
    if (Traits::kFull && params.map.data != nullptr) {
      total = 0;
      for (std::uint32_t window = 0; window * kWarpSize < end; ++window) total += count(params, place, window);
    }
    std::uint32_t begin = static_cast<std::uint32_t>(std::uint64_t{total} * split / params.splits);
    std::uint32_t past = static_cast<std::uint32_t>(std::uint64_t{total} * (split + 1) / params.splits);
    if (Traits::kFull && params.map.data != nullptr) {
      begin = tile_after(params, place, begin);
      past = tile_after(params, place, past);
    }
    end = past;
    return begin;
  }
};

template <typename Traits>
__device__ __forceinline__ Visits<Traits> visits_of(const Params& params, const Place& place) {
  Visits<Traits> visits{(params.keys + kTile - 1) / kTile, 0};
  const std::uint32_t needed = place.last_row / kTile + 1;
  if (params.is_causal && needed < visits.end) visits.end = needed;
  return visits;
}

}  // namespace infuse::attention_forward
