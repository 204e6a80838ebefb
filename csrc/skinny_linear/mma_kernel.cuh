// Linears of up to 64 rows with the products of single warps (sm_80 and later).
//
// A tile is 32 rows of weights, half of them gate and half up if there is an activation. The four warps of a CTA share
// the columns of each stage, and add their sums up in the end. Stages hold rows of 128 bytes, 64 columns, whose pieces of
// 16 bytes change places by the row's number.
#pragma once

#include <cstdint>

#include "infuse/mma.cuh"
#include "infuse/overlap.cuh"
#include "infuse/reduce.cuh"
#include "skinny_linear/plan.h"
#include "skinny_linear/result.cuh"

namespace infuse::skinny_linear {

constexpr int kMmaWarps = 4, kMmaThreads = kMmaWarps * kWarpSize;
constexpr int kMmaStageBlocks = kMmaStageColumns / kBlockColumns;
constexpr int kMmaResults = 8;  // neighbouring features that a thread finishes
constexpr int kMmaPitch = kMmaTileRows + 4;  // of sums, in fp32
static_assert(kMmaStageColumns == kMmaWarps * 32, "two steps of 16 columns a warp");

template <typename T_, int kColumns_>
struct MmaTraits {
  using T = T_;
  static constexpr int kColumns = kColumns_;  // rows of x, filled up
  static constexpr int kWeightBlockBytes = kMmaTileRows * kBlockRowBytes, kXBlockBytes = kColumns * kBlockRowBytes;
  static constexpr int kXOffset = kMmaStageBlocks * kWeightBlockBytes;
  static constexpr int kStageBytes = kXOffset + kMmaStageBlocks * kXBlockBytes;
};

// Piece `piece` of 8 columns of a row of a stage.
__device__ __forceinline__ SharedAddress place_of(SharedAddress tile, std::uint32_t block_bytes, std::uint32_t row,
                                                  std::uint32_t piece) {
  return tile + piece / 8 * block_bytes + row * kBlockRowBytes + ((piece ^ row) % 8) * 16;
}

// Copies the weights of a stage, zeros beyond the last feature or column.
template <typename Traits>
__device__ __forceinline__ void copy_weights(const Params& params, const Tile& tile, SharedAddress stage,
                                             std::uint32_t iteration) {
  using T = typename Traits::T;
  constexpr std::uint32_t kPieces = kMmaStageColumns / 8;
  const bool gated = params.activation != Activation::kNone;
#pragma unroll
  for (std::uint32_t i = threadIdx.x; i < kMmaTileRows * kPieces; i += kMmaThreads) {
    const std::uint32_t row = i / kPieces, piece = i % kPieces, column = iteration * kMmaStageColumns + piece * 8;
    const bool is_up = gated && row >= kMmaTileRows / 2;
    const Linear& linear = params.linears[is_up ? 1 : tile.linear];
    const std::uint32_t feature = tile.feature + (is_up ? row - kMmaTileRows / 2 : row);
    const bool valid = feature < linear.features && column < params.dim;
    const T* source = static_cast<const T*>(linear.weight) + (valid ? feature * linear.weight_stride + column : 0);
    copy_async_or_zeros(place_of(stage, Traits::kWeightBlockBytes, row, piece), source, valid);
  }
}

template <typename Traits>
__device__ __forceinline__ void copy_x(const Params& params, SharedAddress stage, std::uint32_t iteration) {
  using T = typename Traits::T;
  constexpr std::uint32_t kPieces = kMmaStageColumns / 8;
#pragma unroll
  for (std::uint32_t i = threadIdx.x; i < Traits::kColumns * kPieces; i += kMmaThreads) {
    const std::uint32_t row = i / kPieces, piece = i % kPieces, column = iteration * kMmaStageColumns + piece * 8;
    const bool valid = row < params.rows && column < params.dim;
    const T* source = static_cast<const T*>(params.x) + (valid ? row * params.x_stride + column : 0);
    copy_async_or_zeros(place_of(stage + Traits::kXOffset, Traits::kXBlockBytes, row, piece), source, valid);
  }
}

// Two steps of 16 columns: the warp's share of a stage.
template <typename Traits>
__device__ __forceinline__ void multiply_stage(SharedAddress stage, float (&sums)[2][Traits::kColumns / 8][4]) {
  const std::uint32_t warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const SharedAddress x = stage + Traits::kXOffset;
  std::uint32_t narrow[4];
  if constexpr (Traits::kColumns == 8) {
    load_matrices(narrow, place_of(x, Traits::kXBlockBytes, lane % 8, warp * 4 + lane / 8));
  }
#pragma unroll
  for (std::uint32_t step = 0; step < 2; ++step) {
    const std::uint32_t first = warp * 4 + step * 2;
    std::uint32_t weights[2][4];
#pragma unroll
    for (std::uint32_t m = 0; m < 2; ++m) {
      load_matrices(weights[m], place_of(stage, Traits::kWeightBlockBytes, m * 16 + lane % 16, first + lane / 16));
    }
    if constexpr (Traits::kColumns == 8) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        mma_16x8x16<typename Traits::T>(sums[m][0], weights[m], narrow[2 * step], narrow[2 * step + 1]);
      }
    } else {
#pragma unroll
      for (std::uint32_t pair = 0; pair < Traits::kColumns / 16; ++pair) {
        std::uint32_t columns[4];
        const std::uint32_t row = pair * 16 + lane / 16 * 8 + lane % 8;
        load_matrices(columns, place_of(x, Traits::kXBlockBytes, row, first + lane / 8 % 2));
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma_16x8x16<typename Traits::T>(sums[m][2 * pair], weights[m], columns[0], columns[1]);
          mma_16x8x16<typename Traits::T>(sums[m][2 * pair + 1], weights[m], columns[2], columns[3]);
        }
      }
    }
  }
}

