// Copies into shared memory: queries, and tiles of K and V.
#pragma once

#include <cstdint>

#include "attention_forward/mma_state.cuh"

namespace infuse::attention_forward {

// Neighbouring lanes copy neighbouring pieces of 16 bytes of one row.
template <typename Traits>
constexpr int kLanesOfRow = Traits::kDim % 64 == 0 ? 8 : 4;
template <typename Traits>
constexpr int kPiecesOfLane = Traits::kDim / 8 / kLanesOfRow<Traits>;

// One row, or zeros; columns beyond `dim` become zeros. anything: an address that is not read.
template <typename Traits>
__device__ __forceinline__ void copy_row(SharedAddress to, const typename Traits::T* row, std::uint32_t first_piece,
                                         std::uint32_t dim, bool valid, const void* anything) {
  constexpr int kLanes = kLanesOfRow<Traits>;
#pragma unroll
  for (int i = 0; i < kPiecesOfLane<Traits>; ++i) {
    const bool within = valid && (first_piece + i * kLanes) * 8 < dim;
    copy_async_or_zeros(to + i * kLanes * 16, within ? row + i * kLanes * 8 : anything, within);
  }
}

template <typename Traits>
__device__ __forceinline__ void load_queries(const Params& params, const Place& place, SharedAddress shared,
                                             std::uint32_t rows) {
  constexpr std::uint32_t kLanes = kLanesOfRow<Traits>;
  using T = typename Traits::T;
  const std::uint32_t piece = threadIdx.x % kLanes;
  const T* head = static_cast<const T*>(params.q) + place.batch * params.q_stride.batch +
                  place.head * params.q_stride.head + piece * 8;
#pragma unroll 1
  for (std::uint32_t row = threadIdx.x / kLanes; row < rows; row += blockDim.x / kLanes) {
    const std::uint32_t query = place.first_row + row;
    copy_row<Traits>(shared + row * Traits::kRowBytes + piece * 16, head + query * params.q_stride.row, piece,
                     params.dim, query < params.queries, params.q);
  }
}

// A tile whose keys and columns all exist. own: the thread's piece of its first key.
template <typename Traits, int kWarps>
__device__ __forceinline__ void copy_full_tile(const typename Traits::T* own, std::int64_t stride, SharedAddress to) {
  constexpr int kLanes = kLanesOfRow<Traits>, kRows = kWarps * kWarpSize / kLanes;
#pragma unroll
  for (int row = 0; row < kTile; row += kRows) {
    // kRows is a power of two and the thread's first row is below it, so the numbers add up.
    const typename Traits::T* from = own + static_cast<std::int64_t>(exchanged(row)) * stride;
#pragma unroll
    for (int i = 0; i < kPiecesOfLane<Traits>; ++i) {
      copy_async_or_zeros(to + row * Traits::kRowBytes + i * kLanes * 16, from + i * kLanes * 8, true);
    }
  }
}

// Starts the copies of a tile of K or V [batch, kv_heads, keys, dim].
template <typename Traits>
__device__ __forceinline__ void fetch(const Params& params, const Place& place, const void* tensor,
                                      const Strides& stride, std::uint32_t dim, std::uint32_t tile,
                                      SharedAddress stage) {
  constexpr std::uint32_t kLanes = kLanesOfRow<Traits>;
  const std::uint32_t thread = read_thread(), piece = thread % kLanes, first = thread / kLanes;
  const SharedAddress to = stage + first * Traits::kRowBytes + piece * 16;
  const auto* from = static_cast<const typename Traits::T*>(tensor) + place.batch * stride.batch +
                     place.kv_head * stride.head + std::int64_t{tile} * kTile * stride.row + piece * 8;
  const std::uint32_t keys_left = params.keys - tile * kTile;
  if (keys_left >= kTile && dim == Traits::kDim) {
    from += exchanged(first) * stride.row;
    if (blockDim.x == 4 * kWarpSize) return copy_full_tile<Traits, 4>(from, stride.row, to);
    if (blockDim.x == 8 * kWarpSize) return copy_full_tile<Traits, 8>(from, stride.row, to);
    return copy_full_tile<Traits, 2>(from, stride.row, to);
  }
#pragma unroll 1
  for (std::uint32_t row = 0; row < kTile; row += blockDim.x / kLanes) {
    const std::uint32_t key = exchanged(first + row);
    copy_row<Traits>(to + row * Traits::kRowBytes, from + std::int64_t{key} * stride.row, piece, dim, key < keys_left,
                     tensor);
  }
}

}  // namespace infuse::attention_forward
