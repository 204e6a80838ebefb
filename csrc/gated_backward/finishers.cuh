// What becomes of a rounded tile in shared memory: it is written, or the gradients of a gated activation are found with
// it.
#pragma once

#include <cstdint>

#include "gated_backward/kernel.cuh"
#include "handed_gemm/traits.cuh"
#include "infuse/memory.cuh"
#include "infuse/tma.cuh"

namespace infuse::gated_backward {

using handed_gemm::kColumnBlocks, handed_gemm::kFinishers, handed_gemm::kResultBlockBytes, handed_gemm::kTileRows;
using handed_gemm::Shared, handed_gemm::TilePlace;

struct PlainFinisher {
  struct Params {
    CUtensorMap c;  // [rows, columns], boxes of 64 columns and a tile's rows
  };

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  template <typename T>
  static __device__ __forceinline__ void finish(const Params& params, const Shared& shared, const TilePlace& tile,
                                                std::uint32_t round) {
    wait(shared.result_full(), round % 2);
    if (threadIdx.x == 32) {
#pragma unroll
      for (int block = 0; block < kColumnBlocks; ++block) {
        store_box(params.c, shared.result() + block * kResultBlockBytes,
                  static_cast<std::int32_t>(tile.column + block * kSwizzledColumns),
                  static_cast<std::int32_t>(tile.row), 0, 0);
      }
      end_box_stores();
      wait_for_box_reads<0>();
    }
    arrive(shared.result_empty());
  }
#endif
};

// The tile is one of dout.
struct GatedFinisher {
  struct Params {
    const void* gate_up;  // [rows, 2 columns]
    void* dgate_up;       // [rows, 2 columns] contiguous
    void* out;            // [rows, columns] contiguous, or null
    std::int64_t gate_up_stride;  // elements
    std::uint32_t rows, columns;
    Activation activation;
  };

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  // A lane has one piece of a row of the tile, a warp four rows at a time.
  static constexpr int kRowsAtOnce = 4;

  template <typename T>
  struct GatePieces {
    Vec<T, 8> gate[kRowsAtOnce], up[kRowsAtOnce];

    __device__ __forceinline__ void fetch(const Params& params, std::uint32_t row, std::uint32_t column) {
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        const bool valid = row + i < params.rows && column < params.columns;
        const T* place = static_cast<const T*>(params.gate_up) + (row + i) * params.gate_up_stride + column;
        gate[i] = load<Reuse::kOnce, T, 8>(place, valid);
        up[i] = load<Reuse::kOnce, T, 8>(place + params.columns, valid);
      }
    }
  };

  template <typename T>
  static __device__ __forceinline__ void store_gradients(const Params& params, std::uint32_t row, std::uint32_t column,
                                                         const Gradients<T, 8>& found) {
    T* const of_row = static_cast<T*>(params.dgate_up) + std::size_t{row} * 2 * params.columns + column;
    store(of_row, found.dgate);
    store(of_row + params.columns, found.dup);
    if (params.out != nullptr) {
      store(static_cast<T*>(params.out) + std::size_t{row} * params.columns + column, found.out);
    }
  }

  // What does not depend on the tile's sums is fetched before they are waited for.
  template <typename T>
  static __device__ __forceinline__ void finish(const Params& params, const Shared& shared, const TilePlace& tile,
                                                std::uint32_t round) {
    constexpr std::uint32_t kStep = kFinishers * kRowsAtOnce;
    const std::uint32_t lane = threadIdx.x % 32, first = (threadIdx.x / 32 - 1) * kRowsAtOnce;
    const std::uint32_t column = tile.column + lane * 8;
    GatePieces<T> pieces;
    pieces.fetch(params, tile.row + first, column);
    wait(shared.result_full(), round % 2);
    with_activation(params.activation, [&](auto kind) {
#pragma unroll 1
      for (std::uint32_t row = first; row < kTileRows; row += kStep) {
        const GatePieces<T> current = pieces;
        if (row + kStep < kTileRows) pieces.fetch(params, tile.row + row + kStep, column);
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i) {
          const Vec<T, 8> dout = load_shared<T, 8>(shared.piece(row + i, lane));
          const auto found = differentiate<decltype(kind)::value>(dout, current.gate[i], current.up[i]);
          if (tile.row + row + i < params.rows && column < params.columns) {
            store_gradients(params, tile.row + row + i, column, found);
          }
        }
      }
    });
    arrive(shared.result_empty());
  }
#endif
};

}  // namespace infuse::gated_backward
