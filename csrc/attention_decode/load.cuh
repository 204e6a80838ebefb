// Copies into shared memory: queries, and tiles of K, V and the mask.
#pragma once

#include <cstdint>

#include "attention_decode/tiles.cuh"
#include "infuse/vec.cuh"

namespace infuse::attention_decode {

// Queries to shared memory, zeros where there is no row or no column.
template <typename Traits>
__device__ __forceinline__ void load_queries(const Params& params, const Rows& rows, SharedAddress queries) {
  using T = typename Traits::T;
  constexpr std::uint32_t kPieces = Traits::kDim / 8;
  for (std::uint32_t i = threadIdx.x; i < params.row_warps * kWarpRows * kPieces; i += kThreads) {
    const std::uint32_t row = i / kPieces, piece = i % kPieces;
    const std::uint32_t of_head = rows.first + row;
    const std::uint32_t query = params.group.divide(of_head), head = of_head - query * params.group.divisor;
    const T* source = static_cast<const T*>(params.q) + rows.batch * params.q_stride.batch +
                      (rows.kv_head * params.group.divisor + head) * params.q_stride.head +
                      query * params.q_stride.row + piece * 8;
    const bool valid = row < rows.count && piece * 8 < params.dim;
    copy_async_or_zeros(swizzled(queries + row * Traits::kRowBytes, row, piece),
                        valid ? source : static_cast<const T*>(params.q), valid);
  }
}

// What a thread copies of every tile of K or V: one 16-byte piece of some rows.
template <typename T>
struct Source {
  const T* first;             // in the first of its rows of tile 0
  std::int64_t tile, step;    // elements from tile to tile, and from one of its rows to the next
  bool valid;                 // the piece lies within the head
};

template <typename Traits>
__device__ __forceinline__ Source<typename Traits::T> source_of(const Place& place, const void* tensor,
                                                                const Strides& stride, const Rows& rows,
                                                                std::uint32_t dim) {
  constexpr std::uint32_t kPieces = Traits::kDim / 8;
  const std::uint32_t row = place.thread / kPieces, piece = place.thread % kPieces;
  const bool valid = piece * 8 < dim;
  const auto* first = static_cast<const typename Traits::T*>(tensor) + rows.batch * stride.batch +
                      rows.kv_head * stride.head + row * stride.row + (valid ? piece * 8 : 0);
  return {first, Traits::kTile * stride.row, place.group_threads / kPieces * stride.row, valid};
}

// Rows of a tile from the thread's first on, `step` rows apart; of those beyond the last key, zeros.
template <typename Traits, int kGroupThreads>
__device__ __forceinline__ void copy_rows(const Source<typename Traits::T>& source, SharedAddress own, std::uint32_t piece,
                                          const typename Traits::T* from, std::uint32_t row, std::uint32_t rows_left) {
  constexpr int kPieces = Traits::kDim / 8, kRowsAStep = kGroupThreads / kPieces, kSteps = Traits::kTile / kRowsAStep;
  if (rows_left >= Traits::kTile) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i, from += source.step) {
      copy_async_or_zeros(swizzled(own, row + i * kRowsAStep, piece) + i * kRowsAStep * Traits::kRowBytes, from,
                          source.valid);
    }
    return;
  }
  for (int i = 0; i < kSteps; ++i, from += source.step) {
    const bool valid = source.valid && row + i * kRowsAStep < rows_left;
    copy_async_or_zeros(swizzled(own, row + i * kRowsAStep, piece) + i * kRowsAStep * Traits::kRowBytes,
                        valid ? from : source.first, valid);
  }
}

// One tile of K or V. Columns beyond the head become zeros.
template <typename Traits>
__device__ __forceinline__ void load_tile(const Params& params, const Place& place,
                                          const Source<typename Traits::T>& source, SharedAddress stage,
                                          std::uint32_t tile) {
  constexpr std::uint32_t kPieces = Traits::kDim / 8;
  const std::uint32_t row = place.thread / kPieces, piece = place.thread % kPieces;
  const SharedAddress own = stage + row * Traits::kRowBytes;
  const auto* from = source.first + tile * source.tile;
  const std::uint32_t rows_left = params.keys - tile * Traits::kTile;
  if (params.row_warps == 1) {
    copy_rows<Traits, kWarpSize>(source, own, piece, from, row, rows_left);
  } else if (params.row_warps == 2) {
    copy_rows<Traits, 2 * kWarpSize>(source, own, piece, from, row, rows_left);
  } else {
    copy_rows<Traits, 4 * kWarpSize>(source, own, piece, from, row, rows_left);
  }
}

// The mask of this warp's rows and a tile's keys, each different row of the mask once.
template <typename Traits, typename Element>
__device__ __forceinline__ void load_mask(const Params& params, const Rows& rows, const Place& place,
                                          const MaskRows& mask, SharedAddress stage, std::uint32_t tile) {
  constexpr std::uint32_t kElems = kVectorBytes / sizeof(Element), kPieces = Traits::kTile / kElems;
  const SharedAddress own = stage + place.row_warp * kWarpRows * Traits::kTile * sizeof(Element);
  for (std::uint32_t i = place.lane; i < mask.count * kPieces; i += kWarpSize) {
    const std::uint32_t key = tile * Traits::kTile + i % kPieces * kElems;
    const Element* source = mask_row<Element>(params, rows, mask.row_of(params, i / kPieces));
    const SharedAddress to = own + i * kVectorBytes;
    if (params.mask_is_aligned && key + kElems <= params.keys) {
      copy_async_or_zeros(to, source + key, true);
      continue;
    }
    Vec<Element, kElems> vec = {};
    Element* elements = reinterpret_cast<Element*>(vec.words);
#pragma unroll
    for (std::uint32_t e = 0; e < kElems; ++e) {
      if (key + e < params.keys) elements[e] = source[key + e];
    }
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(vec.words[0]), "r"(vec.words[1]),
                 "r"(vec.words[2]), "r"(vec.words[3])
                 : "memory");
  }
}

template <typename Traits>
__device__ __noinline__ void load_any_mask(const Params& params, Rows rows, Place place, MaskRows mask, SharedAddress to,
                                           std::uint32_t tile) {
  if (params.mask_kind == Mask::kBool) {
    load_mask<Traits, std::uint8_t>(params, rows, place, mask, to, tile);
  } else if (params.mask_kind == Mask::kTwoBytes) {
    load_mask<Traits, typename Traits::T>(params, rows, place, mask, to, tile);
  } else if (params.mask_kind == Mask::kFloat32) {
    load_mask<Traits, float>(params, rows, place, mask, to, tile);
  }
}

template <typename T>
struct Sources {
  Source<T> k, v;
};

// Starts the copies of a tile.
template <typename Traits>
__device__ __forceinline__ void fetch(const Params& params, const Rows& rows, const Place& place, const MaskRows& mask,
                                      const Sources<typename Traits::T>& sources, SharedAddress stage,
                                      std::uint32_t tile, bool is_masked) {
  constexpr std::uint32_t kTileBytes = Traits::kTile * Traits::kRowBytes;
  load_tile<Traits>(params, place, sources.k, stage, tile);
  load_tile<Traits>(params, place, sources.v, stage + kTileBytes, tile);
  if (is_masked) [[unlikely]] load_any_mask<Traits>(params, rows, place, mask, stage + 2 * kTileBytes, tile);
}

}  // namespace infuse::attention_decode
