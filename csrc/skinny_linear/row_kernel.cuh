// Linears of one row whose tile of weights fits into shared memory as a whole (sm_90a): it is there before x is known,
// so that what counts is how soon after x the results are written.
//
// Every warp has x in registers, all of it or a group's share of the columns, and multiplies it with its features by
// fused multiply-adds; sums over columns by shuffles. Products of tensor cores take longer for so little: their
// operands go through shared memory, behind barriers of the CTA. Only groups of columns meet in one. On an H200 a step
// of Qwen2.5 0.5B's 24 layers took 654 us with this kernel and 788 us with that of ring_kernel.cuh.
#pragma once

#include <cstdint>

#include "infuse/memory.cuh"
#include "infuse/overlap.cuh"
#include "infuse/reduce.cuh"
#include "infuse/vec.cuh"
#include "skinny_linear/result.cuh"
#include "skinny_linear/ring.cuh"

namespace infuse::skinny_linear {

// kPieces: of 8 columns, that a lane has of x. kBatch: features whose sums a warp adds up together.
template <typename T_, bool kGated_, int kPieces_, int kBatch_>
struct RowTraits {
  using T = T_;
  static constexpr bool kGated = kGated_;
  static constexpr int kPieces = kPieces_, kBatch = kBatch_;
  static constexpr int kOperands = kGated ? 2 : 1;
};

// The part of a warp: every `groups`-th 32 pieces of x, and neighbouring features of the tile.
struct RowPart {
  std::uint32_t lane, group, groups, first, count;

  __device__ __forceinline__ std::uint32_t piece(int i) const { return (i * groups + group) * kWarpSize + lane; }
};

__device__ __forceinline__ RowPart row_part(const Params& params) {
  const std::uint32_t warp = threadIdx.x / kWarpSize, groups = params.column_groups;  // a power of two
  const std::uint32_t count = params.tile_rows * groups / kRowWarps;
  return {threadIdx.x % kWarpSize, warp % groups, groups, warp / groups * count, count};
}

__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullMask, value, offset);
  return value;
}

// Adds up each of kCount values, a power of two, over the warp: value i is left in lane i * 32 / kCount and its
// neighbours. Halves of the lanes exchange halves of the values, so that few shuffles do.
template <int kCount>
__device__ __forceinline__ float sums_of_warp(const RowPart& part, float (&values)[kCount]) {
#pragma unroll
  for (int half = kCount / 2, offset = kWarpSize / 2; half > 0; half /= 2, offset /= 2) {
    const bool upper = (part.lane & offset) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float kept = upper ? values[i + half] : values[i], given = upper ? values[i] : values[i + half];
      values[i] = kept + __shfl_xor_sync(kFullMask, given, offset);
    }
  }
#pragma unroll
  for (int offset = kWarpSize / kCount / 2; offset > 0; offset /= 2) {
    values[0] += __shfl_xor_sync(kFullMask, values[0], offset);
  }
  return values[0];
}

// The row's reciprocal root mean square from this lane's squares.
__device__ __forceinline__ float rstd_of_row(const Params& params, const RowPart& part, float squares,
                                             float (&squares_of)[kRowWarps]) {
  float sum = sum_of_warp(squares);
  if (part.groups > 1) {
    const std::uint32_t warp = threadIdx.x / kWarpSize;
    if (part.lane == 0) squares_of[warp] = sum;
    __syncthreads();
    sum = 0.0f;
    for (std::uint32_t i = 0; i < part.groups; ++i) sum += squares_of[warp - part.group + i];
  }
  const float mean = sum * params.norm.inv_dim, eps = params.norm.eps;
  return rsqrtf(params.norm.eps_as_minimum ? (mean < eps ? eps : mean) : mean + eps);
}

