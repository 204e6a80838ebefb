// A warpgroup's part in the arithmetic on one tile: 64 rows, whose queries are in registers, times 64 keys (wgmma). Tiles
// lie in blocks of 64 columns, rows of 128 bytes whose pieces change places by the row's number.
#pragma once

#include <cstdint>

#include "attention_decode/state.cuh"
#include "infuse/vec.cuh"
#include "infuse/wgmma.cuh"

namespace infuse::attention_decode {

// Queries as operands of the products, zeros where there is no row or no column.
template <typename Traits>
__device__ __forceinline__ void read_queries(const Params& params, const Rows& rows, const Place& place,
                                             std::uint32_t (&queries)[Traits::kSteps][4]) {
  using T = typename Traits::T;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const std::uint32_t row = place.row_warp * kWarpRows + place.lane / 4 + 8 * half;
    const std::uint32_t query = params.group.divide(row), head = row - query * params.group.divisor;
    const T* source = static_cast<const T*>(params.q) + rows.batch * params.q_stride.batch +
                      (rows.kv_head * params.group.divisor + head) * params.q_stride.head + query * params.q_stride.row;
#pragma unroll
    for (int piece = 0; piece < 2 * Traits::kSteps; ++piece) {
      const std::uint32_t column = piece * 8 + 2 * (place.lane % 4);
      const bool valid = row < rows.count && column < params.dim;
      queries[piece / 2][piece % 2 * 2 + half] = valid ? __ldg(reinterpret_cast<const std::uint32_t*>(source + column)) : 0;
    }
  }
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// q k^T of 64 rows and a tile.
template <typename Traits>
__device__ __forceinline__ void multiply_keys_by_group(SharedAddress stage,
                                                       const std::uint32_t (&queries)[Traits::kSteps][4],
                                                       float (&scores)[Traits::kTile / 8][4]) {
  auto& sums = reinterpret_cast<float(&)[Traits::kTile / 2]>(scores);
#pragma unroll
  for (float& sum : sums) sum = 0.0f;
  fence_products();
#pragma unroll
  for (int step = 0; step < Traits::kSteps; ++step) {
    const std::uint64_t keys = matrix_by_rows(stage + step / 4 * Traits::kTile * kSwizzledRowBytes);
    multiply<typename Traits::T, Traits::kTile>(sums, queries[step], moved(keys, step % 4 * 32), true);
  }
  end_products();
  wait_for_products<0>();
  pin(sums);
}

// out += probabilities times values, the probabilities rounded to T.
template <typename Traits>
__device__ __forceinline__ void multiply_values_by_group(SharedAddress values,
                                                         const float (&scores)[Traits::kTile / 8][4],
                                                         Sums<Traits::kDim>& sums) {
  using T = typename Traits::T;
  auto& out = reinterpret_cast<float(&)[Traits::kDim / 2]>(sums.out);
  std::uint32_t p[Traits::kTile / 16][4];
#pragma unroll
  for (int i = 0; i < Traits::kTile / 8; ++i) {
    p[i / 2][i % 2 * 2] = Cast<T>::pack(scores[i][0], scores[i][1]);
    p[i / 2][i % 2 * 2 + 1] = Cast<T>::pack(scores[i][2], scores[i][3]);
  }
  pin(out);
  fence_products();
#pragma unroll
  for (int step = 0; step < Traits::kTile / 16; ++step) {
    const std::uint64_t tile = matrix_by_columns(values, Traits::kTile * kSwizzledRowBytes);
    multiply<T, Traits::kDim, true>(out, p[step], moved(tile, step * 16 * kSwizzledRowBytes), true);
  }
  end_products();
  wait_for_products<0>();
  pin(out);
}

#endif

}  // namespace infuse::attention_decode
