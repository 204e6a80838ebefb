// Attention of up to 64 rows over many keys (sm_90a).
//
// The splits of a K/V head are CTAs whose groups of warps are dealt the tiles of keys in turn, each with a ring of its
// own that TMA fills. A group is one warp with 16 rows and tiles of 16 keys, which then waits for no other warp before
// the merge, or, for more rows, four warps with tiles of 64 keys, whose products are a warpgroup's (wgmma). The splits
// are merged in a cluster, which takes one launch and no workspace, or by a second kernel: clusters of more than two
// CTAs leave SMs idle, of an H200's 132 up to 20, when each CTA has an SM to itself.
//
// A group fetches its first tile before it knows the mask, which nearly always hides no first tile, and it brings that
// tile into the L2 while the kernel before this one still runs.
#pragma once

#include <cstdint>

#include "attention_decode/dealt_merge.cuh"
#include "attention_decode/dealt_tiles.cuh"
#include "attention_decode/load.cuh"
#include "attention_decode/scores.cuh"
#include "attention_decode/warpgroup.cuh"
#include "infuse/overlap.cuh"
#include "infuse/tma.cuh"

namespace infuse::attention_decode {

// kRowWarps: of a group, 1 or 4.
template <typename T, int kDim, int kTile, int kStages, int kRowWarps_>
struct DealtTraits : Traits<T, kDim, kTile, kStages, true> {
  static constexpr int kRowWarps = kRowWarps_;
  static constexpr int kThreads = kRowWarps * kWarpSize;  // of a group
  static constexpr int kMaxGroups = kMaxDealtWarps / kRowWarps;
  static constexpr bool kIsWarpgroup = kRowWarps > 1;
  static constexpr int kTileBytes = kTile * row_bytes(kDim), kBlockBytes = kTile * kBlockRowBytes;
};

// A group's ring: the tiles, the parts of the mask that belong to them, and a barrier for each stage.
struct Ring {
  SharedAddress tiles, masks, barriers;
};

template <typename Traits>
__device__ __forceinline__ void sync_own_group(const Place& place) {
  if constexpr (Traits::kIsWarpgroup) {
    sync_group(static_cast<int>(place.group), Traits::kThreads);
  } else {
    __syncwarp();
  }
}

// A row of K or of V for each thread of the group, and the mask of the tiles it will look at first. Reads nothing: what
// the kernel before this one still writes will be read from the L2.
template <typename Traits>
__device__ __forceinline__ void prefetch_first_tile(const Params& params, const Rows& rows, const Place& place,
                                                    const MaskRows& mask, const OwnTiles<Traits>& tiles) {
  using T = typename Traits::T;
  static_assert(Traits::kThreads == 2 * Traits::kTile);
  const std::uint32_t key = tiles.first * Traits::kTile + place.thread % Traits::kTile;
  if (tiles.count > 0 && key < params.keys) {
    const bool is_k = place.thread < Traits::kTile;
    const Strides& stride = is_k ? params.k_stride : params.v_stride;
    const T* row = static_cast<const T*>(is_k ? params.k : params.v) + rows.batch * stride.batch +
                   rows.kv_head * stride.head + key * stride.row;
    prefetch_to_l2(row, (is_k ? params.dim : params.dim_v) * sizeof(T));
  }
  const std::uint32_t first = (tiles.first + place.lane * tiles.step) * Traits::kTile;
  if (params.mask_kind == Mask::kBool && params.mask_is_aligned && mask.count > 0 && place.lane < tiles.count &&
      first + Traits::kTile <= params.keys) {
    prefetch_to_l2(mask_row<std::uint8_t>(params, rows, mask.row_of(params, 0)) + first, Traits::kTile);
  }
}

// Starts the copies of a tile of K and of V. By one thread of the group.
template <typename Traits>
__device__ __forceinline__ void load_both(const Params& params, const Rows& rows, SharedAddress stage,
                                          SharedAddress barrier, std::uint32_t tile) {
  arrive_expecting(barrier, 2 * Traits::kTileBytes);
  const auto key = static_cast<std::int32_t>(tile * Traits::kTile);
  const auto head = static_cast<std::int32_t>(rows.kv_head), batch = static_cast<std::int32_t>(rows.batch);
#pragma unroll
  for (int block = 0; block < Traits::kDim / kBlockColumns; ++block) {
    load_box(stage + block * Traits::kBlockBytes, params.k_map, barrier, L2::kNormal, block * kBlockColumns, key, head,
             batch);
  }
#pragma unroll
  for (int block = 0; block < Traits::kDim / kBlockColumns; ++block) {
    load_box(stage + Traits::kTileBytes + block * Traits::kBlockBytes, params.v_map, barrier, L2::kNormal,
             block * kBlockColumns, key, head, batch);
  }
}

// Adds a tile to the sums. `tile` with kChanged where the mask must be applied.
template <typename Traits>
__device__ __forceinline__ void add_tile(const Params& params, const Rows& rows, const Place& place, SharedAddress stage,
                                         SharedAddress mask, const std::uint32_t (&slots)[2], std::uint32_t tile,
                                         const std::uint32_t (&queries)[Traits::kKeepsQueries ? Traits::kSteps : 1][4],
                                         Sums<Traits::kDim>& sums) {
  float scores[Traits::kTile / 8][4];
  if constexpr (Traits::kIsWarpgroup) {
    multiply_keys_by_group<Traits>(stage, queries, scores);
  } else {
    multiply_keys<Traits>(place, stage, queries, scores);
  }
  finish_scores<Traits>(params, rows, place, mask, slots, tile & kNumber, (tile & kChanged) != 0, scores);
  rebase<Traits>(scores, sums);
  if constexpr (Traits::kIsWarpgroup) {
    multiply_values_by_group<Traits>(stage + Traits::kTileBytes, scores, sums);
  } else {
    multiply_values<Traits>(place, stage + Traits::kTileBytes, scores, sums);
  }
}

// Starts the copies of the group's tile number `i` to a stage of the ring, and returns it.
template <typename Traits>
__device__ __forceinline__ std::uint32_t fetch_next(const Params& params, const Rows& rows, const Place& place,
                                                    const MaskRows& mask, const Ring& ring, std::uint32_t i,
                                                    std::uint32_t stage, OwnTiles<Traits>& tiles) {
  std::uint32_t tile = tiles.count > 0 ? tiles.first : kNoTile;
  if (i > 0) tile = tiles.next(params, rows, mask);
  if (tile == kNoTile) return tile;
  if (place.thread == 0) {
    load_both<Traits>(params, rows, ring.tiles + stage * 2 * Traits::kTileBytes, ring.barriers + stage * kBarrierBytes,
                      tile & kNumber);
  }
  __syncwarp();
  if (i == 0) {
    tiles.look(params, rows, mask, 0);
    tile |= ((tiles.changed & 1) != 0 ? kChanged : 0) | ((tiles.seen & 1) != 0 ? 0 : kUnseen);
    tiles.seen &= ~1u;
  }
  if ((tile & kChanged) != 0) {
    load_any_mask<Traits>(params, rows, place, mask, ring.masks + stage * params.mask_bytes, tile & kNumber);
  }
  return tile;
}

// All tiles of the group. `when_queries_are_read` is called once by all warps, if the queries are in shared memory.
template <typename Traits, typename Function>
__device__ __forceinline__ void attend_own(const Params& params, const Rows& rows, const Place& place,
                                           const MaskRows& mask, const Ring& ring, OwnTiles<Traits> tiles,
                                           Sums<Traits::kDim>& sums, Function&& when_queries_are_read) {
  constexpr std::uint32_t kStages = Traits::kStages;
  const std::uint32_t first_row = place.row_warp * kWarpRows + place.lane / 4;
  const std::uint32_t slots[2] = {mask.slot_of(params, first_row), mask.slot_of(params, first_row + 8)};
  std::uint32_t queries[Traits::kKeepsQueries ? Traits::kSteps : 1][4];
  if constexpr (Traits::kIsWarpgroup) read_queries<Traits>(params, rows, place, queries);
  std::uint32_t under_way[kStages];
  std::uint32_t stage = 0, parity = 1;
  // One loop for filling the ring and for working through it: the code is read from memory too.
#pragma unroll 1
  for (std::uint32_t i = 0;; ++i) {
    if constexpr (!Traits::kIsWarpgroup) {
      if (i == kStages) {
        wait_for_copies<kStages>();  // the queries, which came before the first tile
        __syncthreads();
        if constexpr (Traits::kKeepsQueries) {
#pragma unroll
          for (int step = 0; step < Traits::kSteps; ++step) load_query_step<Traits>(queries[step], place, step);
        }
        when_queries_are_read();
      }
    }
    if (i >= kStages) {
      if (under_way[0] == kNoTile) break;
      wait_for_copies<kStages - 1>();  // of the mask, each warp its own rows'
      wait(ring.barriers + stage * kBarrierBytes, parity);
      __syncwarp();
      if ((under_way[0] & kUnseen) == 0) {
        add_tile<Traits>(params, rows, place, ring.tiles + stage * 2 * Traits::kTileBytes,
                         ring.masks + stage * params.mask_bytes, slots, under_way[0], queries, sums);
      }
      sync_own_group<Traits>(place);  // nobody reads the stage any more
    }
    const std::uint32_t tile = fetch_next<Traits>(params, rows, place, mask, ring, i, stage, tiles);
    end_copy_group();
#pragma unroll
    for (int s = 0; s + 1 < static_cast<int>(kStages); ++s) under_way[s] = under_way[s + 1];
    under_way[kStages - 1] = tile;
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
}

template <typename Traits>
__device__ __forceinline__ Place place_of(const Params& params, SharedAddress shared) {
  Place place{};
  const std::uint32_t warp = threadIdx.x / kWarpSize;
  place.lane = threadIdx.x % kWarpSize;
  place.row_warp = warp % Traits::kRowWarps;
  place.group = warp / Traits::kRowWarps;
  place.groups = blockDim.x / Traits::kThreads;
  place.group_threads = Traits::kThreads;
  place.thread = threadIdx.x % Traits::kThreads;
  place.queries = shared;
  return place;
}

// With its barriers ready for the group, which must be synchronised before it uses them.
template <typename Traits>
__device__ __forceinline__ Ring make_ring(const Params& params, const Place& place, SharedAddress shared) {
  const std::uint32_t first = place.group * Traits::kStages;
  const Ring ring{shared + params.ring_offset + first * 2 * Traits::kTileBytes,
                  shared + params.mask_offset + first * params.mask_bytes,
                  shared + params.barrier_offset + (1 + first) * kBarrierBytes};
  if (place.thread == 0) {
    for (int stage = 0; stage < Traits::kStages; ++stage) init_barrier(ring.barriers + stage * kBarrierBytes, 1);
    publish_barriers();
  }
  return ring;
}

// blockIdx: split, K/V head, batch. The splits are a cluster, unless there is a place for them in global memory.
template <typename Traits>
__global__ void __launch_bounds__(kMaxDealtWarps* kWarpSize, 1) dealt_kernel(const __grid_constant__ Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  let_next_kernel_start();
  const SharedAddress shared = (dynamic_shared_memory() + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
  const Rows rows{blockIdx.z, blockIdx.y, 0, params.rows};
  const Place place = place_of<Traits>(params, shared);
  const MaskRows mask = mask_rows(params, place.row_warp * kWarpRows, kWarpRows);
  const OwnTiles<Traits> tiles =
      own_tiles<Traits>(params, rows, blockIdx.x * place.groups + place.group, params.splits * place.groups);

  if (threadIdx.x == 0) {
    prefetch_map(params.k_map);
    prefetch_map(params.v_map);
  }
  __syncwarp();
  prefetch_first_tile<Traits>(params, rows, place, mask, tiles);
  const bool in_cluster = params.splits > 1 && params.part_out == nullptr;
  const Inbox inbox = make_inbox(params, rows, shared);
  if (in_cluster && threadIdx.x == 0) open_inbox(params, inbox);
  const Ring ring = make_ring<Traits>(params, place, shared);
  sync_own_group<Traits>(place);
  wait_for_previous_kernel();
  if constexpr (!Traits::kIsWarpgroup) {
    load_queries<Traits>(params, rows, place.queries);
    end_copy_group();
  }
  Sums<Traits::kDim> sums;
#pragma unroll
  for (int n = 0; n < Traits::kDim / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sums.out[n][e] = 0.0f;
  }
  sums.largest[0] = sums.largest[1] = kMinusInfinity;
  sums.denominator[0] = sums.denominator[1] = 0.0f;
  // Once told, others may write into the inbox, which of a warpgroup has the place of the ring.
  const auto tell = [&] {
    if (in_cluster) tell_cluster();
  };
  attend_own<Traits>(params, rows, place, mask, ring, tiles, sums, tell);
  if constexpr (Traits::kIsWarpgroup) tell();
  merge_dealt<Traits>(params, rows, place, shared + params.ring_offset, inbox, sums);
#endif
}

}  // namespace infuse::attention_decode
