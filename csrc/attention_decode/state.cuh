// What the parts of the kernel hand to one another.
#pragma once

#include <cstdint>

#include "attention_decode/params.h"
#include "attention_decode/plan.h"
#include "infuse/async_copy.cuh"
#include "infuse/barrier.cuh"
#include "infuse/reduce.cuh"

namespace infuse::attention_decode {

template <typename T_, int kDim_, int kTile_, int kStages_, bool kInBlocks_ = false>
struct Traits {
  using T = T_;
  static constexpr int kDim = kDim_;  // head_dim of q, k and v is at most this
  static constexpr int kTile = kTile_;
  static constexpr int kStages = kStages_;
  static constexpr int kRowBytes = row_bytes(kDim);
  static constexpr int kSteps = kDim / 16;
  static constexpr bool kKeepsQueries = kDim <= 128;  // in registers
  // Tiles of K and V lie in blocks of 64 columns, as TMA brings them, instead of row by row.
  static constexpr bool kInBlocks = kInBlocks_;
};

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kMinusInfinity = -__builtin_huge_valf();

// A piece of 16 bytes of a row that begins at `row_start`. The pieces of a row change places by the row's number, so that
// eight rows' pieces at one place lie in different banks.
__device__ __forceinline__ SharedAddress swizzled(SharedAddress row_start, std::uint32_t row, std::uint32_t piece) {
  return row_start + ((piece ^ (row & 7)) * 16);
}

constexpr std::uint32_t kBlockRowBytes = 128;

// Piece `piece` of row `row` of a tile of K or V.
template <typename Traits>
__device__ __forceinline__ SharedAddress tile_piece(SharedAddress tile, std::uint32_t row, std::uint32_t piece) {
  if constexpr (Traits::kInBlocks) {
    return swizzled(tile + piece / 8 * Traits::kTile * kBlockRowBytes + row * kBlockRowBytes, row, piece % 8);
  } else {
    return swizzled(tile + row * Traits::kRowBytes, row, piece);
  }
}

// 2^x to within two units in the last place; 0 for minus infinity.
__device__ __forceinline__ float power_of_two(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// A warp's rows, found so far: `out` without its denominator, the largest score in powers of two, and the denominator
// over the keys of this lane. Each lane has parts of two rows.
template <int kDim>
struct Sums {
  float out[kDim / 8][4];
  float largest[2], denominator[2];
};

// Rows of the CTA: [first, first + count) of the K/V head's.
struct Rows {
  std::uint32_t batch, kv_head, first, count;
};

// Where things are: this thread's group of warps with its ring, and the warp's rows.
struct Place {
  std::uint32_t lane, row_warp, group, groups, group_threads, thread;  // thread: within the group
  SharedAddress queries, ring;
  std::uint32_t stage_bytes;
};

__device__ __forceinline__ void sync_warps(const Params& params, const Place& place) {
  if (params.row_warps == 1) {
    __syncwarp();
  } else {
    sync_group(static_cast<int>(place.group), static_cast<int>(place.group_threads));
  }
}

}  // namespace infuse::attention_decode
