// The second half of a norm: what a row's products with its scaled values are multiplied by.
#pragma once

#include <cstdint>

#include "infuse/memory.cuh"
#include "infuse/reduce.cuh"
#include "infuse/vec.cuh"
#include "skinny_linear/result.cuh"

namespace infuse::skinny_linear {

constexpr int kSquaresAhead = 8;  // pieces of 16 bytes that a thread loads before it adds them up

// From sums of squares, which the kernel before wrote, to the reciprocal root mean square of each row, in shared memory.
// kRows: a power of two, at least the rows of x. Nobody waits here for the others.
template <int kRows>
__device__ __forceinline__ void put_row_factors(const Params& params, std::uint32_t threads, float* factors) {
  const std::uint32_t lanes = threads / kRows, row = threadIdx.x / lanes, lane = threadIdx.x % lanes;
  const std::uint32_t pieces = params.dim / (4 * kSquaresWidth);
  const float* own = params.split_norm.squares + std::size_t{row} * pieces * 4;
  const bool exists = row < params.rows;
  float squares = 0.0f;
  for (std::uint32_t first = lane; first < pieces; first += kSquaresAhead * lanes) {
    Vec<float, 4> found[kSquaresAhead];
#pragma unroll
    for (std::uint32_t i = 0; i < kSquaresAhead; ++i) {
      const std::uint32_t piece = first + i * lanes;
      found[i] = load<Reuse::kOnce, float, 4>(own + piece * 4, exists && piece < pieces);
    }
#pragma unroll
    for (const Vec<float, 4>& piece : found) {
      float sums[4];
      unpack(piece, sums);
      squares += (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
  }
  for (std::uint32_t offset = lanes / 2; offset > 0; offset /= 2) {
    squares += __shfl_xor_sync(kFullMask, squares, offset);
  }
  if (exists && lane == 0) factors[row] = reciprocal_rms(params, squares);
}

}  // namespace infuse::skinny_linear
