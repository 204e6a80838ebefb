// Attention of up to 8 rows over so few keys that latency is all that counts (sm_90).
//
// The splits of a K/V head are CTAs of one cluster, whose warps are dealt tiles of 16 keys in turn. A warp has its tile
// in registers, straight from memory, without a barrier on the way, and the splits are merged through the inboxes of
// dealt_merge.cuh. Among the kernels of a decoder what counts is the time from the end of the kernel before to the end
// of this one, so all that can be is done before: a warp looks at the mask, as it is then. Nothing that was read early
// is used for a result: once the kernel before has ended, the mask is read again, while the tile that was open is under
// way.
//
// A warp has few tiles, so its instructions count as much as memory: whole tiles are loaded without a test of each row,
// and none is brought into the L2 before, which was measured to take longer than what it saves.
#pragma once

#include <cstdint>

#include "attention_decode/dealt_merge.cuh"
#include "attention_decode/dealt_tiles.cuh"
#include "attention_decode/direct_tile.cuh"
#include "infuse/overlap.cuh"

namespace infuse::attention_decode {

// Four bits, set where the byte is not 0.
__device__ __forceinline__ std::uint32_t bits_of_bytes(std::uint32_t bytes) {
  constexpr std::uint32_t kLow = 0x7f7f7f7f;
  const std::uint32_t top_bits = ((bytes & kLow) + kLow | bytes) & ~kLow;
  return (top_bits >> 7) * 0x10204080 >> 28;  // brings the four side by side
}

// The warp's tiles: number i is first + i * step, i < count. They are looked at 32 at once, a lane each.
struct DirectTiles {
  std::uint32_t first, step, count;
  std::uint32_t base;  // number of the first of those looked at, at first 32 before it
  std::uint32_t seen;  // bits of those that are left
  std::uint32_t open;  // of the lane's tile

  __device__ __forceinline__ void look(const Params& params, const Rows& rows, const MaskRows& mask,
                                       std::uint32_t from) {
    const std::uint32_t number = from + threadIdx.x % kWarpSize, key = (first + number * step) * 16;
    open = number < count ? kAllOpen : 0;
    if (params.mask_kind != Mask::kNone && number < count) {
      std::uint32_t all = kAllOpen;
      open = 0;
      const std::uint32_t end = key + 16 < params.keys ? key + 16 : params.keys;
#pragma unroll 1
      for (std::uint32_t slot = 0; slot < mask.count; ++slot) {
        const std::uint8_t* row = mask_row<std::uint8_t>(params, rows, mask.row_of(params, slot));
        std::uint32_t found = 0;
        if (params.mask_is_aligned && key + 16 <= params.keys) {
          const Vec<std::uint8_t, 16> vec = load<Reuse::kOnce, std::uint8_t, 16>(row + key, true);
#pragma unroll
          for (int w = 0; w < 4; ++w) found |= bits_of_bytes(vec.words[w]) << 4 * w;
        } else {
#pragma unroll 1
          for (std::uint32_t i = key; i < end; ++i) found |= (row[i] != 0 ? 1u : 0u) << (i - key);
        }
        open |= found;
        all &= found;
      }
      if (open != all) open |= kRowsDiffer;
    }
    base = from;
    seen = __ballot_sync(kFullMask, open != 0);
  }

