// The end of a handed over tile of a gated linear: gate in its first 128 columns and up in the others, both rounded.
// They are kept, if that is wanted, by the copy engine, while their product goes to memory 16 bytes at a time.
#pragma once

#include <cstdint>

#include "gated_linear/params.h"
#include "handed_gemm/traits.cuh"
#include "infuse/gated_activation.cuh"
#include "infuse/memory.cuh"
#include "infuse/tma.cuh"

namespace infuse::gated_linear {

struct HandedFinisher {
  struct Params {
    CUtensorMap gate, up;  // [rows, columns], boxes of 64 columns and a tile's rows
    void* out;
    std::int64_t out_stride;  // elements
    std::uint32_t rows, columns;
    Activation activation;
    bool keeps;  // gate and up are there
  };

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  // By one thread.
  static __device__ __forceinline__ void keep(const Params& params, const handed_gemm::Shared& shared,
                                              const handed_gemm::TilePlace& tile) {
    constexpr int kBlocks = handed_gemm::kColumnBlocks;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const std::uint32_t column = tile.column / 2 + block % (kBlocks / 2) * kSwizzledColumns;
      store_box(block < kBlocks / 2 ? params.gate : params.up,
                shared.result() + block * handed_gemm::kResultBlockBytes, static_cast<std::int32_t>(column),
                static_cast<std::int32_t>(tile.row), 0, 0);
    }
    end_box_stores();
  }

  // act is rounded before it is multiplied, as the formula does it on its own.
  template <typename T, Activation kKind>
  static __device__ __forceinline__ Vec<T, 8> multiply_activated(const Vec<T, 8>& gate_vec, const Vec<T, 8>& up_vec) {
    float act[8], up[8];
    unpack(gate_vec, act);
    unpack(up_vec, up);
#pragma unroll
    for (int i = 0; i < 8; ++i) act[i] = infuse::activate<T, kKind>(act[i]);
    round_through<T>(act);
#pragma unroll
    for (int i = 0; i < 8; ++i) act[i] *= up[i];
    return pack<T>(act);
  }

  // Half a warp has a row of the tile.
  template <typename T>
  static __device__ __forceinline__ void finish(const Params& params, const handed_gemm::Shared& shared,
                                                const handed_gemm::TilePlace& tile, std::uint32_t round) {
    constexpr int kRowPieces = handed_gemm::kTileColumns / 2 / 8;
    const std::uint32_t thread = threadIdx.x - 32, piece = thread % kRowPieces;
    const std::uint32_t column = tile.column / 2 + piece * 8;
    wait(shared.result_full(), round % 2);
    if (params.keeps && thread == 0) keep(params, shared, tile);
    __syncwarp();
    with_activation(params.activation, [&](auto kind) {
#pragma unroll 4
      for (std::uint32_t row = thread / kRowPieces; row < handed_gemm::kTileRows; row += 2 * handed_gemm::kFinishers) {
        const Vec<T, 8> gate = load_shared<T, 8>(shared.piece(row, piece));
        const Vec<T, 8> up = load_shared<T, 8>(shared.piece(row, piece + kRowPieces));
        const Vec<T, 8> out = multiply_activated<T, decltype(kind)::value>(gate, up);
        if (tile.row + row < params.rows && column < params.columns) {
          store(static_cast<T*>(params.out) + (tile.row + row) * params.out_stride + column, out);
        }
      }
    });
    if (params.keeps && thread == 0) wait_for_box_reads<0>();
    arrive(shared.result_empty());
  }
#endif
};

}  // namespace infuse::gated_linear