// The warp's sums as fp32 [row of x][row of weights].
template <typename Traits>
__device__ __forceinline__ void put_warp_sums(SharedAddress place, const float (&sums)[2][Traits::kColumns / 8][4]) {
  const std::uint32_t lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < Traits::kColumns / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const std::uint32_t row = n * 8 + 2 * (lane % 4) + e % 2, feature = m * 16 + lane / 4 + e / 2 * 8;
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(place + (row * kMmaPitch + feature) * 4), "f"(sums[m][n][e])
                     : "memory");
      }
    }
  }
}

// 8 neighbouring sums, of all warps in their order.
__device__ __forceinline__ void add_up_warps(SharedAddress place, int warp_bytes, float (&sums)[kMmaResults]) {
#pragma unroll
  for (float& sum : sums) sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kMmaWarps; ++warp) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Vec<float, 4> values = load_shared<float, 4>(place + warp * warp_bytes + half * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[4 * half + i] += __uint_as_float(values.words[i]);
    }
  }
}

template <typename Traits>
__device__ __forceinline__ void finish_mma_tile(const Params& params, const Tile& tile, SharedAddress place) {
  constexpr int kWarpBytes = Traits::kColumns * kMmaPitch * 4;
  const bool gated = params.activation != Activation::kNone;
  const std::uint32_t pieces = params.tile_rows / kMmaResults;
  for (std::uint32_t item = threadIdx.x; item < params.rows * pieces; item += kMmaThreads) {
    const std::uint32_t row = item / pieces, feature = item % pieces * kMmaResults;
    if (tile.feature + feature >= params.linears[tile.linear].features) continue;
    const SharedAddress own = place + (row * kMmaPitch + feature) * 4;
    float sums[kMmaResults], up[kMmaResults];
    add_up_warps(own, kWarpBytes, sums);
    if (gated) add_up_warps(own + kMmaTileRows / 2 * 4, kWarpBytes, up);
    store_results<typename Traits::T>(params, tile.linear, row, tile.feature + feature, sums, up);
  }
}

// blockIdx.x: the tile. One CTA an SM is all that is asked for, or the compiler would rather spill than take registers.
template <typename Traits>
__global__ void __launch_bounds__(kMmaThreads, 1) mma_kernel(const __grid_constant__ Params params) {
  const SharedAddress shared = dynamic_shared_memory();
  const Tile tile = tile_of(params, blockIdx.x);
  float sums[2][Traits::kColumns / 8][4] = {};
  let_next_kernel_start();
  for (std::uint32_t i = 0; i < kMmaStages - 1 && i < params.iterations; ++i) {
    copy_weights<Traits>(params, tile, shared + i * Traits::kStageBytes, i);
  }
  wait_for_previous_kernel();
  for (std::uint32_t i = 0; i < kMmaStages - 1; ++i) {
    if (i < params.iterations) copy_x<Traits>(params, shared + i * Traits::kStageBytes, i);
    end_copy_group();
  }
  std::uint32_t reading = 0, writing = kMmaStages - 1;
#pragma unroll 1
  for (std::uint32_t i = 0; i < params.iterations; ++i) {
    wait_for_copies<kMmaStages - 2>();
    __syncthreads();  // also: nobody reads any more what is overwritten next
    const std::uint32_t next = i + kMmaStages - 1;
    if (next < params.iterations) {
      copy_weights<Traits>(params, tile, shared + writing * Traits::kStageBytes, next);
      copy_x<Traits>(params, shared + writing * Traits::kStageBytes, next);
    }
    end_copy_group();
    multiply_stage<Traits>(shared + reading * Traits::kStageBytes, sums);
    reading = reading + 1 == kMmaStages ? 0 : reading + 1;
    writing = writing + 1 == kMmaStages ? 0 : writing + 1;
  }
  wait_for_copies<0>();
  __syncthreads();  // the sums take the stages' place
  const std::uint32_t warp = threadIdx.x / kWarpSize;
  put_warp_sums<Traits>(shared + warp * Traits::kColumns * kMmaPitch * 4, sums);
  __syncthreads();
  finish_mma_tile<Traits>(params, tile, shared);
}

}  // namespace infuse::skinny_linear
