// The warp that loads: it takes tiles, finds out which keys each sees, and keeps the copy engine busy.
#pragma once

#include <cstdint>

#include "attention_forward/wgmma_traits.cuh"
#include "infuse/reduce.cuh"
#include "infuse/tma.cuh"

namespace infuse::attention_forward {

struct TilePlace {
  std::uint32_t row_block, batch, head;
};

__device__ __forceinline__ TilePlace place_of(const WgmmaParams& params, std::uint32_t tile) {
  const TileOrder& order = params.order;
  const std::uint32_t section = order.section_tiles.divide(tile);
  const std::uint32_t within = tile - section * order.section_tiles.divisor;
  const std::uint32_t first = section * order.section_heads;
  const FastDivisor& heads = first + order.section_heads <= order.total_heads ? order.full_section : order.last_section;
  const std::uint32_t rank = heads.divide(within);
  TilePlace place{};
  place.row_block = order.row_blocks - 1 - rank;
  const std::uint32_t of_all = first + within - rank * heads.divisor;
  place.batch = params.base.heads.divide(of_all);
  place.head = of_all - place.batch * params.base.heads.divisor;
  return place;
}

static_assert(attention::kMapTile == kGroupRows);

// What one lane knows of 32 tiles of keys, from the last one down: bit i stands for tile first - i.
template <typename Traits>
struct Visits {
  std::int32_t first;
  std::uint32_t visible, masked;
  const std::uint8_t* map;  // from the tile's first row on, or null

  // 0: no row sees it; 1: some keys are hidden; 2: all are seen.
  __device__ __forceinline__ int state(const WgmmaParams& params, const TilePlace& place, std::int32_t tile) const {
    const Params& base = params.base;
    if (tile < 0) return 0;
    const std::uint32_t row = place.row_block * Traits::kRows, begin = static_cast<std::uint32_t>(tile) * Traits::kKeys;
    std::uint32_t end = begin + Traits::kKeys;
    const bool is_open = !params.scores_need_scaling && end <= base.keys && !(base.is_causal && end > row + 1);
    if (base.mask_kind == Mask::kNone) return is_open ? 2 : 1;
    if (map == nullptr) return 1;
    end = end < base.keys ? end : base.keys;
    bool any = false, all = is_open;
#pragma unroll 1
    for (std::uint32_t c = begin / attention::kMapTile; c * attention::kMapTile < end; ++c) {
#pragma unroll 1
      for (std::uint32_t r = 0; r < Traits::kGroups && row + r * attention::kMapTile < base.queries; ++r) {
        const std::uint8_t found = map[r * base.map.columns + c];
        any |= found != attention::kHidden;
        all &= found == attention::kOpen;
      }
    }
    return any ? all ? 2 : 1 : 0;
  }

  __device__ __forceinline__ void look(const WgmmaParams& params, const TilePlace& place) {
    const int found = state(params, place, first - static_cast<std::int32_t>(threadIdx.x % kWarpSize));
    visible = __ballot_sync(kFullMask, found != 0);
    masked = __ballot_sync(kFullMask, found == 1);
  }

  __device__ __forceinline__ void start(const WgmmaParams& params, const TilePlace& place) {
    const Params& base = params.base;
    const std::uint32_t rows_end = (place.row_block + 1) * Traits::kRows;
    const std::uint32_t end = base.is_causal && rows_end < base.keys ? rows_end : base.keys;
    first = static_cast<std::int32_t>((end + Traits::kKeys - 1) / Traits::kKeys) - 1;
    map = base.map.data;
    if (map != nullptr) {
      map += place.batch * base.map.batch + place.head * base.map.head +
             static_cast<std::size_t>(place.row_block * Traits::kGroups) * base.map.columns;
    }
    look(params, place);
    if (any(params, place)) return;
    // Rows that see nothing look at one tile, whose mask says so.
    first = 0;
    visible = masked = 1;
  }

  __device__ __forceinline__ bool any(const WgmmaParams& params, const TilePlace& place) {
    while (visible == 0) {
      if (first < static_cast<std::int32_t>(kWarpSize)) return false;
      first -= kWarpSize;
      look(params, place);
    }
    return true;
  }

  // The next visit, once any() said that there is one.
  __device__ __forceinline__ std::uint32_t take() {
    const std::uint32_t bit = visible & (~visible + 1);
    const std::uint32_t tile = static_cast<std::uint32_t>(first - (__ffs(static_cast<int>(bit)) - 1));
    visible ^= bit;
    return tile | ((masked & bit) != 0 ? kIsMasked : 0);
  }
};

// A tile of rows, all columns, by the copy engine.
template <int kBlocks>
__device__ __forceinline__ void load_tile(const CUtensorMap& map, SharedAddress shared, std::uint32_t block_bytes,
                                          SharedAddress barrier, L2 keep, std::uint32_t row, std::uint32_t head,
                                          std::uint32_t batch) {
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    load_box(shared + block * block_bytes, map, barrier, keep, block * kSwizzledColumns, static_cast<std::int32_t>(row),
             static_cast<std::int32_t>(head), static_cast<std::int32_t>(batch));
  }
}