// This lane's pieces of x, normalised and rounded if there is a norm; zeros behind the last column. Waits for the
// previous kernel.
template <typename Traits>
__device__ __forceinline__ void load_row(const Params& params, const RowPart& part, float (&squares_of)[kRowWarps],
                                         float (&x)[Traits::kPieces][8]) {
  using T = typename Traits::T;
  using Piece = Vec<T, 8>;
  const Norm& norm = params.norm;
  const std::uint32_t pieces = params.dim / 8;
  const bool has_residual = norm.residual != nullptr, has_weight = norm.weight != nullptr;
  Piece scale[Traits::kPieces], own[Traits::kPieces], other[Traits::kPieces];
#pragma unroll
  for (int i = 0; i < Traits::kPieces; ++i) {
    const std::uint32_t piece = part.piece(i);
    scale[i] = load<Reuse::kShared, T, 8>(static_cast<const T*>(norm.weight) + piece * 8, has_weight && piece < pieces);
  }
  wait_for_previous_kernel();
#pragma unroll
  for (int i = 0; i < Traits::kPieces; ++i) {
    const std::uint32_t piece = part.piece(i);
    own[i] = load<Reuse::kOnce, T, 8>(static_cast<const T*>(params.x) + piece * 8, piece < pieces);
    const bool is_added = has_residual && piece < pieces;
    other[i] = load<Reuse::kOnce, T, 8>(static_cast<const T*>(norm.residual) + piece * 8, is_added);
  }
#pragma unroll
  for (int i = 0; i < Traits::kPieces; ++i) unpack(own[i], x[i]);
  if (!norm.exists) return;
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < Traits::kPieces; ++i) {
    if (has_residual) {
      float added[8];
      unpack(other[i], added);
#pragma unroll
      for (int j = 0; j < 8; ++j) x[i][j] += added[j];
      const Piece sum = pack<T>(x[i]);
      const bool writes = blockIdx.x == 0 && part.first == 0 && part.piece(i) < pieces;
      if (writes) store(static_cast<T*>(norm.sum) + part.piece(i) * 8, sum);
      unpack(sum, x[i]);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) squares = fmaf(x[i][j], x[i][j], squares);
  }
  const float rstd = rstd_of_row(params, part, squares, squares_of);
#pragma unroll
  for (int i = 0; i < Traits::kPieces; ++i) {
    float factors[8];
    unpack(scale[i], factors);
#pragma unroll
    for (int j = 0; j < 8; ++j) x[i][j] *= rstd;
    if (norm.cast_before_weight) round_through<T>(x[i]);
#pragma unroll
    for (int j = 0; j < 8; ++j) x[i][j] *= factors[j] + norm.weight_offset;
    round_through<T>(x[i]);
  }
}

// kCount features from `feature` of the tile on: the warp's sums of the gate or the only weight, and of the up
// projection, are left in mine[] of the lanes that have the features' places behind part.first.
template <typename Traits, int kCount>
__device__ __forceinline__ void multiply_features(const Params& params, const RowPart& part, SharedAddress weights,
                                                  const float (&x)[Traits::kPieces][8], std::uint32_t feature,
                                                  float (&mine)[Traits::kOperands]) {
  constexpr int kOperands = Traits::kOperands, kValues = kCount * kOperands;
  const std::uint32_t block_bytes = params.tile_rows * kBlockRowBytes, operand_bytes = params.blocks * block_bytes;
  float values[kValues];
#pragma unroll
  for (float& value : values) value = 0.0f;
#pragma unroll
  for (int i = 0; i < Traits::kPieces; ++i) {
    const std::uint32_t piece = part.piece(i);
    const SharedAddress block = weights + piece / 8 * block_bytes;
#pragma unroll
    for (int value = 0; value < kValues; ++value) {
      const std::uint32_t row = part.first + feature + value / kOperands;
      const SharedAddress place = block + value % kOperands * operand_bytes + row * kBlockRowBytes +
                                  ((part.lane ^ row) % 8) * 16;
      float w[8], sum = 0.0f;
      unpack(load_shared_if<typename Traits::T, 8>(place, piece < params.dim / 8), w);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum = fmaf(w[j], x[i][j], sum);
      values[value] += sum;
    }
  }
  const float sum = sums_of_warp(part, values);
  const std::uint32_t index = part.lane - feature;
#pragma unroll
  for (int operand = 0; operand < kOperands; ++operand) {
    const std::uint32_t source = (index * kOperands + operand) * (kWarpSize / kValues);
    const float found = __shfl_sync(kFullMask, sum, source % kWarpSize);
    if (index < kCount) mine[operand] = found;
  }
}

