// The end of a tile of a gated linear: biases, rounding, activation, product, and the way to memory.
#pragma once

#include <cstdint>

#include "gated_linear/mma_products.cuh"
#include "infuse/gated_activation.cuh"
#include "infuse/memory.cuh"
#include "infuse/transpose.cuh"

namespace infuse::gated_linear {

// The words that a lane has of four blocks of eight columns, before they are exchanged: two columns of each block.
struct MmaRow {
  std::uint32_t gate[4], up[4], out[4];
};

// Where gate and up are kept, they are rounded first and act is as well, as the formula does it on its own; else only
// the product is rounded.
template <typename T, Activation kKind>
__device__ __forceinline__ void combine(const float (&gate)[2], const float (&up)[2], bool keeps, int block,
                                        MmaRow& row) {
  row.gate[block] = Cast<T>::pack(gate[0], gate[1]);
  row.up[block] = Cast<T>::pack(up[0], up[1]);
  float act[2] = {infuse::activate<T, kKind>(keeps ? Cast<T>::low(row.gate[block]) : gate[0]),
                  infuse::activate<T, kKind>(keeps ? Cast<T>::high(row.gate[block]) : gate[1])};
  const std::uint32_t rounded = Cast<T>::pack(act[0], act[1]);
  row.out[block] = Cast<T>::pack(
      (keeps ? Cast<T>::low(rounded) : act[0]) * (keeps ? Cast<T>::low(row.up[block]) : up[0]),
      (keeps ? Cast<T>::high(rounded) : act[1]) * (keeps ? Cast<T>::high(row.up[block]) : up[1]));
}

template <typename T>
__device__ __forceinline__ void store_words(T* address, std::uint32_t (&words)[4], bool valid) {
  transpose_in_four(words);
  if (valid) *reinterpret_cast<uint4*>(address) = make_uint4(words[0], words[1], words[2], words[3]);
}

// The biases of the two columns that a lane has of each block: [gate or up][block][column].
template <typename Traits>
__device__ __forceinline__ void load_biases(const Params& params, const MmaTile& tile, std::uint32_t first,
                                            float (&biases)[2][4][2]) {
  using T = typename Traits::T;
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    const T* bias = static_cast<const T*>(which == 0 ? params.gate_bias : params.up_bias);
#pragma unroll
    for (int block = 0; block < 4; ++block) {
      const std::uint32_t column = first + 8 * block + threadIdx.x % 4 * 2;
      const std::uint32_t word = bias != nullptr && column < params.columns
                                     ? *reinterpret_cast<const std::uint32_t*>(bias + column)
                                     : 0;
      biases[which][block][0] = Cast<T>::low(word);
      biases[which][block][1] = Cast<T>::high(word);
    }
  }
}

template <typename Traits>
__device__ __forceinline__ void store_tile(const Params& params, const MmaTile& tile, const MmaSums& sums) {
  using T = typename Traits::T;
  const std::uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::uint32_t first = tile.column + warp / Traits::kWarpRows * 32, column = first + lane % 4 * 8;
  const std::uint32_t first_row = tile.row + warp % Traits::kWarpRows * 64 + lane / 4;
  float biases[2][4][2];
  load_biases<Traits>(params, tile, first, biases);
  with_activation(params.activation, [&](auto kind) {
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const std::uint32_t row = first_row + 16 * m + 8 * half;
        const bool valid = row < tile.row_end && column < params.columns;
        MmaRow words;
#pragma unroll
        for (int block = 0; block < 4; ++block) {
          const float gate[2] = {sums[m][block][2 * half] + biases[0][block][0],
                                 sums[m][block][2 * half + 1] + biases[0][block][1]};
          const float up[2] = {sums[m][block + 4][2 * half] + biases[1][block][0],
                               sums[m][block + 4][2 * half + 1] + biases[1][block][1]};
          combine<T, decltype(kind)::value>(gate, up, params.gate_up != nullptr, block, words);
        }
        store_words(static_cast<T*>(params.out) + row * params.out_stride + column, words.out, valid);
        if (params.gate_up == nullptr) continue;
        T* const kept = static_cast<T*>(params.gate_up) + std::size_t{row} * 2 * params.columns + column;
        store_words(kept, words.gate, valid);
        store_words(kept + params.columns, words.up, valid);
      }
    }
  });
}

}  // namespace infuse::gated_linear
