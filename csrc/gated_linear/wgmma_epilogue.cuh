// The end of a tile of a gated linear on Hopper: a thread's sums hold the gate and the up projection of the same places,
// so the product is found in registers, rounded, and goes through shared memory to the copy engine.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "gated_linear/activation.cuh"
#include "gated_linear/params.h"
#include "gemm/kernel.cuh"
#include "infuse/mma.cuh"
#include "infuse/tma.cuh"
#include "infuse/vec.cuh"

namespace infuse::gated_linear {

struct EpilogueParams {
  CUtensorMap out;       // boxes of 64 rows and of 64 columns (swizzled), or of all columns of a tile if these are no
  CUtensorMap gate, up;  // multiple of 64; halves of gate_up
  Params base;
};

// kColumns: of a tile of the result.
template <typename T, int kColumns>
struct Epilogue {
  using Params = EpilogueParams;
  static constexpr int kSums = 2 * kColumns / 2;
  static constexpr bool kSwizzled = kColumns % kSwizzledColumns == 0;
  static constexpr int kRowBytes = kSwizzled ? kSwizzledRowBytes : 2 * kColumns;  // in shared memory
  static constexpr int kPieces = kColumns / 8;  // of 16 bytes, in a row
  static constexpr int kBlockBytes = gemm::kGroupRows * kSwizzledRowBytes;

  const EpilogueParams& params;
  SharedAddress shared;
  int barrier;
  std::uint32_t thread;

  __device__ __forceinline__ Epilogue(const EpilogueParams& given, SharedAddress memory, std::uint32_t group)
      : params(given),
        shared(memory),
        barrier(gemm::kEpilogueBarrier + static_cast<int>(group)),
        thread(threadIdx.x % gemm::kWarpgroup) {}

  __device__ __forceinline__ void sync() const { wait_at_named(barrier, gemm::kWarpgroup); }

  // Where 16 bytes lie in shared memory.
  __device__ __forceinline__ SharedAddress piece(std::uint32_t row, std::uint32_t number) const {
    if constexpr (!kSwizzled) return shared + row * kRowBytes + number * 16;
    return shared + number / 8 * kBlockBytes + row * kRowBytes + ((number ^ row) % 8) * 16;
  }

  // The thread's words of a tile, word(block, half) those of columns 8 block .. 8 block + 7 and row or row + 8, to
  // memory: by the map, or where rows are cut off to `data`.
  template <typename Word>
  __device__ __forceinline__ void store_tile(const gemm::Tile& tile, std::uint32_t row, const CUtensorMap& map,
                                             T* data, std::int64_t stride, const Word& word) const {
    if (thread == 0) wait_for_box_reads<0>();
    sync();
    const std::uint32_t lane = thread % kWarpSize;
    const std::uint32_t own_row = thread / kWarpSize * 16 + lane % 16, own_block = lane / 16;
#pragma unroll
    for (int block = 0; block < kPieces; block += 2) {
      const std::uint32_t words[4] = {word(block, 0), word(block, 1), word(block + 1, 0), word(block + 1, 1)};
      store_matrices(piece(own_row, static_cast<std::uint32_t>(block) + own_block), words);
    }
    const bool is_cut = params.base.ends != nullptr && row + gemm::kGroupRows > tile.row_end;
    if (!is_cut) fence_shared_for_async();
    sync();
    if (is_cut) {
      store_rows(tile, row, data, stride);
    } else if (thread == 0) {
      constexpr int kBox = kSwizzled ? kSwizzledColumns : kColumns;
#pragma unroll
      for (int column = 0; column < kColumns; column += kBox) {
        store_box(map, shared + column / kBox * kBlockBytes, static_cast<std::int32_t>(tile.column) + column,
                  static_cast<std::int32_t>(row), 0, 0, L2::kEvictFirst);
      }
      end_box_stores();
    }
  }

  // Of a tile that ends within the rows: those of the next group belong to others.
  __device__ __forceinline__ void store_rows(const gemm::Tile& tile, std::uint32_t row, T* data,
                                             std::int64_t stride) const {
    for (std::uint32_t i = thread; i < gemm::kGroupRows * kPieces; i += gemm::kWarpgroup) {
      const std::uint32_t own_row = i / kPieces, number = i % kPieces, column = tile.column + 8 * number;
      if (row + own_row >= tile.row_end || column >= params.base.columns) continue;
      const Vec<T, 8> vec = load_shared<T, 8>(piece(own_row, number));
      *reinterpret_cast<uint4*>(data + static_cast<std::int64_t>(row + own_row) * stride + column) =
          make_uint4(vec.words[0], vec.words[1], vec.words[2], vec.words[3]);
    }
  }

