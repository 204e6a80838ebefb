// The end of a tile of rows: denominators, log-sum-exp, rounding, and the way to memory.
#pragma once

#include <cstdint>

#include "attention_forward/result.cuh"
#include "attention_forward/wgmma_scores.cuh"
#include "infuse/memory.cuh"
#include "infuse/transpose.cuh"

namespace infuse::attention_forward {

// Rounds and writes a thread's two rows, 16 bytes at a time.
template <typename Traits>
__device__ __forceinline__ void store_rows(const Params& params, const GroupRows& rows, const RowState& state,
                                           const float (&out)[Traits::kDim / 2]) {
  using T = typename Traits::T;
  T* const start = static_cast<T*>(params.out) + rows.batch(params) * params.out_stride.batch +
                   rows.head(params) * params.out_stride.head;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Ending ending =
        end_row<T>(params, rows.head(params), state.largest[half], attention::sum_of_row(state.sum[half]));
    const std::uint32_t thread = read_thread(), row = rows.of_thread(thread) + 8 * half;
    if (params.lse != nullptr && thread % 4 == 0 && row < params.queries) {
      params.lse[static_cast<std::size_t>(rows.batch_head) * params.queries + row] = ending.lse;
    }
    T* const of_row = start + row * params.out_stride.row;
#pragma unroll
    for (int n = 0; n < Traits::kDim / 8; n += 4) {
      Vec<T, 8> vec;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int place = 4 * (n + i) + 2 * half;
        vec.words[i] = n + i >= Traits::kDim / 8
                           ? 0
                           : Cast<T>::pack(out[place] * ending.factor, out[place + 1] * ending.factor);
      }
      transpose_in_four(vec.words);
      const std::uint32_t column = 8 * (n + thread % 4);
      if (row < params.queries && column < params.dim_v) store(of_row + column, vec);
    }
  }
}

}  // namespace infuse::attention_forward