  __device__ __forceinline__ OpenTile next(const Params& params, const Rows& rows, const MaskRows& mask) {
    while (seen == 0) {
      if (base + kWarpSize >= count) return {kNothing, 0};  // of unsigned numbers, also at first
      look(params, rows, mask, base + kWarpSize);
    }
    const std::uint32_t bit = __ffs(static_cast<int>(seen)) - 1;
    seen &= seen - 1;
    return {first + (base + bit) * step, __shfl_sync(kFullMask, open, static_cast<int>(bit))};
  }
};

// The warp's tiles, of those that any row may see.
template <typename Traits>
__device__ __forceinline__ DirectTiles direct_tiles(const Params& params, const Rows& rows) {
  std::uint32_t needed = params.tiles;
  if (params.is_causal) {
    const std::uint32_t last = params.group.divide(rows.count - 1) / kDirectTile + 1;
    needed = last < needed ? last : needed;
  }
  const std::uint32_t first = blockIdx.x * Traits::kWarps + threadIdx.x / kWarpSize;
  const std::uint32_t step = params.splits * Traits::kWarps;
  return {first, step, needed > first ? (needed - first + step - 1) / step : 0, 0u - kWarpSize, 0, 0};
}

// The first tile that the mask seems to open, which may still be written, or kNothing.
__device__ __forceinline__ std::uint32_t guess_first(const Params& params, const Rows& rows, const MaskRows& mask,
                                                     const DirectTiles& tiles) {
  const std::uint32_t lane = threadIdx.x % kWarpSize, tile = tiles.first + lane * tiles.step, key = tile * 16;
  bool open = lane < tiles.count;
  if (open && params.mask_kind != Mask::kNone && params.mask_is_aligned && key + 16 <= params.keys) {
    // Past L1, where the mask would otherwise lie as it was when it is read again.
    const auto* row = mask_row<std::uint8_t>(params, rows, mask.row_of(params, 0)) + key;
    const uint4 vec = __ldcg(reinterpret_cast<const uint4*>(row));
    open = (vec.x | vec.y | vec.z | vec.w) != 0;
  }
  const std::uint32_t all = __ballot_sync(kFullMask, open);
  return all != 0 ? tiles.first + (__ffs(static_cast<int>(all)) - 1) * tiles.step : kNothing;
}

template <typename Traits>
__device__ __forceinline__ DirectSource<typename Traits::T> direct_source(const Params& params, const Rows& rows) {
  using T = typename Traits::T;
  const std::uint32_t lane = threadIdx.x % kWarpSize, row = lane / 4, query = params.group.divide(row);
  const std::uint32_t head = rows.kv_head * params.group.divisor + row - query * params.group.divisor;
  const bool has_row = row < rows.count;
  return {static_cast<const T*>(params.k) + rows.batch * params.k_stride.batch + rows.kv_head * params.k_stride.head +
              lane / 4 * params.k_stride.row + lane % 4 * 8,
          static_cast<const T*>(params.v) + rows.batch * params.v_stride.batch + rows.kv_head * params.v_stride.head +
              2 * (lane % 4) * params.v_stride.row + lane / 4 * 8,
          static_cast<const T*>(params.q) + rows.batch * params.q_stride.batch +
              (has_row ? head * params.q_stride.head + query * params.q_stride.row : 0),
          has_row, params.dim == Traits::kDim && params.dim_v == Traits::kDim ? params.keys / Traits::kTile : 0};
}

// All tiles of the warp. guess: the tile that is loaded while the mask is read, or kNothing.
template <typename Traits>
__device__ __forceinline__ void attend_direct(const Params& params, const Rows& rows, const MaskRows& mask,
                                              const DirectSource<typename Traits::T>& source, DirectTiles tiles,
                                              std::uint32_t guess, DirectSums<Traits>& sums) {
  const std::uint32_t lane = threadIdx.x % kWarpSize;
  Piece<Traits> q[Traits::kPieces];
  DirectTile<Traits> x;
  const auto load_tile = [&](std::uint32_t tile) {
    load_keys(params, source, lane, tile, x);
    load_values(params, source, lane, tile, x);
  };
  if (guess != kNothing) load_tile(guess);
  load_row<Traits>(params, source, lane, q);
  OpenTile tile = tiles.next(params, rows, mask);
  if (tile.number != kNothing && tile.number != guess) load_tile(tile.number);
  // Keys of the next tile come while the values of this one are multiplied, and its values meanwhile.
#pragma unroll 1
  while (tile.number != kNothing) {
    const OpenTile following = tiles.next(params, rows, mask);
    float scores[4];
    multiply_by_keys<Traits>(x, q, scores);
    if (following.number != kNothing) load_keys(params, source, lane, following.number, x);
    finish_direct(params, rows, mask, lane, tile, scores);
    rebase_direct<Traits>(scores, sums);
    multiply_by_values<Traits>(x, scores, sums);
    if (following.number != kNothing) load_values(params, source, lane, following.number, x);
    tile = following;
  }
}

// A warp's rows to shared memory, [8, kDim + 4]: sums of values, then largest score and denominator.
template <typename Traits>
__device__ __forceinline__ void publish_direct(SharedAddress memory, std::uint32_t count, DirectSums<Traits>& sums) {
  const std::uint32_t lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int lanes = 4; lanes < kWarpSize; lanes *= 2) {
#pragma unroll
    for (float& sum : sums.denominator) sum += __shfl_xor_sync(kFullMask, sum, lanes);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const std::uint32_t row = 2 * (lane % 4) + r;
    if (row >= count) continue;
    const SharedAddress start = memory + row * kSumsBytes<Traits::kDim>;
#pragma unroll
    for (int b = 0; b < Traits::kBlocks; ++b) {
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        const auto& out = sums.out[b];
        asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(start + (b * 64 + lane / 4 * 8 + j * 2) * 4),
                     "f"(out[j][r]), "f"(out[j][r + 2]), "f"(out[j + 1][r]), "f"(out[j + 1][r + 2])
                     : "memory");
      }
    }
    if (lane < 4) {
      asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(start + Traits::kDim * 4), "f"(sums.largest[r]),
                   "f"(sums.denominator[r])
                   : "memory");
    }
  }
}

