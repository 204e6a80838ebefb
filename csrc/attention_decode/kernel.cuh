// Attention of few query rows over many keys:
//
//   out = softmax(cap(scale * q k^T) + mask) v        rows: all queries of all heads that share a K/V head
//
// K and V are read once, so memory is the limit. A CTA has the rows of one K/V head, up to 64, and one of the splits of
// the keys. Its four warps are groups of `row_warps` warps, 16 rows each; the groups take turns with the tiles of keys,
// each with a ring of its own in shared memory, filled by cp.async, and never wait for one another. Scores and sums are
// fp32, the softmax is computed tile by tile (Milakov and Gimelshein 2018; Dao et al. 2022), and what groups and splits
// found is merged at the end in a fixed order: in a cluster through distributed shared memory, else by a second kernel.
#pragma once

#include <cstdint>

#include "attention_decode/load.cuh"
#include "attention_decode/merge.cuh"
#include "attention_decode/scores.cuh"
#include "attention_decode/tiles.cuh"
#include "infuse/overlap.cuh"

namespace infuse::attention_decode {

// All tiles of the group.
template <typename Traits>
__device__ __forceinline__ void attend(const Params& params, const Rows& rows, const Place& place, Tiles tiles,
                                       Sums<Traits::kDim>& sums) {
  const Sources<typename Traits::T> sources{source_of<Traits>(place, params.k, params.k_stride, rows, params.dim),
                                            source_of<Traits>(place, params.v, params.v_stride, rows, params.dim_v)};
  const std::uint32_t first_row = rows.first + place.row_warp * kWarpRows;
  const MaskRows mask = mask_rows(params, first_row, kWarpRows);
  const std::uint32_t slots[2] = {mask.slot_of(params, first_row + place.lane / 4),
                                  mask.slot_of(params, first_row + place.lane / 4 + 8)};
  constexpr std::uint32_t kAhead = Traits::kStages - 1;
  const std::uint32_t num_words = (params.tiles + kWarpSize - 1) / kWarpSize;
  Tiles next = tiles;
  const auto fetch_next = [&](std::uint32_t i) {
    if (i < tiles.count) {
      fetch<Traits>(params, rows, place, mask, sources, place.ring + i % Traits::kStages * place.stage_bytes,
                    next.current(), next.is_changed());
      next.advance(place.groups, num_words);
    }
    end_copy_group();
  };
  std::uint32_t queries[Traits::kKeepsQueries ? Traits::kSteps : 1][4];
  // One loop for filling the ring and for working through it: the code is read from memory too.
#pragma unroll 1
  for (std::uint32_t i = 0;; ++i) {
    if (i == kAhead) {
      wait_for_copies<kAhead>();  // the queries, which came before the first tile
      __syncthreads();
      if constexpr (Traits::kKeepsQueries) {
#pragma unroll
        for (int step = 0; step < Traits::kSteps; ++step) load_query_step<Traits>(queries[step], place, step);
      }
    }
    if (i >= kAhead) {
      if (i - kAhead >= tiles.count) break;
      wait_for_copies<kAhead - 1>();
      sync_warps(params, place);  // the tile is there for all, and the one before it is read by none
    }
    fetch_next(i);
    if (i < kAhead) continue;
    const SharedAddress stage = place.ring + (i - kAhead) % Traits::kStages * place.stage_bytes;
    float scores[Traits::kTile / 8][4];
    multiply_keys<Traits>(place, stage, queries, scores);
    finish_scores<Traits>(params, rows, place, stage + 2 * Traits::kTile * Traits::kRowBytes, slots, tiles.current(),
                          tiles.is_changed(), scores);
    rebase<Traits>(scores, sums);
    multiply_values<Traits>(place, stage + Traits::kTile * Traits::kRowBytes, scores, sums);
    tiles.advance(place.groups, num_words);
  }
}

template <typename Traits>
__device__ __forceinline__ Tiles tiles_of_group(const Params& params, const Rows& rows, const Place& place,
                                                const Bits& bits) {
  using T = typename Traits::T;
  if (params.mask_kind == Mask::kNone) return all_tiles<Traits::kTile>(params, rows, place.group, place.groups);
  __shared__ std::uint64_t seen;
  const MaskRows mask = mask_rows(params, rows.first, rows.count);
  if (params.mask_kind == Mask::kBool) {
    mark_tiles<std::uint8_t, Traits::kTile>(params, rows, mask, bits, &seen, 0.0f);
  } else {
    if (threadIdx.x == 0) seen = 0;
    __syncthreads();
    const auto mark = [&](float floor) {
      if (params.mask_kind == Mask::kFloat32) {
        mark_tiles<float, Traits::kTile>(params, rows, mask, bits, &seen, floor);
      } else {
        mark_tiles<T, Traits::kTile>(params, rows, mask, bits, &seen, floor);
      }
    };
    mark(kFilled);
    __syncthreads();
    // A row that sees nothing above the filling: its softmax is that of the filled scores.
    if (static_cast<std::uint32_t>(__popcll(static_cast<long long>(seen))) != mask.count) mark(kMinusInfinity);
  }
  __syncthreads();
  return marked_tiles(params, bits, place.group, place.groups);
}

// blockIdx: split, K/V head and block of rows, batch.
template <typename Traits>
__global__ void __launch_bounds__(kThreads, 2) decode_kernel(const __grid_constant__ Params params) {
  const SharedAddress shared = dynamic_shared_memory();
  Rows rows{};
  rows.batch = blockIdx.z;
  rows.kv_head = params.row_blocks.divide(blockIdx.y);
  const std::uint32_t cta_rows = params.row_warps * kWarpRows;
  rows.first = (blockIdx.y - rows.kv_head * params.row_blocks.divisor) * cta_rows;
  rows.count = params.rows - rows.first < cta_rows ? params.rows - rows.first : cta_rows;

  Place place{};
  const std::uint32_t warp = threadIdx.x / kWarpSize;
  place.lane = threadIdx.x % kWarpSize;
  place.row_warp = warp % params.row_warps;
  place.group = warp / params.row_warps;
  place.groups = kWarps / params.row_warps;
  place.group_threads = params.row_warps * kWarpSize;
  place.thread = place.row_warp * kWarpSize + place.lane;
  place.stage_bytes = params.stage_bytes;
  place.queries = shared;
  const SharedAddress ring = shared + cta_rows * Traits::kRowBytes;
  place.ring = ring + place.group * Traits::kStages * place.stage_bytes;
  std::uint32_t* words = static_cast<std::uint32_t*>(__cvta_shared_to_generic(shared + params.bits_offset));
  const Bits bits{words, words + (params.tiles + kWarpSize - 1) / kWarpSize};

  wait_for_previous_kernel();
  load_queries<Traits>(params, rows, place.queries);
  end_copy_group();
  const Tiles tiles = tiles_of_group<Traits>(params, rows, place, bits);
  Sums<Traits::kDim> sums;
#pragma unroll
  for (int n = 0; n < Traits::kDim / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sums.out[n][e] = 0.0f;
  }
  sums.largest[0] = sums.largest[1] = kMinusInfinity;
  sums.denominator[0] = sums.denominator[1] = 0.0f;
  attend<Traits>(params, rows, place, tiles, sums);
  let_next_kernel_start();
  merge<Traits>(params, rows, place, ring, sums);
}

}  // namespace infuse::attention_decode
