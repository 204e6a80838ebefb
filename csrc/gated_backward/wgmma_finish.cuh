// What becomes of a rounded tile in shared memory: it is written, or the gated activation's gradients are found with it.
#pragma once

#include <cstdint>

#include "gated_backward/kernel.cuh"
#include "gated_backward/wgmma_params.h"
#include "gated_backward/wgmma_traits.cuh"
#include "infuse/memory.cuh"
#include "infuse/tma.cuh"

namespace infuse::gated_backward {

// A tile's first row and column.
struct TilePlace {
  std::uint32_t row, column;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// round: number of the CTA's tile.
__device__ __forceinline__ void finish_plain(const WgmmaParams& params, const WgmmaShared& shared,
                                             const TilePlace& tile, std::uint32_t round) {
  wait(shared.result_full(), round % 2);
  if (threadIdx.x == 32) {
#pragma unroll
    for (int block = 0; block < kColumnBlocks; ++block) {
      store_box(params.c, shared.result() + block * kResultBlockBytes,
                static_cast<std::int32_t>(tile.column + block * kSwizzledColumns), static_cast<std::int32_t>(tile.row),
                0, 0);
    }
    end_box_stores();
    wait_for_box_reads<0>();
  }
  arrive(shared.result_empty());
}

// A lane has one piece of a row of the tile, a warp four rows at a time. What does not depend on the tile's sums is
// fetched before it waits for them.
constexpr int kRowsAtOnce = 4;

template <typename T>
struct GatePieces {
  Vec<T, 8> gate[kRowsAtOnce], up[kRowsAtOnce];

  __device__ __forceinline__ void fetch(const WgmmaParams& params, std::uint32_t row, std::uint32_t column) {
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      const bool valid = row + i < params.rows && column < params.columns;
      const T* place = static_cast<const T*>(params.gated.gate_up) + (row + i) * params.gated.gate_up_stride + column;
      gate[i] = load<Reuse::kOnce, T, 8>(place, valid);
      up[i] = load<Reuse::kOnce, T, 8>(place + params.columns, valid);
    }
  }
};

template <typename T>
__device__ __forceinline__ void store_gradients(const GatedOutput& to, std::uint32_t row, std::uint32_t column,
                                                std::uint32_t columns, const Gradients<T, 8>& found) {
  T* const of_row = static_cast<T*>(to.dgate_up) + std::size_t{row} * 2 * columns + column;
  store(of_row, found.dgate);
  store(of_row + columns, found.dup);
  if (to.out != nullptr) store(static_cast<T*>(to.out) + std::size_t{row} * columns + column, found.out);
}

template <typename T>
__device__ __forceinline__ void finish_gated(const WgmmaParams& params, const WgmmaShared& shared,
                                             const TilePlace& tile, std::uint32_t round) {
  const std::uint32_t lane = threadIdx.x % 32, first = (threadIdx.x / 32 - 1) * kRowsAtOnce;
  const std::uint32_t column = tile.column + lane * 8;
  GatePieces<T> pieces;
  pieces.fetch(params, tile.row + first, column);
  wait(shared.result_full(), round % 2);
  with_activation(params.gated.activation, [&](auto kind) {
#pragma unroll 1
    for (std::uint32_t row = first; row < kTileRows; row += kFinishers * kRowsAtOnce) {
      const GatePieces<T> current = pieces;
      if (row + kFinishers * kRowsAtOnce < kTileRows) {
        pieces.fetch(params, tile.row + row + kFinishers * kRowsAtOnce, column);
      }
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        const Vec<T, 8> dh = load_shared<T, 8>(shared.piece(row + i, lane));
        const auto found = differentiate<decltype(kind)::value>(dh, current.gate[i], current.up[i]);
        if (tile.row + row + i < params.rows && column < params.columns) {
          store_gradients(params.gated, tile.row + row + i, column, params.columns, found);
        }
      }
    }
  });
  arrive(shared.result_empty());
}

#endif

}  // namespace infuse::gated_backward