template <typename Traits>
struct Loader {
  const WgmmaParams& params;
  WgmmaShared<Traits> shared;
  bool is_leader;  // one lane talks to the barriers and the copy engine
  std::uint32_t round = 0;  // number of the CTA's tile
  RingPlace<Traits::kStages> ring{};
  // The visit before, whose values are yet to come.
  std::uint32_t before_key = 0, before_head = 0, before_batch = 0;

  // Known to the leader; a number beyond the last tile if there is none.
  __device__ __forceinline__ std::uint32_t next_tile() const {
    if (params.counter == nullptr) return params.order.tiles;
    return is_leader ? gridDim.x + atomicAdd(params.counter, 1u) : 0;
  }

  __device__ __forceinline__ void announce(std::uint32_t row_block, std::uint32_t batch_head) {
    if (is_leader) {
      const RingPlace<kTilesAhead> slot = place_in_ring<kTilesAhead>(round);
      wait(shared.tile_empty(slot.stage), slot.parity ^ 1);
      store_word(shared.tile(slot.stage), row_block);
      store_word(shared.tile(slot.stage) + 4, batch_head);
      arrive(shared.tile_full(slot.stage));
    }
  }

  __device__ __forceinline__ void load_queries(const TilePlace& place) {
    if (!is_leader) return;
    const RingPlace<Traits::kQueryStages> stage = place_in_ring<Traits::kQueryStages>(round);
    wait(shared.queries_empty(stage.stage), stage.parity ^ 1);
    arrive_expecting(shared.queries_full(stage.stage), Traits::kQueryBytes);
    load_tile<Traits::kBlocks>(params.q, shared.queries(stage.stage), Traits::kQueryBlockBytes,
                               shared.queries_full(stage.stage), L2::kEvictFirst, place.row_block * Traits::kRows,
                               place.head, place.batch);
  }

  // Waits for an empty stage and says what it is filled with.
  __device__ __forceinline__ SharedAddress begin_stage(std::uint32_t visit, std::uint32_t tiles) const {
    wait(shared.empty(ring.stage), ring.parity ^ 1);
    store_word(shared.visit(ring.stage), visit);
    arrive_expecting(shared.full(ring.stage), tiles * Traits::kStageBytes);
    return shared.full(ring.stage);
  }

  __device__ __forceinline__ void load_values(SharedAddress barrier) const {
    load_tile<Traits::kBlocks>(params.v, shared.values(ring.stage), Traits::kKeyBlockBytes, barrier, L2::kEvictLast,
                               before_key, before_head, before_batch);
  }

  // The keys of a visit and the values of the one before.
  __device__ __forceinline__ void load_visit(const TilePlace& place, std::uint32_t visit, bool is_first) {
    const std::uint32_t key = (visit & ~(kIsMasked | kIsLast)) * Traits::kKeys;
    const std::uint32_t kv_head = params.base.group.divide(place.head);
    if (is_leader) {
      const SharedAddress barrier = begin_stage(visit, is_first ? 1 : 2);
      load_tile<Traits::kBlocks>(params.k, shared.keys(ring.stage), Traits::kKeyBlockBytes, barrier, L2::kEvictLast,
                                 key, kv_head, place.batch);
      if (!is_first) load_values(barrier);
    }
    before_key = key;
    before_head = kv_head;
    before_batch = place.batch;
    ring.advance();
  }

  __device__ __forceinline__ void run() {
    for (std::uint32_t tile = blockIdx.x; tile < params.order.tiles; ++round) {
      const std::uint32_t next = next_tile();  // asked for now, needed after this tile
      const TilePlace place = place_of(params, tile);
      Visits<Traits> visits;
      visits.start(params, place);
      announce(place.row_block, place.batch * params.base.heads.divisor + place.head);
      load_queries(place);
      bool is_first = round == 0;
      for (bool more = true; more; is_first = false) {
        const std::uint32_t visit = visits.take();
        more = visits.any(params, place);
        load_visit(place, visit | (more ? 0 : kIsLast), is_first);
      }
      tile = __shfl_sync(kFullMask, next, 0);
    }
    announce(kNoTile, 0);
    if (is_leader) load_values(begin_stage(0, 1));
  }
};

}  // namespace infuse::attention_forward
