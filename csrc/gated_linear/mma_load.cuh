// The way of a gated linear's operands from global to shared memory. Pieces of 16 bytes are swizzled so that neither
// the copies nor ldmatrix, which takes eight rows at once, meet a bank twice: in rows of 64 bytes piece p of row r lies
// at p ^ (r / 2 % 4), in rows of 128 bytes at p ^ (r % 8).
#pragma once

#include <cstdint>
#include <type_traits>

#include "gated_linear/mma_traits.h"
#include "infuse/async_copy.cuh"

namespace infuse::gated_linear {

__device__ __forceinline__ std::uint32_t swizzled_piece(std::uint32_t row, std::uint32_t piece) {
  return (piece ^ (row / 2 % 4)) * 16;
}

// A thread's part of x: one piece of every kCopyRows-th row.
template <typename Traits>
class RowLoader {
 public:
  __device__ __forceinline__ RowLoader(const Params& params, const MmaTile& tile, SharedAddress shared) {
    const std::uint32_t row = threadIdx.x / Traits::kRowPieces, piece = threadIdx.x % Traits::kRowPieces;
    place_ = shared + row * Traits::kRowBytes + swizzled_piece(row, piece);
    source_ = static_cast<const typename Traits::T*>(params.x) + (tile.row + row) * params.x_stride + piece * 8;
    step_ = Traits::kCopyRows * params.x_stride;
    rows_left_ = static_cast<std::int32_t>(tile.row_end - tile.row - row);
    depth_left_ = static_cast<std::int32_t>(params.dim - piece * 8);
  }

  __device__ __forceinline__ void fetch(std::uint32_t stage) {
#pragma unroll
    for (int i = 0; i < Traits::kRows / Traits::kCopyRows; ++i) {
      copy_async_or_zeros(place_ + stage * Traits::kStageBytes + i * Traits::kCopyRows * Traits::kRowBytes,
                          source_ + i * step_, depth_left_ > 0 && i * Traits::kCopyRows < rows_left_);
    }
    source_ += Traits::kDepth;
    depth_left_ -= Traits::kDepth;
  }

 private:
  const typename Traits::T* source_;
  std::int64_t step_;
  std::int32_t rows_left_, depth_left_;
  SharedAddress place_;
};

// A thread's part of weights with adjacent elements along dim: one piece of every 32nd row.
template <typename Traits>
class WeightLoader {
 public:
  __device__ __forceinline__ WeightLoader(const Params& params, const MmaTile& tile, SharedAddress shared) {
    const std::uint32_t row = threadIdx.x / Traits::kRowPieces, piece = threadIdx.x % Traits::kRowPieces;
    place_ = shared + Traits::kXBytes + row * Traits::kRowBytes + swizzled_piece(row, piece);
    columns_left_ = static_cast<std::int32_t>(params.columns - tile.column - row);
    depth_left_ = static_cast<std::int32_t>(params.dim - piece * 8);
    const auto find = [&](const void* weight, std::int64_t group_stride, std::int64_t stride) {
      return static_cast<const typename Traits::T*>(weight) + tile.group * group_stride + (tile.column + row) * stride +
             piece * 8;
    };
    sources_[0] = find(params.gate_weight, params.gate_group_stride, params.gate_stride);
    sources_[1] = find(params.up_weight, params.up_group_stride, params.up_stride);
    steps_[0] = Traits::kCopyRows * params.gate_stride;
    steps_[1] = Traits::kCopyRows * params.up_stride;
  }

  __device__ __forceinline__ void fetch(std::uint32_t stage) {
#pragma unroll
    for (int i = 0; i < 2 * Traits::kWarpColumns; ++i) {
      const int matrix = i % 2, block = i / 2;
      copy_async_or_zeros(place_ + stage * Traits::kStageBytes + i * Traits::kCopyRows * Traits::kRowBytes,
                          sources_[matrix] + block * steps_[matrix],
                          depth_left_ > 0 && block * Traits::kCopyRows < columns_left_);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) sources_[i] += Traits::kDepth;
    depth_left_ -= Traits::kDepth;
  }

 private:
  static_assert(Traits::kCopyRows == 32);
  const typename Traits::T* sources_[2];
  std::int64_t steps_[2];
  std::int32_t columns_left_, depth_left_;
  SharedAddress place_;
};

// The same for weights with adjacent columns: one piece of every eighth row along dim.
template <typename Traits>
class TransposedWeightLoader {
 public:
  __device__ __forceinline__ TransposedWeightLoader(const Params& params, const MmaTile& tile, SharedAddress shared) {
    const std::uint32_t piece = threadIdx.x % 8, warp_column = threadIdx.x / 8 % Traits::kWarpColumns;
    const std::uint32_t row = threadIdx.x / 8 / Traits::kWarpColumns, column = warp_column * 32 + piece % 4 * 8;
    place_ = shared + Traits::kXBytes + warp_column * Traits::kWarpWeightBytes + row * 128 + (piece ^ row) * 16;
    const bool is_gate = piece < 4;
    const std::int64_t stride = is_gate ? params.gate_stride : params.up_stride;
    const void* matrix = is_gate ? params.gate_weight : params.up_weight;
    source_ = static_cast<const typename Traits::T*>(matrix) +
              tile.group * (is_gate ? params.gate_group_stride : params.up_group_stride) + row * stride + tile.column +
              column;
    step_ = 8 * stride;
    depth_left_ = tile.column + column < params.columns ? static_cast<std::int32_t>(params.dim - row) : 0;
  }

  __device__ __forceinline__ void fetch(std::uint32_t stage) {
#pragma unroll
    for (int i = 0; i < Traits::kDepth / 8; ++i) {
      copy_async_or_zeros(place_ + stage * Traits::kStageBytes + i * 8 * 128, source_ + i * step_, i * 8 < depth_left_);
    }
    source_ += Traits::kDepth / 8 * step_;
    depth_left_ -= Traits::kDepth;
  }

 private:
  const typename Traits::T* source_;
  std::int64_t step_;
  std::int32_t depth_left_;
  SharedAddress place_;
};

// Starts the copies of kDepth columns after kDepth columns into stages.
template <typename Traits>
struct MmaLoader {
  RowLoader<Traits> x;
  std::conditional_t<Traits::kByColumns, TransposedWeightLoader<Traits>, WeightLoader<Traits>> weights;

  __device__ __forceinline__ MmaLoader(const Params& params, const MmaTile& tile, SharedAddress shared)
      : x(params, tile, shared), weights(params, tile, shared) {}

  __device__ __forceinline__ void fetch(std::uint32_t stage) {
    x.fetch(stage);
    weights.fetch(stage);
    end_copy_group();
  }
};

}  // namespace infuse::gated_linear