  // Two neighbouring columns of the bias, 0 beyond its end.
  __device__ __forceinline__ float2 bias_of(const void* bias, std::uint32_t column) const {
    if (bias == nullptr || column >= params.base.columns) return make_float2(0.0f, 0.0f);
    const std::uint32_t pair = *reinterpret_cast<const std::uint32_t*>(static_cast<const T*>(bias) + column);
    return make_float2(Cast<T>::low(pair), Cast<T>::high(pair));
  }

  __device__ __forceinline__ void add_biases(const gemm::Tile& tile, float (&sums)[kSums]) const {
    const std::uint32_t first = tile.column + 2 * (thread % 4);
#pragma unroll
    for (int i = 0; i < kSums; i += 4) {
      const int block = i / 4 % kPieces;
      const float2 bias = bias_of(i < kSums / 2 ? params.base.gate_bias : params.base.up_bias, first + 8 * block);
      sums[i] += bias.x;
      sums[i + 1] += bias.y;
      sums[i + 2] += bias.x;
      sums[i + 3] += bias.y;
    }
  }

  // Gate and up as the backward reads them.
  __device__ __forceinline__ void keep_gate_up(const gemm::Tile& tile, std::uint32_t row, float (&sums)[kSums]) const {
    const std::int64_t columns = params.base.columns;
    T* const data = static_cast<T*>(params.base.gate_up);
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      store_tile(tile, row, which == 0 ? params.gate : params.up, data + which * columns, 2 * columns,
                 [&](int block, int half) {
                   float* const pair = sums + which * (kSums / 2) + 4 * block + 2 * half;
                   const std::uint32_t word = Cast<T>::pack(pair[0], pair[1]);
                   pair[0] = Cast<T>::low(word);
                   pair[1] = Cast<T>::high(word);
                   return word;
                 });
    }
  }

  // kRounds: the activation, before it is multiplied.
  template <Activation kActivation, bool kRounds>
  __device__ __forceinline__ void store_product(const gemm::Tile& tile, std::uint32_t row,
                                                const float (&sums)[kSums]) const {
    store_tile(tile, row, params.out, static_cast<T*>(params.base.out), params.base.out_stride,
               [&](int block, int half) {
                 const float* const gate = sums + 4 * block + 2 * half;
                 const float* const up = gate + kSums / 2;
                 float first = activate<kActivation>(gate[0]), second = activate<kActivation>(gate[1]);
                 if constexpr (kRounds) {
                   const std::uint32_t word = Cast<T>::pack(first, second);
                   first = Cast<T>::low(word);
                   second = Cast<T>::high(word);
                 }
                 return Cast<T>::pack(first * up[0], second * up[1]);
               });
  }

  template <bool kRounds>
  __device__ __forceinline__ void store_product(const gemm::Tile& tile, std::uint32_t row,
                                                const float (&sums)[kSums]) const {
    switch (params.base.activation) {
      case Activation::kSilu: return store_product<Activation::kSilu, kRounds>(tile, row, sums);
      case Activation::kGeluTanh: return store_product<Activation::kGeluTanh, kRounds>(tile, row, sums);
      case Activation::kGeluErf: return store_product<Activation::kGeluErf, kRounds>(tile, row, sums);
    }
  }

  __device__ __forceinline__ void operator()(const gemm::Tile& tile, std::uint32_t rows, float (&sums)[kSums]) const {
    const std::uint32_t row = tile.row + rows;
    if (row >= tile.row_end) return;
    if (params.base.gate_bias != nullptr || params.base.up_bias != nullptr) add_biases(tile, sums);
    if (params.base.gate_up != nullptr) {
      keep_gate_up(tile, row, sums);
      store_product<true>(tile, row, sums);
    } else {
      store_product<false>(tile, row, sums);
    }
  }

  __device__ __forceinline__ void finish() const {
    if (thread == 0) wait_for_box_reads<0>();
  }
};

}  // namespace infuse::gated_linear