// Adds up the sums that the groups of columns have of a tile, for the threads that finish its features.
template <int kOperands>
__device__ __forceinline__ void join_columns(const Params& params, const RowPart& part, SharedAddress place,
                                             float (&mine)[kOperands]) {
  const std::uint32_t tile_bytes = params.tile_rows * 4, group_bytes = kOperands * tile_bytes;
  if (part.lane < part.count) {
    const SharedAddress own = place + part.group * group_bytes + (part.first + part.lane) * 4;
#pragma unroll
    for (int operand = 0; operand < kOperands; ++operand) {
      store_shared(own + operand * tile_bytes, Vec<float, 1>{{__float_as_uint(mine[operand])}});
    }
  }
  __syncthreads();
  if (threadIdx.x >= params.tile_rows) return;
#pragma unroll
  for (int operand = 0; operand < kOperands; ++operand) {
    mine[operand] = 0.0f;
    for (std::uint32_t group = 0; group < part.groups; ++group) {
      const SharedAddress own = place + group * group_bytes + operand * tile_bytes + threadIdx.x * 4;
      mine[operand] += __uint_as_float(load_shared<float, 1>(own).words[0]);
    }
  }
}

// What is added to one feature.
struct RowAddends {
  float bias, up_bias, residual;
};

template <typename T>
__device__ __forceinline__ float load_one(const void* data, std::uint32_t index, bool valid) {
  return data != nullptr && valid ? static_cast<float>(static_cast<const T*>(data)[index]) : 0.0f;
}

template <typename Traits>
__device__ __forceinline__ void finish_feature(const Params& params, const Tile& tile, std::uint32_t feature,
                                               const float (&sums)[Traits::kOperands], const RowAddends& addends) {
  using T = typename Traits::T;
  float value = sums[0] + addends.bias;
  if constexpr (Traits::kGated) value = activate(params.activation, value) * (sums[1] + addends.up_bias);
  const Linear& linear = params.linears[tile.linear];
  const T rounded = static_cast<T>(value + addends.residual);
  if (linear.out_is_fp32) {
    static_cast<float*>(linear.out)[feature] = static_cast<float>(rounded);
  } else {
    static_cast<T*>(linear.out)[feature] = rounded;
  }
}

// blockIdx.x: the tile. All weights of a tile are one stage of the ring.
template <typename Traits>
__global__ void __launch_bounds__(kRowWarps* kWarpSize, 2) row_kernel(const __grid_constant__ RingParams params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using T = typename Traits::T;
  __shared__ float squares_of[kRowWarps];
  const Params& base = params.base;
  const SharedAddress shared = (dynamic_shared_memory() + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
  const SharedAddress full = shared + base.barrier_offset;
  const Tile tile = tile_of(base, blockIdx.x);
  if (threadIdx.x == 0) {
    prefetch_map(params.weights[tile.linear]);
    if (Traits::kGated) prefetch_map(params.weights[1]);
    init_barrier(full, 1);
    publish_barriers();
    arrive_expecting(full, base.stage_bytes);
    load_weights<Traits>(params, tile, shared, full, 0);
    let_next_kernel_start();
  }
  __syncthreads();

  const RowPart part = row_part(base);
  const bool joins = part.groups > 1;  // sums of several groups of columns
  const std::uint32_t own = joins ? threadIdx.x : part.first + part.lane, feature = tile.feature + own;
  const Linear& linear = base.linears[tile.linear];
  const bool finishes = (joins ? own < base.tile_rows : part.lane < part.count) && feature < linear.features;
  RowAddends addends{};
  addends.bias = load_one<T>(linear.bias, feature, finishes);
  if constexpr (Traits::kGated) addends.up_bias = load_one<T>(base.linears[1].bias, feature, finishes);
  float x[Traits::kPieces][8], mine[Traits::kOperands] = {};
  load_row<Traits>(base, part, squares_of, x);
  addends.residual = load_one<T>(base.addend, feature, finishes && tile.linear == 0);

  wait(full, 0);
  std::uint32_t done = 0;
#pragma unroll 1
  for (; done + Traits::kBatch <= part.count; done += Traits::kBatch) {
    multiply_features<Traits, Traits::kBatch>(base, part, shared, x, done, mine);
  }
  if constexpr (Traits::kBatch > 1) {
#pragma unroll 1
    for (; done < part.count; ++done) multiply_features<Traits, 1>(base, part, shared, x, done, mine);
  }
  if (joins) join_columns(base, part, full + kBytesOfBarriers, mine);
  if (finishes) finish_feature<Traits>(base, tile, feature, mine, addends);
#endif
}

}  // namespace infuse::skinny_linear