// Four columns of at most kMost parts, whose sums of values and whose scalars lie so many bytes apart.
template <int kMost>
__device__ __forceinline__ Partial merge_apart(std::uint32_t count, SharedAddress values, std::uint32_t values_step,
                                               SharedAddress scalars, std::uint32_t scalars_step) {
  return merge_parts<kMost>(
      count, [&](std::uint32_t i) { return load_two(scalars + i * scalars_step); },
      [&](std::uint32_t i) { return load_four(values + i * values_step); });
}

// A warp for each row, of the CTA and then of those that the CTA owns in the cluster.
template <typename Traits>
__device__ __forceinline__ void merge_direct(const Params& params, const Rows& rows, SharedAddress memory,
                                             const Inbox& inbox, DirectSums<Traits>& sums) {
  using T = typename Traits::T;
  constexpr std::uint32_t kRowBytes = kSumsBytes<Traits::kDim>, kWarpBytes = kDirectRows * kRowBytes;
  const std::uint32_t warp = threadIdx.x / kWarpSize, column = threadIdx.x % kWarpSize * 4;
  const bool in_cluster = params.splits > 1;
  publish_direct<Traits>(memory + warp * kWarpBytes, rows.count, sums);
  __syncthreads();
  if (in_cluster) wait_for_cluster();  // all inboxes are open
  if (column >= params.dim_v) return;
  if (warp < rows.count) {
    const SharedAddress row = memory + warp * kRowBytes;
    const Partial found =
        merge_apart<Traits::kWarps>(Traits::kWarps, row + column * 4, kWarpBytes, row + Traits::kDim * 4, kWarpBytes);
    if (!in_cluster) return write_result<T, false>(params, rows.batch, rows.kv_head, warp, column, found);
    send(params, inbox, warp, column, found);
  }
  if (!in_cluster || warp >= inbox.own) return;
  wait(inbox.barrier, 0);
  const std::uint32_t row_bytes = params.dim_v * 4;
  const SharedAddress values = inbox.values + warp * row_bytes + column * 4, scalars = inbox.scalars + warp * 8;
  const std::uint32_t step = inbox.share * row_bytes;
  constexpr int kFew = 4;  // less code to fetch
  const Partial sum = params.splits <= kFew
                          ? merge_apart<kFew>(params.splits, values, step, scalars, inbox.share * 8)
                          : merge_apart<kMaxCluster>(params.splits, values, step, scalars, inbox.share * 8);
  write_result<T, false>(params, rows.batch, rows.kv_head, blockIdx.x * inbox.share + warp, column, sum);
}

// blockIdx: split, K/V head, batch. The splits are a cluster.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kWarps* kWarpSize, Traits::kMinCtas)
    direct_kernel(const __grid_constant__ Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const SharedAddress shared = dynamic_shared_memory();
  const Rows rows{blockIdx.z, blockIdx.y, 0, params.rows};
  const MaskRows mask = mask_rows(params, 0, params.rows);
  const Inbox inbox = make_inbox(params, rows, shared);
  let_next_kernel_start();
  if (params.splits > 1) {
    if (threadIdx.x == 0) open_inbox(params, inbox);
    __syncwarp();
    tell_cluster();
  }
  const DirectTiles tiles = direct_tiles<Traits>(params, rows);
  const auto source = direct_source<Traits>(params, rows);
  const std::uint32_t guess = guess_first(params, rows, mask, tiles);
  DirectSums<Traits> sums{};
  sums.largest[0] = sums.largest[1] = kMinusInfinity;
  wait_for_previous_kernel();
  attend_direct<Traits>(params, rows, mask, source, tiles, guess, sums);
  merge_direct<Traits>(params, rows, shared, inbox, sums);
#endif
}

}  // namespace infuse::attention_decode
