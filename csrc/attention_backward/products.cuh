// Products of tiles in shared memory, by one warp.
#pragma once

#include <cstdint>

#include "attention_backward/state.cuh"
#include "infuse/mma.cuh"

namespace infuse::attention_backward {

// Sums of kRows by kColumns tensor-core tiles; in each, four numbers of a lane.
template <int kRows, int kColumns>
using Sums = float[kRows][kColumns][4];

template <int kRows, int kColumns>
__device__ __forceinline__ void clear(Sums<kRows, kColumns>& sums) {
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[m][n][c] = 0.0f;
    }
  }
}

// sums += A B, over kSteps times 16. load_a(words, m, step) loads 16 rows of A, load_b(words, n, step) 16 columns of B.
template <typename T, int kSteps, int kRows, int kColumns, typename LoadA, typename LoadB>
__device__ __forceinline__ void multiply(Sums<kRows, kColumns>& sums, LoadA&& load_a, LoadB&& load_b) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    std::uint32_t a[kRows][4];
#pragma unroll
    for (int m = 0; m < kRows; ++m) load_a(a[m], m, step);
#pragma unroll
    for (int n = 0; n < kColumns / 2; ++n) {
      std::uint32_t b[4];
      load_b(b, n, step);
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        mma_16x8x16<T>(sums[m][2 * n], a[m], b[0], b[1]);
        mma_16x8x16<T>(sums[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// The address that a lane gives to ldmatrix for 16 rows and 16 columns from `tile` on, of which the four matrices are:
// those above one another first, or those beside one another first.
template <int kRowBytes>
__device__ __forceinline__ SharedAddress rows_first(SharedAddress tile, std::uint32_t lane) {
  return tile + (lane % 16) * kRowBytes + lane / 16 * 16;
}

template <int kRowBytes>
__device__ __forceinline__ SharedAddress columns_first(SharedAddress tile, std::uint32_t lane) {
  return tile + (lane / 16 * 8 + lane % 8) * kRowBytes + lane / 8 % 2 * 16;
}

// sums += a b^T; a, b: rows of kSteps * 16 columns.
template <typename Traits, int kRows, int kColumns>
__device__ __forceinline__ void multiply_rows(Sums<kRows, kColumns>& sums, SharedAddress a, SharedAddress b,
                                              std::uint32_t lane) {
  constexpr int kRowBytes = Traits::kRowBytes;
  const SharedAddress own_a = rows_first<kRowBytes>(a, lane), own_b = columns_first<kRowBytes>(b, lane);
  multiply<typename Traits::T, Traits::kDim / 16>(
      sums, [&](auto& words, int m, int step) { load_matrices(words, own_a + m * 16 * kRowBytes + step * 32); },
      [&](auto& words, int n, int step) { load_matrices(words, own_b + n * 16 * kRowBytes + step * 32); });
}

// sums += a b; a: scores in shared memory, a row for each key, b: a row for each query.
template <typename Traits, int kRows, int kColumns>
__device__ __forceinline__ void multiply_scores(Sums<kRows, kColumns>& sums, SharedAddress a, SharedAddress b,
                                                std::uint32_t lane) {
  constexpr int kScoreRowBytes = Traits::kScoreRowBytes;
  const SharedAddress own_a = rows_first<kScoreRowBytes>(a, lane), own_b = rows_first<Traits::kRowBytes>(b, lane);
  multiply<typename Traits::T, kQueryBlock / 16>(
      sums, [&](auto& words, int m, int step) { load_matrices(words, own_a + m * 16 * kScoreRowBytes + step * 32); },
      [&](auto& words, int n, int step) {
        load_matrices_transposed(words, own_b + step * 16 * Traits::kRowBytes + n * 32);
      });
}

// sums += a^T b; a: scores in shared memory, a row for each key, b: a row for each key.
template <typename Traits, int kRows, int kColumns>
__device__ __forceinline__ void multiply_transposed(Sums<kRows, kColumns>& sums, SharedAddress a, SharedAddress b,
                                                    std::uint32_t lane) {
  constexpr int kScoreRowBytes = Traits::kScoreRowBytes;
  const SharedAddress own_a = columns_first<kScoreRowBytes>(a, lane), own_b = rows_first<Traits::kRowBytes>(b, lane);
  multiply<typename Traits::T, Traits::kKeys / 16>(
      sums,
      [&](auto& words, int m, int step) {
        load_matrices_transposed(words, own_a + step * 16 * kScoreRowBytes + m * 32);
      },
      [&](auto& words, int n, int step) {
        load_matrices_transposed(words, own_b + step * 16 * Traits::kRowBytes + n * 32);
      });
}

}  // namespace infuse::attention_backward
